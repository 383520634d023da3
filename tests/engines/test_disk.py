"""A sandbox's disk ends where its size says, and is its own (SECURITY 5.2, 5.3)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandboxes.engines.base import SandboxSpec
from sandboxes.engines.docker import DockerEngine
from tests.engines.conftest import SpecMaker, Starter
from tests.engines.inside import run, wait_for

MIB = 1024 * 1024


@pytest.fixture
def spec(docker_engine: DockerEngine, make_spec: SpecMaker, started: Starter) -> SandboxSpec:
    made = make_spec(disk_mib=64)
    started(docker_engine, made)
    return made


def host_bytes(spec: SandboxSpec) -> int:
    return os.stat(spec.folder / "disk.img").st_blocks * 512


def test_a_full_disk_is_enospc_and_the_sandbox_lives_on(spec: SandboxSpec) -> None:
    full = run(spec, "head -c 40M /dev/zero > /workspace/a && head -c 40M /dev/zero > /tmp/b")
    assert "No space left on device" in full.output
    assert (
        run(spec, "rm /workspace/a /tmp/b; echo again > /workspace/c; cat /workspace/c").output == "again\n"
    )
    assert host_bytes(spec) < 70 * MIB


def test_workspace_home_and_tmp_share_one_disk_of_the_size_that_was_ordered(spec: SandboxSpec) -> None:
    sizes = run(
        spec, "stat -f -c '%S %b %d' /workspace /home/agent /tmp; stat -c %d /workspace /home/agent /tmp"
    )
    lines = sizes.output.split("\n")
    assert len(set(lines[:3])) == 1
    assert len(set(lines[3:6])) == 1
    block, blocks, _free = map(int, lines[0].split())
    assert 50 * MIB < block * blocks <= 64 * MIB


def test_inodes_end_too(spec: SandboxSpec) -> None:
    made = run(spec, "mkdir /tmp/n && cd /tmp/n && seq 20000 | xargs touch; ls | wc -l")
    assert "No space left on device" in made.output
    count = int(made.output.split()[-1])
    assert 7000 < count <= 64 * MIB // 8192


def test_one_file_cannot_be_larger_than_the_disk(spec: SandboxSpec) -> None:
    """A sparse file too: RLIMIT_FSIZE ends its writer by SIGXFSZ (128 + 25)."""
    assert run(spec, "truncate -s 65M /workspace/hole").exit_code == 153


def test_deleted_space_goes_back_to_the_host(spec: SandboxSpec) -> None:
    run(spec, "head -c 30M /dev/urandom > /workspace/a; sync /workspace/a")
    assert host_bytes(spec) > 30 * MIB
    run(spec, "rm /workspace/a; sync -f /workspace")
    wait_for(lambda: host_bytes(spec) < 8 * MIB, "the host's space back")


def test_the_mounts_take_no_device_and_no_setuid(spec: SandboxSpec) -> None:
    for line in run(
        spec, "grep -E ' /(workspace|home/agent|tmp|run/e2a/guest) ' /proc/self/mounts"
    ).output.splitlines():
        options = line.split()[3].split(",")
        assert {"nosuid", "nodev"} <= set(options), line


def test_the_guests_folder_is_a_tmpfs_of_a_mebibyte(spec: SandboxSpec) -> None:
    found = os.statvfs(spec.folder / "guest")
    assert found.f_frsize * found.f_blocks == MIB
    assert os.path.ismount(spec.folder / "guest")
    assert os.stat(spec.folder / "guest").st_uid == 0


def test_two_sandboxes_share_neither_disk_nor_uid(
    spec: SandboxSpec, docker_engine: DockerEngine, make_spec: SpecMaker, started: Starter
) -> None:
    other = make_spec(uid=10_002, gid=10_002)
    started(docker_engine, other)
    run(spec, "echo mine > /workspace/secret; echo mine > /tmp/secret")
    assert run(other, "ls -A /workspace /tmp /home/agent").output.split() == [
        "/home/agent:",
        "/tmp:",
        "/workspace:",
    ]
    assert run(other, "id -u").output == "10002\n"
    assert os.stat(spec.folder / "disk" / "workspace" / "secret").st_uid == 10_001


def test_nothing_of_a_disk_is_left_on_the_host(spec: SandboxSpec, docker_engine: DockerEngine) -> None:
    def backing_files() -> str:
        return "".join(path.read_text() for path in Path("/sys/block").glob("loop*/loop/backing_file"))

    assert spec.sandbox_id in backing_files()
    docker_engine.destroy(spec.sandbox_id, 1)
    wait_for(lambda: spec.sandbox_id not in backing_files(), "the loop device freed")


def test_other_users_of_the_host_cannot_enter_a_sandboxs_folder(spec: SandboxSpec) -> None:
    assert os.stat(spec.folder).st_mode & 0o777 == 0o700
    assert os.stat(spec.folder / "disk.img").st_mode & 0o777 == 0o600
