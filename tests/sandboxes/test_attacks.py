"""A hostile sandbox: it is told its limit, its neighbour answers, it can be used afterwards, the host loses nothing.

How long the neighbour takes is measured by `python -m bench.neighbours`, not here: this machine may be busy.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.db import connections

from bench import attacks
from sandboxes.host import this_host
from tests.fixtures import Api
from tests.sandboxes.running import RunningNode, wait_until
from tests.sandboxes.test_warm_and_cold import exec_in, made

pytestmark = [pytest.mark.docker, pytest.mark.timeout(240)]
MIB = 1024 * 1024


@pytest.fixture
def street(make_node: Callable[..., RunningNode], worker: Any, as_alice: Api) -> tuple[str, str]:
    """An attacker and a neighbour."""
    make_node(pool=2, engine="docker").wait_parked(2)
    return made(as_alice)["vm_id"], made(as_alice)["vm_id"]


def attacked(api: Api, street: tuple[str, str], argv: list[str], **body: Any) -> tuple[Any, int]:
    """The attacker's answer, and how many times the neighbour answered right meanwhile."""
    attacker, neighbour = street
    answers: list[Any] = []

    def attack() -> None:
        answers.append(
            api.post(f"/v1/sandboxes/{attacker}/exec", {"argv": argv, "timeout_seconds": 20, **body})
        )
        connections.close_all()

    thread = threading.Thread(target=attack)
    thread.start()
    answered = 0
    while thread.is_alive():
        assert exec_in(api, neighbour, "echo here")["stdout"] == "here\n"
        answered += 1
        thread.join(0.05)
    return answers[0], answered


def is_usable(api: Api, sandbox: str) -> bool:
    done = exec_in(api, sandbox, "rm -rf /workspace/*; echo alive", timeout_seconds=60)
    return bool(done["stdout"] == "alive\n")


def disk_of(node_folder: Path, sandbox: str) -> tuple[int, int]:
    """Size of the image, and what is really taken of the host's disk."""
    found = (node_folder / sandbox / "disk.img").stat()
    return found.st_size, found.st_blocks * 512


def uid_of(api: Api, sandbox: str) -> int:
    return int(exec_in(api, sandbox, "id -u")["stdout"])


def test_a_fork_bomb_reaches_its_limit_gives_way_and_leaves_nothing(
    street: tuple[str, str], as_alice: Api
) -> None:
    host = this_host()
    state = host.engine.inspect(street[0], 1)
    assert state is not None
    answer, answered = attacked(as_alice, street, attacks.FORK_BOMB)
    assert answer.status_code == 200
    said = (
        answer.json()
    )  # On a busy machine the bomb may fill it before the shell has its `head`: then the shell says so.
    assert "Resource temporarily unavailable" in said["stdout"] + said["stderr"]
    assert answered > 0
    inside = subprocess.run(
        ["docker", "top", state.container_id, "-eo", "pid"], check=True, capture_output=True, text=True
    )
    assert len(inside.stdout.splitlines()) - 1 <= 256
    assert is_usable(as_alice, street[0])
    assert as_alice.delete(f"/v1/sandboxes/{street[0]}").status_code == 200
    wait_until(lambda: host.engine.inspect(street[0], 1) is None, what="its removal")
    # A group of the kernel's is gone only when no process is left in it.
    wait_until(lambda: host.engine.memory_use(state.container_id) is None, what="the end of its processes")


def test_a_command_after_a_bomb_has_room_for_what_it_starts_itself(
    street: tuple[str, str], as_alice: Api
) -> None:
    """Enough is free to start the command, but not for its pipeline."""
    leave_three_free = """
import os, signal
children = []
try:
    while True:
        child = os.fork()
        if not child:
            os.setsid()
            os.execvp("sleep", ["sleep", "600"])
        children.append(child)
except BlockingIOError:
    for child in children[:3]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    print(len(children))
"""
    answer, _ = attacked(as_alice, street, ["python3", "-c", leave_three_free])
    assert int(answer.json()["stdout"]) > 200
    done = exec_in(as_alice, street[0], "echo alive | cat | cat | cat | cat | cat", timeout_seconds=60)
    assert (done["exit_code"], done["stdout"], done["stderr"]) == (0, "alive\n", "")


def test_a_memory_hog_is_killed_again_and_again_and_the_sandbox_stays(
    street: tuple[str, str], as_alice: Api
) -> None:
    answer, answered = attacked(as_alice, street, attacks.MEMORY_HOG)
    assert (answer.json()["exit_code"], answer.json()["oom"]) == (137, True)
    assert answered > 0
    assert is_usable(as_alice, street[0])


