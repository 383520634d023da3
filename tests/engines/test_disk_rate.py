"""How fast a sandbox may write its disk: on the real kernel, and what is left behind of the limit."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from sandboxes.engines import disk_rate
from sandboxes.engines.base import SandboxSpec
from sandboxes.engines.docker import DockerConnection, DockerEngine
from tests.engines.conftest import SpecMaker, Starter
from tests.engines.inside import run

MIB = 1024 * 1024
RATE = 16 * MIB
RULES = Path("/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device")


@pytest.fixture
def slow_engine(docker_engine: DockerEngine, sandboxes_folder: Path) -> DockerEngine:
    return DockerEngine(
        instance=docker_engine.instance, sandboxes_folder=sandboxes_folder, disk_write_bytes=RATE
    )


@pytest.fixture
def spec(slow_engine: DockerEngine, make_spec: SpecMaker, started: Starter) -> SandboxSpec:
    made = make_spec(disk_mib=128)
    started(slow_engine, made)
    return made


def device_of(spec: SandboxSpec) -> str:
    device = disk_rate.loop_device(spec.folder / "disk")
    assert device is not None
    return device


def seconds_of(spec: SandboxSpec, command: str) -> float:
    began = time.monotonic()
    done = run(spec, command)
    assert done.exit_code == 0, done.output
    return time.monotonic() - began


@pytest.mark.parametrize("how", ["conv=fsync", "oflag=direct"])
def test_both_ways_to_write_are_slowed(spec: SandboxSpec, how: str) -> None:
    """64 MiB at 16 MiB a second take 4 s, through the page cache and past it; without the limit, well below one."""
    assert seconds_of(spec, f"dd if=/dev/zero of=/workspace/a bs=1M count=64 {how} status=none") > 3.0


def test_the_container_has_the_limit_too(
    spec: SandboxSpec, slow_engine: DockerEngine, connection: DockerConnection
) -> None:
    state = slow_engine.inspect(spec.sandbox_id, 1)
    assert state is not None
    host = connection.run("inspect", lambda client: client.inspect_container(state.container_id))[
        "HostConfig"
    ]
    number = device_of(spec).partition(":")[2]
    assert host["BlkioDeviceWriteBps"] == [{"Path": f"/dev/loop{number}", "Rate": RATE}]
    assert not host["Devices"]


def test_no_limit_is_left_for_whoever_has_the_device_next(
    spec: SandboxSpec, slow_engine: DockerEngine
) -> None:
    device = device_of(spec)
    slow_engine.destroy(spec.sandbox_id, 1)
    assert not RULES.exists() or f"{device} " not in RULES.read_text()


def test_what_a_crash_left_behind_goes_and_what_is_in_use_stays(tmp_path: Path) -> None:
    rules = tmp_path / "cgroup" / "blkio" / "blkio.throttle.write_bps_device"
    rules.parent.mkdir(parents=True)
    rules.write_text("7:3 1000\n253:0 77\n")
    (tmp_path / "block" / "7:3" / "loop").mkdir(parents=True)
    disk_rate.forget_free_devices(root=tmp_path / "cgroup", block=tmp_path / "block")
    assert rules.read_text() == "7:3 1000\n253:0 77\n"
    os.rmdir(tmp_path / "block" / "7:3" / "loop")
    disk_rate.forget_free_devices(root=tmp_path / "cgroup", block=tmp_path / "block")
    assert rules.read_text() == "7:3 0"  # The kernel takes one rule a write, and keeps the others.


def test_where_it_cannot_be_limited_the_node_says_so(tmp_path: Path) -> None:
    assert not disk_rate.is_possible(root=tmp_path)
    assert not disk_rate.limit_writes("7:3", 1, root=tmp_path)
    (tmp_path / "cgroup.controllers").touch()
    assert disk_rate.is_possible(root=tmp_path)
