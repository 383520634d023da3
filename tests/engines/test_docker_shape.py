"""The shape of a container, read by `docker inspect` and probed from inside (SECURITY 5.1, 5.2, 5.6)."""

from __future__ import annotations

from typing import Any

import pytest

from e2a.core.errors import EngineError
from sandboxes.engines.base import SandboxSpec
from sandboxes.engines.docker import DockerConnection, DockerEngine
from tests.engines.conftest import SpecMaker, Starter
from tests.engines.inside import ask, run

MIB = 1024 * 1024


@pytest.fixture
def spec(docker_engine: DockerEngine, make_spec: SpecMaker, started: Starter) -> SandboxSpec:
    made = make_spec(memory_mib=256, cpu=0.5, disk_mib=64, pids=64, shm_mib=32, uid=10_017, gid=10_017)
    started(docker_engine, made)
    return made


@pytest.fixture
def inspected(spec: SandboxSpec, docker_engine: DockerEngine, connection: DockerConnection) -> dict[str, Any]:
    state = docker_engine.inspect(spec.sandbox_id, 1)
    assert state is not None
    found: dict[str, Any] = connection.run(
        "inspect", lambda client: client.inspect_container(state.container_id)
    )
    return found


def test_5_1_the_container_has_no_privilege_no_device_and_no_way_to_the_host(
    inspected: dict[str, Any],
) -> None:
    host = inspected["HostConfig"]
    assert host["CapDrop"] == ["ALL"]
    assert sorted(host["CapAdd"]) == ["KILL", "SETGID", "SETUID"]
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert host["ReadonlyRootfs"] is True
    assert host["Privileged"] is False
    assert host["Init"] is False
    assert host["NetworkMode"] == "none"
    assert inspected["Config"]["NetworkDisabled"] is True
    assert (host["PidMode"], host["UTSMode"], host["UsernsMode"]) == ("", "", "")
    assert (host["IpcMode"], host["CgroupnsMode"]) == ("private", "private")
    assert not host["Devices"]
    assert not host["DeviceRequests"]
    assert not host["DeviceCgroupRules"]
    assert not host["PortBindings"]
    assert not host["Binds"]
    assert not host["VolumesFrom"]
    assert host["RestartPolicy"]["Name"] == "no"
    assert host["Runtime"] == "runc"
    assert inspected["AppArmorProfile"] in {"", "docker-default"}


def test_5_1_only_the_sandboxs_own_folders_are_mounted(inspected: dict[str, Any], spec: SandboxSpec) -> None:
    mounts = {
        mount["Destination"]: (mount["Source"], mount["RW"], mount["Propagation"])
        for mount in inspected["Mounts"]
    }
    folder = str(spec.folder)
    assert mounts == {
        "/run/e2a/guest": (f"{folder}/guest", True, "rprivate"),
        "/run/e2a/host": (f"{folder}/host", False, "rprivate"),
        "/etc/hosts": (f"{folder}/host/hosts", False, "rprivate"),
        "/workspace": (f"{folder}/disk/workspace", True, "rprivate"),
        "/home/agent": (f"{folder}/disk/home", True, "rprivate"),
        "/tmp": (f"{folder}/disk/tmp", True, "rprivate"),
    }


def test_5_2_every_limit_is_set(inspected: dict[str, Any]) -> None:
    host = inspected["HostConfig"]
    assert host["Memory"] == host["MemorySwap"] == 256 * MIB
    assert host["NanoCpus"] == 500_000_000
    assert host["PidsLimit"] == 64
    assert host["ShmSize"] == 32 * MIB
    assert host["OomScoreAdj"] > 0
    assert host["OomKillDisable"] is not True
    assert host["LogConfig"]["Type"] == "none"
    limits = {limit["Name"]: (limit["Soft"], limit["Hard"]) for limit in host["Ulimits"]}
    assert limits == {
        "core": (0, 0),
        "nofile": (1024, 4096),
        "fsize": (64 * MIB, 64 * MIB),
        "memlock": (8 * MIB, 8 * MIB),
        "msgqueue": (819_200, 819_200),
        "sigpending": (4096, 4096),
    }
    assert set(host["Sysctls"]) == {"net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem"}


def test_5_10_the_labels_say_whose_it_is_and_name_no_tenant(
    inspected: dict[str, Any], spec: SandboxSpec
) -> None:
    labels = {
        name: value
        for name, value in inspected["Config"]["Labels"].items()
        if name.startswith("e2a.") and name != "e2a.template"
    }
    assert labels == {
        "e2a.sandbox": spec.sandbox_id,
        "e2a.instance": spec.instance,
        "e2a.generation": "1",
    }
    assert inspected["Name"] == f"/e2a-{spec.instance}-{spec.sandbox_id.replace('_', '-')}-g1"


def test_5_1_a_command_inside_has_no_capability_and_can_gain_none(spec: SandboxSpec) -> None:
    status = dict(
        line.split(":\t", 1)
        for line in run(spec, "cat /proc/self/status").output.splitlines()
        if ":\t" in line
    )
    assert (int(status["CapEff"], 16), int(status["CapPrm"], 16), int(status["CapAmb"], 16)) == (0, 0, 0)
    assert status["CapInh"] == "0" * 16
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert status["Uid"].split() == ["10017"] * 4
    assert status["Gid"].split() == ["10017"] * 4
    assert set(status["Groups"].split()) <= {"10017"}
    assert run(spec, "find / -xdev -perm /6000 -type f 2>/dev/null").output == ""
    assert run(spec, "id -un; echo ~").output == "agent\n/home/agent\n"


