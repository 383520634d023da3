"""The folder that a sandbox owns on its host, who may change it, and what is mounted in it.

    <data>/sandboxes/<sandbox id>/       0700
        record.json   which generation of which instance owns it (written first)
        guest/        the guest's socket; a 1 MiB tmpfs, mounted read-write at /run/e2a/guest
        host/         what the host offers, mounted read-only at /run/e2a/host: egress socket, passwd, hosts
        disk.img      the sparse ext4 image (`loop_disk`)
        disk/         where it is mounted; its folders become /workspace, /home/agent and /tmp inside

Nothing here follows a symlink that a sandbox could have planted: a sandbox can write only below `guest/`
(root of the sandbox) and `disk/` (its uid), and the host opens nothing below those but by `O_NOFOLLOW`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from e2a.core.errors import EngineError
from sandboxes.engines.base import SANDBOX_ID, Leftover
from sandboxes.engines.disk_rate import limit_writes, loop_device

GUEST_TMPFS_OPTIONS = "size=1m,nr_inodes=256,mode=0755,nosuid,nodev,noexec"
LOCK_SECONDS = 30.0
COMMAND_SECONDS = 20.0
LAST_OUTPUT_BYTES = 16 * 1024
LAST_OUTPUT_NAME = "last_output"
PRINTED_BYTES = 64 * 1024
PRINTED_NAME = "printed"


@dataclass(frozen=True, slots=True)
class Record:
    """Who owns a folder. Kept as a file so that it is known after a crash, without the database."""

    sandbox_id: str
    instance: str
    generation: int
    uid: int
    gid: int


class SandboxFolder:
    """One sandbox's folder. Every change is made under `locked()`, which holds between processes too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.guest = path / "guest"
        self.host = path / "host"
        self.disk_image = path / "disk.img"
        self.disk = path / "disk"
        self._record = path / "record.json"

    @contextmanager
    def locked(self, *, make: bool) -> Iterator[bool]:
        """Hold the folder alone. Yields False, holding nothing, when it does not exist and `make` is false.

        EngineError (retryable) after 30 s, and in place of any OSError inside. The lock is on the folder
        itself, so a crash leaves none behind; a holder that removed the folder is noticed by its inode.
        """
        deadline = time.monotonic() + LOCK_SECONDS
        handle = -1
        try:
            while True:
                if make:
                    self.path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
                    self.path.mkdir(mode=0o700, exist_ok=True)
                try:
                    handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                except FileNotFoundError:
                    if make:
                        continue
                    yield False
                    return
                self._lock(handle, deadline)
                if _same_folder(handle, self.path):
                    yield True
                    return
                os.close(handle)
                handle = -1
        except OSError as error:
            raise EngineError(f"{self.path}: {error.strerror or error}", retryable=True) from error
        finally:
            if handle >= 0:
                os.close(handle)

    def _lock(self, handle: int, deadline: float) -> None:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    detail = f"the folder of {self.path.name} is still locked after {LOCK_SECONDS:g} s"
                    raise EngineError(detail, retryable=True) from None
                time.sleep(0.005)
            else:
                return

    def record(self) -> Record | None:
        """Who owns the folder; None when nobody wrote it down (a crash before it was made, or no folder)."""
        try:
            return Record(**json.loads(self._record.read_text()))
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
            return None

    def predecessor(self, record: Record) -> Record | None:
        """The older generation whose place `record` takes; None when the folder is free, or its own already.

        EngineError when the folder is a newer generation's, another instance's, or made for another uid.
        """
        owner = self.record()
        if owner is None or owner == record:
            return None
        if owner.instance != record.instance or owner.generation >= record.generation:
            raise EngineError(f"the folder of {record.sandbox_id} is taken by {owner}")
        return owner

    def belongs_up_to(self, instance: str, generation: int) -> bool:
        """Whether `destroy` of a generation may remove the folder: it is its own, an older one's or nobody's.

        EngineError when it is another instance's.
        """
        owner = self.record()
        if owner is not None and owner.instance != instance:
            raise EngineError(f"{self.path} belongs to the instance {owner.instance}, not to {instance}")
        return owner is None or owner.generation <= generation

    def claim(self, record: Record) -> None:
        """Write down who owns the folder, in one step."""
        fresh = self._record.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(record)))
        fresh.replace(self._record)

    def prepare(self, record: Record, *, tmpfs: bool) -> None:
        """Make `guest/` and `host/`. `tmpfs` needs root; without it the guest's folder is the host's disk."""
        self.guest.mkdir(mode=0o755, exist_ok=True)
        self.host.mkdir(mode=0o755, exist_ok=True)
        if tmpfs and not os.path.ismount(self.guest):
            run_host_command("mount", "-t", "tmpfs", "-o", GUEST_TMPFS_OPTIONS, "e2a-guest", str(self.guest))
        for name, text in files_of_etc(record.uid, record.gid).items():
            fresh = self.host / f".{name}.new"
            fresh.write_text(text)
            fresh.chmod(0o644)
            fresh.replace(self.host / name)

    def mounts(self) -> tuple[str, ...]:
        """The mount points inside the folder, deepest first, as the kernel has them now."""
        prefix = str(self.path.resolve()) + "/"
        return tuple(sorted((point for point in mount_points() if point.startswith(prefix)), reverse=True))

    def clear(self) -> None:
        """Unmount and delete all that is in the folder, for the next generation, which holds the lock."""
        self._unmount_all()
        for entry in self.path.iterdir():
            _delete(entry)

    def remove(self) -> None:
        """Unmount everything inside and delete the folder. EngineError (retryable) when something stays."""
        self._unmount_all()
        _delete(self.path)

    def _unmount_all(self) -> None:
        for point in self.mounts():
            device = loop_device(Path(point))
            unmount(point)
            if device is not None:
                limit_writes(device, 0)  # Not before: what is written back now is the neighbours' matter too.
        if still := self.mounts():
            raise EngineError(f"still mounted: {', '.join(still)}", retryable=True)

    def age_seconds(self) -> float:
        """Seconds since something was last made in the folder; 0 when it is gone."""
        try:
            return max(0.0, time.time() - self.path.stat().st_mtime)
        except FileNotFoundError:
            return 0.0

    def last_output(self) -> str:
        """What was printed last, then the guest's own last words, which tell why it ended."""
        return self.printed() + _text(_tail_of(self.guest / LAST_OUTPUT_NAME, LAST_OUTPUT_BYTES))

    def printed(self) -> str:
        """The end of what the sandbox's processes printed: the ring that the guest keeps (`guest/tail.py`)."""
        data = _tail_of(self.guest / PRINTED_NAME, 8 + PRINTED_BYTES)
        total, ring = int.from_bytes(data[:8], "big"), data[8:]
        if total > len(ring):
            at = total % PRINTED_BYTES
            ring = ring[at:] + ring[:at]
        return _text(ring[:total])


