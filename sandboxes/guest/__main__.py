"""Start the guest: `python3 -I -S -B <this folder or file> --listen SOCKET …` (PROTOCOL.md lists the
flags).
"""

import os
import sys

FLAGS = ("listen", "uid", "gid", "workspace", "home", "lifetime", "egress")


def main(arguments: list[str]) -> int:
    """Parse the flags and serve; returns the exit status, 2 for a wrong command line."""
    if not __package__:
        # Only this folder was copied. It becomes a package by hand: on sys.path its modules, or those next
        # to it, could hide the standard library's.
        folder = os.path.dirname(os.path.abspath(__file__))
        sys.path[:] = [place for place in sys.path if os.path.abspath(place) != folder]
        package = type(sys)("e2a_guest")
        package.__path__ = [folder]
        sys.modules["e2a_guest"] = package
        from e2a_guest import linux, runner, server  # type: ignore[import-not-found]
    else:
        from . import linux, runner, server

    options: dict[str, str] = {}
    isolated = True
    keeps_environment = False
    rest = list(arguments)
    while rest:
        name, _, value = rest.pop(0).partition("=")
        if name == "--no-isolation" and not value:
            isolated = False
        elif name == "--keep-environment" and not value:
            keeps_environment = True
        elif name.startswith("--") and name[2:] in FLAGS and (value or rest):
            options[name[2:]] = value or rest.pop(0)
        else:
            return _usage(f"unknown argument {name!r}")
    try:
        uid, gid = int(options.get("uid", "10001")), int(options.get("gid", options.get("uid", "10001")))
        lifetime = float(options["lifetime"]) if "lifetime" in options else None
    except ValueError as error:
        return _usage(str(error))
    if "listen" not in options or "workspace" not in options:
        return _usage("--listen and --workspace are needed")
    # The uid it has already: a container on a host where nobody is root. Commands may then end their own
    # guest.
    if isolated and (uid < 1 or gid < 1 or os.getuid() not in (0, uid)):
        return _usage("isolation needs root, and a uid and gid that are not; or give --no-isolation")
    if lifetime is not None and not lifetime > 0:
        return _usage("--lifetime is a positive number of seconds")
    workspace = os.path.abspath(options["workspace"])
    home = options.get("home", "/home/agent" if isolated else workspace)
    if os.getpid() != 1:
        linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    linux.prctl(linux.PR_SET_DUMPABLE, 0)
    identity = runner.Identity(
        isolated=isolated, uid=uid, gid=gid, workspace=workspace, home=os.path.abspath(home)
    )
    path = os.environ.get("PATH") or "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    status: int = server.Server(
        address=options["listen"],
        identity=identity,
        home=home,
        path=path,
        lifetime=lifetime,
        egress=options.get("egress"),
        own_env=dict(os.environb) if keeps_environment else {},
    ).run()
    return status


def _usage(problem: str) -> int:
    flags = " ".join(f"--{name} …" for name in FLAGS)
    os.write(2, f"e2a guest: {problem}. Flags: {flags} --no-isolation --keep-environment\n".encode())
    return 2


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # Nothing to tidy: the interpreter's own end would cost 5 ms.
