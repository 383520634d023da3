"""A runner: forked from PID 1, dropped to the sandbox's uid, and used for one command or file request at a
time.

It is the subreaper of its command. So whatever the command forks, however often, with or without setsid,
stays below this process until it ends; and when the kernel says there are no children left, the runner is
free for the next job. A runner may be killed by what runs in the sandbox (the same uid): PID 1 then adopts
the command.
"""

import _signal  # type: ignore[import-not-found]
import _socket
import _struct
import fcntl
import gc
import os

from . import egress, files, linux, messages, tunnels

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

OOM_SCORE = 500
NICE = 10
_NOT_IGNORED = [
    # The first two Python ignores; the others somebody may have who started us, such as nohup.
    *(_signal.SIGPIPE, _signal.SIGXFSZ, _signal.SIGHUP, _signal.SIGINT, _signal.SIGQUIT, _signal.SIGTERM),
    *(_signal.SIGUSR1, _signal.SIGUSR2, _signal.SIGTSTP, _signal.SIGTTIN, _signal.SIGTTOU, _signal.SIGCHLD),
]


class Identity:
    """Whom commands run as. Without isolation: as whoever started the guest."""

    __slots__ = ("gid", "home", "isolated", "uid", "workspace")

    def __init__(self, *, isolated: bool, uid: int, gid: int, workspace: str, home: str) -> None:
        self.isolated = isolated
        self.uid = uid
        self.gid = gid
        self.workspace = workspace
        self.home = home


def run(sock: _socket.socket, identity: Identity) -> "NoReturn":
    """Become a runner on this socket and never return; call in a fresh child of PID 1."""
    status = 70
    try:
        gc.disable()  # What is garbage here owns descriptors of PID 1, by numbers that are in use again.
        _drop(sock, identity)
        with_null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        while True:
            job = messages.receive_job(sock)
            if job is None:
                status = 0
                break
            operation, arguments, fds = job
            if operation == messages.SPAWN:
                _spawn(sock, with_null, *arguments)  # type: ignore[arg-type]
                _reap_rest(sock)
            elif operation == messages.TUNNEL:
                tunnels.Carrier(sock).run(*arguments, fds[0])  # type: ignore[arg-type, call-arg]
            elif operation == messages.FORWARD:
                egress.Forwarding(sock).serve(*arguments, fds[0])  # type: ignore[arg-type, call-arg]
            else:
                moved = files.serve(fds[0], identity, arguments)
                messages.report(sock, messages.IDLE, *moved)
    except BrokenPipeError:
        status = 0  # PID 1 is gone.
    except BaseException as error:
        os.write(2, f"e2a guest: a runner failed: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(status)


def _drop(sock: _socket.socket, identity: Identity) -> None:
    """Give up every descriptor and right that PID 1 has and a command must not."""
    _signal.set_wakeup_fd(-1)
    for number in (_signal.SIGCHLD, _signal.SIGINT, _signal.SIGTERM):
        _signal.signal(number, _signal.SIG_DFL)
    keep = sock.fileno()
    os.closerange(3, keep)
    os.closerange(keep + 1, 65536)
    if os.getuid() != 0:
        linux.prctl(linux.PR_SET_DUMPABLE, 1)  # Else the file is root's.
    linux.raise_oom_score(OOM_SCORE)
    os.umask(0o022)
    os.chdir("/")
    if identity.isolated:
        # The guest goes first within its sandbox, however many burn the same CPU limit: other sandboxes and the
        # host do not see it, since the kernel shares between containers by their groups.
        os.nice(NICE)
        if os.getuid() == 0:
            os.setgroups([identity.gid])
            os.setresgid(identity.gid, identity.gid, identity.gid)
            os.setresuid(identity.uid, identity.uid, identity.uid)
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    else:
        # No kernel ends a whole pid namespace here, so a guest that is killed must not leave its commands.
        _signal.signal(_signal.SIGTERM, _end_with_guest)
        linux.prctl(linux.PR_SET_PDEATHSIG, _signal.SIGTERM)
    linux.prctl(linux.PR_SET_DUMPABLE, 0)  # Not to be traced or read by commands of the same uid.
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)