def test_5_6_there_is_no_network_but_loopback(spec: SandboxSpec) -> None:
    assert run(spec, "ls /sys/class/net").output == "lo\n"
    assert run(spec, "cut -d: -f1 /proc/net/dev | tail -n +3 | tr -d ' '").output == "lo\n"
    assert run(spec, "tail -n +2 /proc/net/route").output == ""
    for address in ("1.1.1.1", "172.17.0.1", "169.254.169.254"):
        probe = f"curl --silent --max-time 3 --output /dev/null http://{address}/"
        assert run(spec, f"{probe} --noproxy '*'").exit_code == 7, address
        # The way out is a proxy on loopback, whose gateway is not there.
        assert run(spec, f"{probe} --write-out '%{{http_code}}'").output == "503", address
    listens = (
        "import socket; server = socket.create_server(('localhost', 0));"
        "socket.create_connection(('localhost', server.getsockname()[1])); print('loopback')"
    )
    assert run(spec, f'python3 -c "{listens}"').output == "loopback\n"


def test_only_the_disk_can_be_written(spec: SandboxSpec) -> None:
    refused = run(
        spec, "for f in / /etc /run /run/e2a/guest /run/e2a/host /opt/e2a /usr; do touch $f/x; done"
    )
    assert refused.output.count("cannot touch") == 7
    assert run(spec, "touch /workspace/x ~/x /tmp/x /var/tmp/y && stat -c %U /tmp/y").output == "agent\n"


def test_neither_neighbours_nor_the_hosts_disks_can_be_seen(spec: SandboxSpec) -> None:
    """A loop device's `backing_file` would name every sandbox of the host."""
    assert run(
        spec, "ls /sys/block /sys/class/block /sys/devices/virtual/block /sys/dev/block"
    ).output.split() == [
        "/sys/block:",
        "/sys/class/block:",
        "/sys/dev/block:",
        "/sys/devices/virtual/block:",
    ]
    assert run(spec, "cat /proc/partitions /proc/diskstats; ls /proc/fs/ext4 /sys/fs/ext4").output == (
        "/proc/fs/ext4:\n\n/sys/fs/ext4:\n"
    )
    assert run(spec, "find / -name backing_file 2>/dev/null").output == ""
    assert run(spec, "ls /proc | grep -c '^[0-9]'").output.strip() != ""
    assert "dockerd" not in run(spec, "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '").output
    devices = "core fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero"
    assert set(run(spec, "ls -A /dev").output.split()) <= set(devices.split())


def test_the_sandbox_cannot_reach_its_own_guests_socket_or_memory(spec: SandboxSpec) -> None:
    probe = (
        "import socket; s = socket.socket(socket.AF_UNIX)\n"
        "try: s.connect('/run/e2a/guest/guest.sock')\n"
        "except PermissionError: print('refused')"
    )
    assert run(spec, f'python3 -c "{probe}"').output == "refused\n"
    for path in ("/proc/1/environ", "/proc/1/mem", "/proc/1/maps", "/proc/1/fd/0"):
        assert "Permission denied" in run(spec, f"cat {path}").output, path


def test_a_parked_sandbox_carries_no_identity(inspected: dict[str, Any], spec: SandboxSpec) -> None:
    """Nothing of a tenant is in what is made before a sandbox is claimed."""
    names = {entry.partition("=")[0] for entry in inspected["Config"]["Env"]}
    assert names <= {"PATH", "HOME", "LANG"}
    assert inspected["Config"]["Hostname"] == "sandbox"
    assert ask(spec, "GET", "/health")[0] == 200


def test_5_3_a_fork_bomb_and_a_memory_hog_end_in_their_own_sandbox(
    spec: SandboxSpec, docker_engine: DockerEngine
) -> None:
    bomb = (
        "import os, time\n"
        "try:\n"
        "  for _ in range(100):\n"
        "    if os.fork() == 0: time.sleep(60)\n"
        "except BlockingIOError: print('contained', flush=True)\n"
        "os.kill(0, 9)"
    )
    assert run(spec, f'python3 -c "{bomb}"').output == "contained\n"
    hog = run(spec, "python3 -c 'held = bytearray(400 * 1024 * 1024)'")
    assert hog.exit_code == 137
    state = docker_engine.inspect(spec.sandbox_id, 1)
    assert state is not None
    assert (state.status, state.oom) == ("running", False)
    assert run(spec, "echo alive").output == "alive\n"


def test_a_runtime_the_daemon_does_not_know_fails_and_never_falls_back(
    docker_engine: DockerEngine, make_spec: SpecMaker, instance: str
) -> None:
    """SECURITY 5.5."""
    with pytest.raises(EngineError) as refused:
        docker_engine.create(make_spec(runtime="no-such-runtime"))
    assert refused.value.retryable is False
    assert docker_engine.list_labelled(instance) == []
    chosen = DockerEngine(
        instance=instance, sandboxes_folder=docker_engine.sandboxes_folder, runtime="no-such-runtime"
    )
    assert chosen.check().available is False
    assert "no-such-runtime" in chosen.check().detail


def test_an_image_that_is_not_built_is_said_so(docker_engine: DockerEngine, make_spec: SpecMaker) -> None:
    with pytest.raises(EngineError) as refused:
        docker_engine.create(make_spec(image="e2a/standard:not-built"))
    assert (refused.value.code, refused.value.retryable) == ("image_missing", False)
