"""The shape of every sandbox's container, as the JSON of Docker's own API. Pure: a test reads it like a list.

The numbered requirements are SECURITY.md 5.1 and 5.2; `tests/engines/test_docker_shape.py` holds each one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sandboxes.engines.base import SandboxSpec
from sandboxes.engines.host_folders import LAST_OUTPUT_NAME, SandboxFolder

LABEL_SANDBOX = "e2a.sandbox"
LABEL_INSTANCE = "e2a.instance"
LABEL_GENERATION = "e2a.generation"

# The file and not its folder: 8 ms and 0.8 MiB less (PROTOCOL.md of the guest).
GUEST_COMMAND = ("/usr/bin/python3", "-I", "-S", "-B", "/opt/e2a/guest/__main__.py")
# Docker keeps no log of a sandbox, so the words of a guest that fails go where the host can read them after
# its end: a file of the guest's 1 MiB folder, which the sandbox's uid cannot write. The shell ends by `exec`.
KEEPING_LAST_WORDS = ("/bin/sh", "-c", f'exec "$@" 2>/run/e2a/guest/{LAST_OUTPUT_NAME}', "guest")
GUEST_SOCKET = "/run/e2a/guest/guest.sock"
EGRESS_SOCKET = "/run/e2a/host/egress.sock"
WORKSPACE = "/workspace"
HOME = "/home/agent"

# PID 1 changes to the sandbox's uid and signals it; it needs nothing else, and its children get nothing.
GUEST_CAPABILITIES = ("KILL", "SETGID", "SETUID")

# Setting MaskedPaths replaces Docker's own list, so its list is the first part. The second part hides the
# host's block devices: the `backing_file` of a loop device names a neighbour, and their number counts them.
MASKED_PATHS = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/firmware",
    "/sys/devices/virtual/powercap",
    "/proc/diskstats", "/proc/fs/ext4", "/proc/fs/jbd2", "/proc/partitions", "/sys/block", "/sys/class/block",
    "/sys/dev/block", "/sys/devices/virtual/block", "/sys/fs/ext4",
)  # fmt: skip
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

# The guest is spared when memory runs out (commands raise their own score), the host's services before both.
OOM_SCORE_ADJ = 300
OPEN_FILES_SOFT = 1024
OPEN_FILES_HARD = 4096
# What the kernel counts for each uid. A slot has a uid of its own, so the host's own numbers (a thousandth of
# its memory) are neither shared nor needed.
PENDING_SIGNALS = 4096
MESSAGE_QUEUE_BYTES = 819_200
LOCKED_BYTES = 8 * 1024 * 1024
# Buffers of TCP sockets: a pair over loopback took 1.1 MiB that cgroup v1 counts for nobody, up to the host's own
# `tcp_mem`. With these it takes 0.03 once `limit_sockets` has set a limit, and a stream still runs at GB/s.
SOCKET_SYSCTLS = {"net.ipv4.tcp_rmem": "4096 32768 262144", "net.ipv4.tcp_wmem": "4096 16384 262144"}


def container_config(
    spec: SandboxSpec, folder: SandboxFolder, *, guest_user: tuple[int, int] | None
) -> dict[str, Any]:
    """The body of `POST /containers/create`.

    `guest_user` is None on a host where PID 1 is root with three capabilities and drops to the slot's uid;
    else everything inside, PID 1 too, runs as that uid and gid without any capability.
    """
    uid, gid = guest_user or (spec.uid, spec.gid)
    arguments = ["--listen", GUEST_SOCKET, "--uid", str(uid), "--gid", str(gid), "--workspace", WORKSPACE]
    arguments += ["--home", HOME, "--keep-environment", "--egress", EGRESS_SOCKET]
    if guest_user is not None:
        arguments += ["--no-isolation"]
    if spec.lifetime_seconds is not None:
        arguments += ["--lifetime", str(spec.lifetime_seconds)]
    return {
        "Image": spec.image,
        "Hostname": "sandbox",
        "User": "0:0" if guest_user is None else f"{uid}:{gid}",
        "Entrypoint": [*KEEPING_LAST_WORDS, *GUEST_COMMAND],
        "Cmd": arguments,
        "WorkingDir": "/",
        # Stronger than "none" alone: Docker makes no network sandbox of its own either, which takes 100 ms
        # off the start. Loopback is there all the same. It writes no /etc/hosts then, so we mount ours.
        "NetworkDisabled": True,
        "AttachStdin": False,
        "AttachStdout": False,
        "AttachStderr": False,
        "Tty": False,
        "OpenStdin": False,
        "Labels": {
            LABEL_SANDBOX: spec.sandbox_id,
            LABEL_INSTANCE: spec.instance,
            LABEL_GENERATION: str(spec.generation),
        },
        "HostConfig": _host_config(spec, folder, capabilities=() if guest_user else GUEST_CAPABILITIES),
    }


def _host_config(
    spec: SandboxSpec, folder: SandboxFolder, *, capabilities: tuple[str, ...]
) -> dict[str, Any]:
    memory = spec.memory_mib * 1024 * 1024
    disk = spec.disk_mib * 1024 * 1024
    return {
        "NetworkMode": "none",
        "ReadonlyRootfs": True,
        "Privileged": False,
        "CapDrop": ["ALL"],
        "CapAdd": list(capabilities),
        "SecurityOpt": ["no-new-privileges"],
        "MaskedPaths": list(MASKED_PATHS),
        "ReadonlyPaths": list(READONLY_PATHS),
        "IpcMode": "private",
        "CgroupnsMode": "private",
        "PidMode": "",
        "UTSMode": "",
        "Runtime": spec.runtime,
        "Init": False,
        "RestartPolicy": {"Name": "no"},
        "LogConfig": {"Type": "none"},
        "Memory": memory,
        "MemorySwap": memory,
        "NanoCpus": round(spec.cpu * 1_000_000_000),
        "PidsLimit": spec.pids,
        "ShmSize": spec.shm_mib * 1024 * 1024,
        "OomScoreAdj": OOM_SCORE_ADJ,
        "Ulimits": [
            {"Name": "core", "Soft": 0, "Hard": 0},
            {"Name": "fsize", "Soft": disk, "Hard": disk},
            {"Name": "memlock", "Soft": LOCKED_BYTES, "Hard": LOCKED_BYTES},
            {"Name": "msgqueue", "Soft": MESSAGE_QUEUE_BYTES, "Hard": MESSAGE_QUEUE_BYTES},
            {"Name": "nofile", "Soft": OPEN_FILES_SOFT, "Hard": OPEN_FILES_HARD},
            {"Name": "sigpending", "Soft": PENDING_SIGNALS, "Hard": PENDING_SIGNALS},
        ],
        "Sysctls": dict(SOCKET_SYSCTLS),
        "Mounts": [
            _bind(folder.guest, "/run/e2a/guest"),
            _bind(folder.host, "/run/e2a/host", read_only=True),
            _bind(folder.host / "hosts", "/etc/hosts", read_only=True),
            _bind(folder.disk / "workspace", WORKSPACE),
            _bind(folder.disk / "home", HOME),
            _bind(folder.disk / "tmp", "/tmp"),  # noqa: S108 the sandbox's own, on its disk
        ],
    }


def _bind(source: Path, target: str, *, read_only: bool = False) -> dict[str, Any]:
    # A `Mounts` entry (unlike `Binds`) is refused when its source is missing: a disk that was not mounted can
    # never be replaced by an empty folder of the host.
    return {
        "Type": "bind",
        "Source": str(source),
        "Target": target,
        "ReadOnly": read_only,
        "BindOptions": {"Propagation": "rprivate"},
    }