def _end_with_guest(number: int, frame: object) -> None:
    for _ in range(20):
        if not linux.signal_all(linux.descendants(os.getpid()), _signal.SIGKILL):
            break
    os._exit(0)


def _spawn(
    sock: _socket.socket,
    null: int,
    argv: list[bytes],
    script: bytes | None,
    folder: bytes,
    env: dict[bytes, bytes],
    with_stdin: bool,
    terminal: tuple[int, int] | None,
) -> None:
    """Start a command in a session of its own, report it, and report its end."""
    mine: list[int] = []  # Ends that the command holds; PID 1 gets the others.
    theirs: list[int] = []
    stage = messages.AT_SETUP
    pid = 0
    try:
        if terminal:
            actions = _open_terminal(terminal, mine, theirs)
        else:
            # Pipes are made here and not by PID 1, so that the command may open its own /dev/stdout.
            out, out_end = os.pipe()
            theirs.append(out)
            mine.append(out_end)
            err, err_end = os.pipe()
            theirs.append(err)
            mine.append(err_end)
            source = null
            if with_stdin:
                source, into = os.pipe()
                mine.append(source)
                theirs.append(into)
            actions = [
                (os.POSIX_SPAWN_DUP2, source, 0),
                (os.POSIX_SPAWN_DUP2, out_end, 1),
                (os.POSIX_SPAWN_DUP2, err_end, 2),
            ]
        if script is not None:
            memory = os.memfd_create("command", os.MFD_CLOEXEC)
            mine.append(memory)
            messages.write_all(memory, script)
            # A number bash has no use for; it opens the file anew, so the offset does not matter.
            actions.append((os.POSIX_SPAWN_DUP2, memory, 250))
            argv = [*argv, b"/dev/fd/250"]
        stage = messages.AT_FOLDER
        os.chdir(folder)
        stage = messages.AT_PROGRAM
        pid = os.posix_spawn(
            _program(argv[0], env),
            argv,
            env,
            file_actions=actions,
            setsid=True,
            setsigmask=[],
            setsigdef=_NOT_IGNORED,
        )
    except (OSError, ValueError) as error:
        messages.report(sock, messages.REFUSED, stage, getattr(error, "errno", None) or 22)
        return
    finally:
        for fd in mine:
            os.close(fd)
        if not pid:
            for fd in theirs:
                os.close(fd)
    messages.report(sock, messages.STARTED, pid, 0, theirs)
    for fd in theirs:
        os.close(fd)
    os.chdir("/")
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            break
    messages.report(sock, messages.ENDED, status, int(not _has_children()))


def _open_terminal(size: tuple[int, int], mine: list[int], theirs: list[int]) -> list[tuple[object, ...]]:
    master, slave = os.openpty()
    theirs.append(master)
    mine.append(slave)
    fcntl.ioctl(slave, 0x5414, _struct.pack("HHHH", size[1], size[0], 0, 0))  # TIOCSWINSZ
    # Opened in the child after setsid: so it becomes its controlling terminal.
    return [
        (os.POSIX_SPAWN_OPEN, 0, os.ttyname(slave), os.O_RDWR, 0),
        (os.POSIX_SPAWN_DUP2, 0, 1),
        (os.POSIX_SPAWN_DUP2, 0, 2),
    ]


def _program(name: bytes, env: dict[bytes, bytes]) -> bytes:
    """Find a program as a shell does, by the PATH the command gets."""
    if b"/" in name:
        return name
    for folder in env.get(b"PATH", os.defpath.encode()).split(b":"):
        path = (folder or b".") + b"/" + name
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
    raise FileNotFoundError(2, "no such program")


def _has_children() -> bool:
    """Reap what has ended; return whether any child, and so any descendant of the command, is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _reap_rest(sock: _socket.socket) -> None:
    """Wait until nothing of the command is left."""
    late = False
    try:
        while True:
            os.waitpid(-1, 0)
            late = True
    except ChildProcessError:
        if late:
            messages.report(sock, messages.IDLE)
