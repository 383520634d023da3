"""What the way out of a sandbox carries: `.venv/bin/python -m bench.egress`.

Starts a stack of its own on Docker, and a file server on this machine. `curl` fetches the same files from inside,
through the guest's forwarder and the gateway, and on the host directly, in turns and in one run: the ratios count,
since both saw the same machine. Plain HTTP goes through the proxy's HTTP, HTTPS through a tunnel. Writes
bench/EGRESS.md. `--quick`: one round, prints only.
"""

from __future__ import annotations

import argparse
import http.server
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.conditions import conditions, load_average
from bench.product import Caller, check
from tests.live import LiveStack
from tests.outbound.servers import certificate

REPORT = Path(__file__).resolve().parent / "EGRESS.md"
ADDRESS = "127.0.0.2"
ROUNDS = 5
MIB = 1024 * 1024
LARGE = 256
"""MiB of the large file."""
SMALL_CALLS = 40
"""Fetches of 1 KiB in a round, each on a connection of its own."""


class Files(http.server.BaseHTTPRequestHandler):
    """`/<bytes>` is a file of so many zeros."""

    protocol_version = "HTTP/1.1"
    piece = bytes(MIB)

    def do_GET(self) -> None:
        left = int(self.path.lstrip("/"))
        self.send_response(200)
        self.send_header("Content-Length", str(left))
        self.end_headers()
        while left:
            sent = self.piece[:left]
            self.wfile.write(sent)
            left -= len(sent)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def served(folder: Path | None) -> Iterator[int]:
    """A port of `ADDRESS`; over TLS when there is a folder for its certificate."""
    server = http.server.ThreadingHTTPServer((ADDRESS, 0), Files)
    if folder is not None:
        server.socket = certificate(folder, ADDRESS)[0].wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def on_host(command: str) -> str:
    return subprocess.run(["bash", "-c", command], check=True, capture_output=True, text=True).stdout


def measured(run: Callable[[str], str], url: str) -> tuple[float, float]:
    """MB/s of the large file, and the middle time in ms of a small one."""
    size = LARGE * MIB
    said = run(
        f"curl -sk -o /dev/null -w '%{{http_code}} %{{size_download}} %{{speed_download}}' {url}/{size}"
    ).split()
    check(said[:2] == ["200", str(size)], said)
    times = run(
        f"for n in $(seq {SMALL_CALLS}); do curl -sk -o /dev/null -w '%{{time_total}}\\n' {url}/1024; done"
    ).split()
    check(len(times) == SMALL_CALLS, times)
    return float(said[2]) / 1e6, statistics.median(map(float, times)) * 1000


def report(facts: dict[str, str], found: dict[str, list[tuple[float, float]]]) -> str:
    middle = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in found.items()
    }
    lines = ["# What the way out of a sandbox carries", "", *(str(__doc__).split("\n\n")[1:]), ""]
    lines += [
        f"| | {LARGE} MiB, MB/s | of direct | 1 KiB, ms (middle) | more than direct, ms |",
        "|---|--:|--:|--:|--:|",
    ]
    for kind in ("http", "https"):
        (straight, quick), (through, slow) = middle[f"{kind}, direct"], middle[f"{kind}, from inside"]
        lines.append(f"| {kind}, direct | {straight:.0f} | | {quick:.1f} | |")
        lines.append(
            f"| {kind}, from inside | {through:.0f} | {through / straight:.2f} | {slow:.1f} | {slow - quick:.1f} |"
        )
    lines += ["", *(f"- {name}: {value}" for name, value in facts.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.egress")
    parser.add_argument("--quick", action="store_true", help="one round, prints only")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    rounds = 1 if options.quick else ROUNDS
    facts = conditions()
    with (
        tempfile.TemporaryDirectory(prefix="e2a-bench-") as name,
        served(None) as plain,
        served(Path(name)) as tls,
    ):
        urls = {"http": f"http://{ADDRESS}:{plain}", "https": f"https://{ADDRESS}:{tls}"}
        allowed = [url.partition("://")[2] for url in urls.values()]
        environment = {"E2A_POOL": "standard=1", "E2A_EGRESS_ALLOW_PRIVATE": ",".join(allowed)}
        with LiveStack(Path(name) / "var", environment=environment) as stack:
            caller = Caller(stack, stack.api_key())
            made = caller.call("POST", "/v1/sandboxes", {"egress": {"allow": allowed}}, wants=201)

            def inside(command: str) -> str:
                body = {"command": command, "timeout_seconds": 120}
                answer = caller.call("POST", f"/v1/sandboxes/{made['sandbox_id']}/exec", body, wants=200)
                check(answer["exit_code"] == 0, answer)
                return str(answer["stdout"])

            found: dict[str, list[tuple[float, float]]] = {}
            for number in range(rounds):
                for kind, url in urls.items():
                    for where, run in (("direct", on_host), ("from inside", inside)):
                        found.setdefault(f"{kind}, {where}", []).append(measured(run, url))
                print(f"round {number + 1} of {rounds}", flush=True)
    facts["Load average after"] = load_average()
    facts["Rounds"] = f"{rounds}, middle values"
    text = report(facts, found)
    print("\n" + text)
    if not options.quick:
        REPORT.write_text(text)


if __name__ == "__main__":
    main()
