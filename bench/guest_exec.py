"""Measure the guest: exec of /bin/true end to end against posix_spawn on the host, time to ready, memory.

Run: `python bench/guest_exec.py [--count 1000] [--python PATH] [--uid 10001]`. As root the guest switches to
that uid as it does in a sandbox; otherwise it runs without isolation. Times are milliseconds.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

GUEST = Path(__file__).resolve().parent.parent / "sandboxes" / "guest" / "__main__.py"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--python", default=os.path.realpath(sys.executable))
    parser.add_argument("--uid", default="10001")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        address = f"{folder}/guest.sock"
        command = [options.python, "-I", "-S", "-B", str(GUEST), "--listen", address, "--workspace", "/tmp"]
        command += ["--uid", options.uid] if os.getuid() == 0 else ["--no-isolation"]
        starts = [ready_after(command, address) for _ in range(10)]
        guest = subprocess.Popen(command)
        try:
            wait_until_ready(address)
            print("ready        ", percentiles(starts))
            print("guest, idle  ", memory(guest.pid))
            numbers = iter(range(10**9))
            spawn, exec_, shell = [], [], []
            # In turns, so that a busy machine is unfair to all of them alike.
            for _ in range(options.count // 100):
                spawn += times(100, posix_spawn)
                exec_ += times(100, lambda: guest_exec(address, next(numbers), argv=["/bin/true"]))
                shell += times(20, lambda: guest_exec(address, next(numbers), command="true"))
            print("posix_spawn  ", percentiles(spawn))
            print(
                "guest exec   ",
                percentiles(exec_),
                f" = {statistics.median(exec_) / statistics.median(spawn):.2f} x",
            )
            print("guest bash -c", percentiles(shell))
            print("guest, after ", memory(guest.pid))
        finally:
            guest.terminate()
            begun = time.perf_counter()
            guest.wait()
            print(f"TERM to end   {(time.perf_counter() - begun) * 1000:.1f}")


def times(count: int, measured: Callable[[], None]) -> list[float]:
    taken = []
    for _ in range(count):
        begun = time.perf_counter()
        measured()
        taken.append((time.perf_counter() - begun) * 1000)
    return taken


def percentiles(taken: list[float]) -> str:
    ordered = sorted(taken)
    return (
        f"p50 {ordered[len(ordered) // 2]:.3f}  p95 {ordered[len(ordered) * 95 // 100]:.3f}  n {len(ordered)}"
    )


def posix_spawn() -> None:
    os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)


def guest_exec(address: str, number: int, **what: object) -> None:
    """One round trip: connect, POST, read to the end."""
    body = json.dumps({"id": f"p{number}", **what}).encode()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(address)
        client.sendall(
            b"POST /processes?follow=1 HTTP/1.1\r\nHost: guest\r\nContent-Length: %d\r\n\r\n%b"
            % (len(body), body)
        )
        answer = b""
        while piece := client.recv(65536):
            answer += piece
    if b'"exit_code": 0' not in answer:
        raise SystemExit(f"the guest answered {answer!r}")


def wait_until_ready(address: str) -> None:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(address)
                client.sendall(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
                if client.recv(4096).startswith(b"HTTP/1.1 200"):
                    return
        except OSError:
            time.sleep(0.0005)
    raise SystemExit("the guest was not ready after 10 s")


def ready_after(command: list[str], address: str) -> float:
    begun = time.perf_counter()
    guest = subprocess.Popen(command)
    wait_until_ready(address)
    taken = (time.perf_counter() - begun) * 1000
    guest.terminate()
    guest.wait()
    return taken


def memory(pid: int) -> str:
    """PSS and private memory of the guest and its runners, in MiB."""
    pids, total, private = [pid], 0, 0
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                text = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            if int(text[text.rindex(")") + 2 :].split()[1]) == pid:
                pids.append(int(entry))
    for one in pids:
        for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
            name, *rest = line.split()
            total += int(rest[0]) if name == "Pss:" else 0
            private += int(rest[0]) if name.startswith("Private_") and name != "Private_Hugetlb:" else 0
    return f"PSS {total / 1024:.1f} MiB  private {private / 1024:.1f} MiB  in {len(pids)} processes"


if __name__ == "__main__":
    main()
