"""Kernel calls the standard library has no name for, and walks over /proc.

The C modules behind the standard library (`_ctypes`, `_socket`, `_json`, `_struct`) are imported directly
all over the guest: their Python wrappers pull in enum, re and collections, which cost 1.5 MiB and 14 ms in
every sandbox (measured).
"""

import _ctypes
import os

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

_program: str = None  # type: ignore[assignment] # As dlopen(NULL): what this process has loaded.
_prctl = _ctypes.dlsym(_ctypes.dlopen(_program, 0), "prctl")


class _Int(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "i"


class _Call(_ctypes.CFuncPtr):
    """A call whose errno `_ctypes.get_errno` tells; what the ctypes package would make of it."""

    _flags_ = 1 | 8  # FUNCFLAG_CDECL, FUNCFLAG_USE_ERRNO
    _restype_ = _Int


inotify_init = _Call(_ctypes.dlsym(_ctypes.dlopen(_program, 0), "inotify_init1"))
inotify_add_watch = _Call(_ctypes.dlsym(_ctypes.dlopen(_program, 0), "inotify_add_watch"))
inotify_rm_watch = _Call(_ctypes.dlsym(_ctypes.dlopen(_program, 0), "inotify_rm_watch"))


def prctl(option: int, value: int) -> None:
    """Set one process attribute; raises OSError when the kernel refuses."""
    if _ctypes.call_function(_prctl, (option, value, 0, 0, 0)) != 0:
        raise OSError(f"prctl {option} was refused")


def raise_oom_score(score: int) -> None:
    """Make this process and what it starts a likelier victim than PID 1; never lowers. Call before dropping
    root.
    """
    path = "/proc/self/oom_score_adj"
    try:
        with open(path, "rb") as current:
            if int(current.read()) >= score:
                return
        with open(path, "wb") as wanted:
            wanted.write(b"%d" % score)
    except OSError:
        return  # A kernel without the file (gVisor) has no such choice to make.


def parents() -> dict[int, int]:
    """Return {pid: parent pid} of every visible process. Costs about 12 µs a process."""
    found: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        parent = parent_of(int(name))
        if parent is not None:
            found[int(name)] = parent
    return found


def parent_of(pid: int) -> int | None:
    """Return the parent of a process; None when it is gone."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    except OSError:
        return None
    try:
        text = os.read(fd, 1024)
    except OSError:
        return None
    finally:
        os.close(fd)
    # The command's name may hold spaces and parentheses: fields are counted from the last one.
    return int(text[text.rindex(b")") + 2 :].split(None, 2)[1])


def descendants(root: int) -> list[int]:
    """Return all processes below `root`, nearest first; `root` itself is not in it."""
    below: dict[int, list[int]] = {}
    for pid, parent in parents().items():
        below.setdefault(parent, []).append(pid)
    found = list(below.get(root, ()))
    for pid in found:  # Grows while it is walked: breadth first.
        found.extend(below.get(pid, ()))
    return found


def signal_all(pids: list[int], number: int) -> int:
    """Send a signal to each; return how many still existed."""
    reached = 0
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue
        reached += 1
    return reached
