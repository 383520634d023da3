"""What a hostile sandbox does with all its might for some seconds: each ends by itself, and by its exec's time.

Used by `bench.neighbours`, which measures what a neighbour feels, and by tests/sandboxes/test_attacks.py, which
checks what the attacker is told and that nothing of the host is used up.
"""

from __future__ import annotations

from typing import Final

SECONDS: Final = 6
"""How long each goes on."""

_PYTHON: Final = f"import os, socket, sys, time, ctypes\nuntil = time.time() + {SECONDS}\n"


def _python(body: str) -> list[str]:
    return ["python3", "-c", _PYTHON + body]


# `head` is there before the bomb, which may leave no process for it.
FORK_BOMB: Final = [
    "bash",
    "-c",
    "bomb() { bomb | bomb & bomb; }; exec 3> >(head -c 20000); bomb >&3 2>&1 3>&- & exec 3>&-; wait $!; sleep 3",
]
MEMORY_HOG: Final = [
    "bash",
    "-c",
    f"""
    until=$((SECONDS + {SECONDS}))
    while [ $SECONDS -lt $until ]; do python3 -c 'x = bytearray(2 << 30)'; done; exit 137""",
]
DISK_FILL: Final = [
    "bash",
    "-c",
    f"""
    until=$((SECONDS + {SECONDS}))
    while [ $SECONDS -lt $until ]; do
      head -c 8G /dev/zero >/workspace/full 2>/dev/shm/why || cat /dev/shm/why >&2
      [ -n "$KEEP" ] && exit 1; rm -f /workspace/full
    done""",
]
INODE_FILL: Final = _python("""
count = 0
try:
    while True:
        os.makedirs(f"/workspace/i/{count // 5000}", exist_ok=True)
        os.close(os.open(f"/workspace/i/{count // 5000}/{count}", os.O_CREAT | os.O_WRONLY))
        count += 1
        if time.time() > until: break
except OSError as error:
    print(error.strerror)
print(count)
""")
STDOUT_FLOOD: Final = [
    "bash",
    "-c",
    f"timeout {SECONDS} yes 'a line of a flood that nobody wanted to read'; true",
]
SOCKET_HOG: Final = _python("""
kept, errors = [], set()
listener = socket.socket(); listener.bind(("127.0.0.1", 0)); listener.listen(4096)
def fill(one):
    one.setblocking(False)
    try:
        while True: one.send(b"x" * 65536)
    except BlockingIOError: pass
children = []
for _ in range(4):
    if os.fork() == 0: break
while time.time() < until:
    try:
        a = socket.socket(); a.connect(listener.getsockname()); kept.append(a); fill(a)
        b, c = socket.socketpair(); kept += [b, c]; fill(b)
        d = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); d.bind(("127.0.0.1", 0)); kept.append(d)
        for _ in range(40): d.sendto(b"x" * 8192, d.getsockname())
    except OSError as error:
        if error.strerror not in errors:
            errors.add(error.strerror); print(error.strerror, len(kept), flush=True)
        time.sleep(0.05)
""")
CPU_BURNER: Final = [
    "bash",
    "-c",
    f"for i in 1 2 3 4 5 6 7 8; do timeout {SECONDS} sh -c 'while :; do :; done' & done; wait",
]
KERNEL_HOG: Final = _python("""
libc = ctypes.CDLL(None, use_errno=True)
kept, errors = [], set()
def tell(what):
    if what not in errors:
        errors.add(what); print(what, os.strerror(ctypes.get_errno()), len(kept), flush=True)
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
import fcntl
while time.time() < until:
    notify = libc.inotify_init1(0)
    if notify < 0: tell("inotify_init")
    else:
        kept.append(notify)
        if libc.inotify_add_watch(notify, b"/workspace", 0xfff) < 0: tell("inotify_add_watch")
    try:
        r, w = os.pipe(); kept += [r, w]
        fcntl.fcntl(w, 1031, 1 << 20)
        os.set_blocking(w, False); os.write(w, b"x" * (1 << 20))
    except OSError as error:
        ctypes.set_errno(error.errno); tell("pipe")
    if libc.syscall(248, b"user", b"k%d" % len(kept), b"x" * 100, 100, -3) < 0: tell("add_key")
    if len(errors) > 2: time.sleep(0.05)
""")

ALL: Final = {
    "fork bomb": FORK_BOMB,
    "memory hog": MEMORY_HOG,
    "disk fill": DISK_FILL,
    "inode fill": INODE_FILL,
    "stdout flood": STDOUT_FLOOD,
    "socket hog": SOCKET_HOG,
    "CPU burner": CPU_BURNER,
    "inotify, pipe and key hog": KERNEL_HOG,
}