def test_a_full_disk_is_the_sandboxs_own(street: tuple[str, str], as_alice: Api, settings: Any) -> None:
    folder = settings.E2A.data_dir / "sandboxes"
    argv = ["env", "KEEP=1", *attacks.DISK_FILL]
    answer, answered = attacked(as_alice, street, argv, timeout_seconds=120)
    assert answer.json()["exit_code"] == 1
    # The limit of one file is the disk's size, so the disk is full before.
    assert "No space left on device" in answer.json()["stderr"] or "File too large" in answer.json()["stderr"]
    assert answered > 0
    size, taken = disk_of(folder, street[0])
    assert size == 2048 * MIB
    assert taken <= size + MIB
    assert is_usable(as_alice, street[0])
    wait_until(lambda: disk_of(folder, street[0])[1] < 256 * MIB, what="the host's disk given back")


def test_inodes_are_the_sandboxs_own(street: tuple[str, str], as_alice: Api) -> None:
    before = os.statvfs("/").f_favail
    fill = [*attacks.INODE_FILL[:2], attacks.INODE_FILL[2].replace("if time.time() > until: break", "")]
    answer, answered = attacked(as_alice, street, fill, timeout_seconds=150)
    told = answer.json()["stdout"].splitlines()
    assert told[0] == "No space left on device"
    assert int(told[1]) > 200_000
    assert answered > 0
    assert abs(os.statvfs("/").f_favail - before) < 50_000
    assert is_usable(as_alice, street[0])


def test_a_flood_of_output_is_cut_and_costs_no_memory(street: tuple[str, str], as_alice: Api) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    answer, answered = attacked(as_alice, street, attacks.STDOUT_FLOOD)
    assert answer.json()["exit_code"] == 0
    assert (len(answer.json()["stdout"]), answer.json()["truncated"]) == (MIB, True)
    assert resident() - before < 64 * MIB
    assert answered > 0
    assert is_usable(as_alice, street[0])


def test_sockets_and_their_buffers_are_counted(street: tuple[str, str], as_alice: Api) -> None:
    def buffers() -> int:
        lines = Path("/proc/net/sockstat").read_text().splitlines()
        words = [line.split() for line in lines if line.startswith(("TCP:", "UDP:"))]
        return sum(int(line[line.index("mem") + 1]) for line in words) * os.sysconf("SC_PAGE_SIZE")

    before, seen = buffers(), []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            seen.append(buffers())

    watcher = threading.Thread(target=watch)
    watcher.start()
    answer, answered = attacked(as_alice, street, attacks.SOCKET_HOG)
    stop.set()
    watcher.join()
    assert "Too many open files" in answer.json()["stdout"], answer.json()
    # Without a limit five processes of 1,000 descriptors take over 1 GiB of the host's memory.
    assert max(seen) - before < 256 * MIB
    assert answered > 0
    assert is_usable(as_alice, street[0])


def test_burning_the_cpu_and_the_kernels_counters_of_a_uid_hurts_nobody(
    street: tuple[str, str], as_alice: Api
) -> None:
    for argv in (attacks.CPU_BURNER, attacks.KERNEL_HOG):
        answer, answered = attacked(as_alice, street, argv)
        assert answer.status_code == 200, answer.content
        assert answered > 0
    told = answer.json()["stdout"]
    assert "inotify_init" in told
    assert "Too many open files" in told or "Disk quota exceeded" in told
    # The neighbour has another uid, and so the kernel's whole allowance.
    watches = "import ctypes, sys; sys.exit(ctypes.CDLL(None).inotify_init1(0) < 0)"
    assert (
        as_alice.post(f"/v1/sandboxes/{street[1]}/exec", {"argv": ["python3", "-c", watches]}).json()[
            "exit_code"
        ]
        == 0
    )
    assert is_usable(as_alice, street[0])


def test_what_the_kernel_counts_for_a_uid_has_a_limit_inside(street: tuple[str, str], as_alice: Api) -> None:
    text = exec_in(as_alice, street[0], "cat /proc/self/limits; cat /proc/sys/net/ipv4/tcp_wmem; nice")[
        "stdout"
    ]
    limits = {line[:25].strip(): line[25:].split()[:2] for line in text.splitlines()}
    assert limits["Max open files"] == ["1024", "4096"]
    assert limits["Max core file size"] == ["0", "0"]
    assert limits["Max file size"] == [str(2048 * MIB)] * 2
    assert limits["Max pending signals"] == ["4096", "4096"]
    assert limits["Max msgqueue size"] == ["819200", "819200"]
    assert limits["Max locked memory"] == [str(8 * MIB)] * 2
    assert limits["Max realtime priority"] == ["0", "0"]
    assert text.splitlines()[-2].split() == ["4096", "16384", "262144"]
    assert text.splitlines()[-1] == "10"
    assert uid_of(as_alice, street[0]) != uid_of(as_alice, street[1])