def _tail_of(path: Path, size: int) -> bytes:
    """The end of a file that a sandbox may have made: a plain file or nothing, never trusted, never waited for."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return b""
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return b""
        file.seek(max(0, os.fstat(handle).st_size - size))
        return file.read(size)


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


def files_of_etc(uid: int, gid: int) -> dict[str, str]:
    """A sandbox's /etc/passwd and /etc/group (links of the image: each slot has a uid) and /etc/hosts."""
    return {
        "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
        "passwd": (
            "root:x:0:0:root:/root:/usr/sbin/nologin\n"
            f"agent:x:{uid}:{gid}:agent:/home/agent:/bin/bash\n"
            "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
        ),
        "group": f"root:x:0:\nagent:x:{gid}:\nnogroup:x:65534:\n",
    }


def sandbox_folder(parent: Path, sandbox_id: str) -> SandboxFolder:
    """The folder of one sandbox. Raises EngineError when the id could name a path outside of `parent`."""
    if not SANDBOX_ID.fullmatch(sandbox_id):
        raise EngineError(f"{sandbox_id!r} is not a sandbox id")
    return SandboxFolder(parent / sandbox_id)


def sandbox_folders(parent: Path) -> list[SandboxFolder]:
    """Every sandbox folder of this host, in any state."""
    if not parent.is_dir():
        return []
    return [SandboxFolder(path) for path in sorted(parent.iterdir()) if SANDBOX_ID.fullmatch(path.name)]


def folders_without(owned: Set[tuple[str, int]], parent: Path, instance: str) -> list[Leftover]:
    """The folders that none of the (sandbox id, generation) in `owned` belongs to."""
    found = []
    for folder in sandbox_folders(parent):
        record = folder.record()
        if record and (record.instance != instance or (record.sandbox_id, record.generation) in owned):
            continue
        generation = record.generation if record else None
        found.append(Leftover(folder.path.name, generation, folder.mounts(), folder.age_seconds()))
    return found


def mount_points() -> list[str]:
    """All mount points of this process's mount namespace."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split(" ")[4].encode().decode("unicode_escape") for line in lines]


def unmount(point: str) -> None:
    """Unmount; when something still uses it, detach it so that it goes with its last user."""
    for options in ((), ("--lazy",)):
        if _run("umount", *options, "--", point).returncode == 0:
            return


def run_host_command(*command: str) -> None:
    """Run a tool of the host (mount, mkfs). EngineError with its own words; retryable, since disks fill."""
    done = _run(*command)
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip()
        raise EngineError(f"{command[0]} failed with {done.returncode}: {words}", retryable=True)


def _run(*command: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, capture_output=True, timeout=COMMAND_SECONDS, check=False)
    except FileNotFoundError as error:
        raise EngineError(f"{command[0]} is not installed on this host") from error
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"{command[0]} did not end within {COMMAND_SECONDS:g} s", retryable=True) from error


def has_command(name: str) -> bool:
    """Whether the host has a tool, also where the search path lacks the system folders."""
    return (
        shutil.which(name) is not None or shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin") is not None
    )


def _delete(path: Path) -> None:
    # `rm` and not shutil.rmtree: a tree of any depth that a sandbox made cannot exhaust our stack, and it
    # never crosses into a file system that somebody mounted in between.
    command = ("rm", "-rf", "--one-file-system", "--", str(path))
    done = _run(*command)
    if done.returncode:
        # The gateway may have put the sandbox's way out there meanwhile; it does so once.
        done = _run(*command)
    if done.returncode and os.geteuid() != 0:
        _run("chmod", "-R", "u+rwx", "--", str(path))
        done = _run(*command)
    if done.returncode:
        raise EngineError(f"cannot remove {path}: {done.stderr.decode(errors='replace')}", retryable=True)


def _same_folder(handle: int, path: Path) -> bool:
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    held = os.fstat(handle)
    return (held.st_dev, held.st_ino) == (found.st_dev, found.st_ino)
