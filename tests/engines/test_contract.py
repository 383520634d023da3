"""What every engine promises, asked of each of them: the real Docker daemon, and plain processes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from e2a.core.errors import EngineError
from sandboxes.engines.base import ContainerEvent, Engine, SandboxSpec
from sandboxes.engines.docker import DockerEngine
from sandboxes.engines.host_folders import mount_points
from sandboxes.engines.process import ProcessEngine
from tests.engines.conftest import SpecMaker, Starter
from tests.engines.inside import Ran, ask, run, wait_for


def status(engine: Engine, spec: SandboxSpec) -> str | None:
    state = engine.inspect(spec.sandbox_id, spec.generation)
    return None if state is None else state.status


def test_a_new_sandbox_is_created_then_runs_and_its_guest_answers(
    engine: Engine, make_spec: SpecMaker, started: Starter
) -> None:
    spec = make_spec()
    ref = engine.create(spec)
    assert status(engine, spec) == "created"
    assert ref.adopted is False
    started(engine, spec)
    state = engine.inspect(spec.sandbox_id, 1)
    assert state is not None
    assert (state.status, state.exit_code, state.oom, state.finished_at) == ("running", None, False, None)
    assert state.started_at is not None
    assert run(spec, "echo hello; exit 3") == Ran(3, "hello\n")


def test_create_twice_adopts_the_first_and_start_twice_starts_once(
    engine: Engine, make_spec: SpecMaker, started: Starter
) -> None:
    spec = make_spec()
    first = engine.create(spec)
    again = engine.create(spec)
    assert again.adopted is True
    assert (again.name, again.container_id) == (first.name, first.container_id)
    started(engine, spec)
    before = engine.inspect(spec.sandbox_id, 1)
    engine.start(again)
    assert engine.inspect(spec.sandbox_id, 1) == before
    assert engine.create(spec).adopted is True
    assert run(spec, "pwd").exit_code == 0


def test_what_has_ended_is_never_started_again(
    engine: Engine, make_spec: SpecMaker, started: Starter
) -> None:
    spec = make_spec(lifetime_seconds=1)
    ref = started(engine, spec)
    wait_for(lambda: status(engine, spec) == "exited", "the guest's own end at its deadline")
    with pytest.raises(EngineError) as refused:
        engine.start(ref)
    assert (refused.value.code, refused.value.retryable) == ("not_running", False)
    state = engine.inspect(spec.sandbox_id, 1)
    assert state is not None
    assert state.exit_code is not None
    assert state.finished_at is not None


def test_a_guest_that_cannot_start_leaves_its_exit_code_and_its_last_words(
    engine: Engine, make_spec: SpecMaker
) -> None:
    spec = make_spec(lifetime_seconds=0)
    engine.start(engine.create(spec))
    wait_for(lambda: status(engine, spec) == "exited", "the guest's refusal")
    state = engine.inspect(spec.sandbox_id, 1)
    assert state is not None
    assert (state.exit_code, state.oom) == (2, False)
    assert "--lifetime" in engine.last_output(spec.sandbox_id)
    engine.destroy(spec.sandbox_id, 1)
    assert engine.last_output(spec.sandbox_id) == ""


def test_a_paused_sandbox_does_nothing_until_it_is_resumed(
    engine: Engine, make_spec: SpecMaker, started: Starter
) -> None:
    spec = make_spec()
    started(engine, spec)
    for _twice in range(2):
        engine.pause(spec.sandbox_id, 1)
        assert status(engine, spec) == "paused"
    for _twice in range(2):
        engine.resume(spec.sandbox_id, 1)
        assert status(engine, spec) == "running"
    assert ask(spec, "GET", "/health")[0] == 200


def test_pause_of_what_does_not_run_is_refused(engine: Engine, make_spec: SpecMaker) -> None:
    spec = make_spec()
    with pytest.raises(EngineError) as missing:
        engine.pause(spec.sandbox_id, 1)
    assert missing.value.code == "no_such_sandbox"
    engine.create(spec)
    for turn in (engine.pause, engine.resume):
        with pytest.raises(EngineError) as idle:
            turn(spec.sandbox_id, 1)
        assert idle.value.code == "not_running"


@pytest.mark.parametrize("reached", ["nothing", "created", "running", "paused", "exited"])
def test_destroy_leaves_nothing_from_any_state_and_may_be_repeated(
    engine: Engine, make_spec: SpecMaker, started: Starter, reached: str
) -> None:
    spec = make_spec(lifetime_seconds=1 if reached == "exited" else 300)
    if reached == "created":
        engine.create(spec)
    elif reached != "nothing":
        started(engine, spec)
    if reached == "paused":
        engine.pause(spec.sandbox_id, 1)
    if reached == "exited":
        wait_for(lambda: status(engine, spec) == "exited", "the guest's own end")
    for _twice in range(2):
        engine.destroy(spec.sandbox_id, 1)
        assert engine.inspect(spec.sandbox_id, 1) is None
        assert not spec.folder.exists()
    assert [point for point in mount_points() if spec.sandbox_id in point] == []
    assert engine.leftovers() == []


def test_ten_threads_may_destroy_the_same_sandbox(
    engine: Engine, make_spec: SpecMaker, started: Starter
) -> None:
    """SECURITY 5.11: one teardown, ten answers."""
    spec = make_spec()
    started(engine, spec)
    barrier = threading.Barrier(10)

    def destroy() -> None:
        barrier.wait(timeout=10)
        engine.destroy(spec.sandbox_id, 1)

    with ThreadPoolExecutor(10) as pool:
        for done in [pool.submit(destroy) for _ in range(10)]:
            done.result(timeout=30)
    assert engine.inspect(spec.sandbox_id, 1) is None
    assert not spec.folder.exists()


def test_two_threads_that_create_the_same_sandbox_make_one(engine: Engine, make_spec: SpecMaker) -> None:
    spec = make_spec()
    barrier = threading.Barrier(4)

    def create() -> bool:
        barrier.wait(timeout=10)
        return engine.create(spec).adopted

    with ThreadPoolExecutor(4) as pool:
        made = [job.result(timeout=30) for job in [pool.submit(create) for _ in range(4)]]
    assert sorted(made) == [False, True, True, True]
    assert len(engine.list_labelled(spec.instance)) == 1


def test_a_race_of_create_and_destroy_leaves_all_or_nothing(engine: Engine, make_spec: SpecMaker) -> None:
    spec = make_spec()
    with ThreadPoolExecutor(2) as pool:
        for _round in range(5):
            made, gone = pool.submit(engine.create, spec), pool.submit(engine.destroy, spec.sandbox_id, 1)
            made.result(timeout=30)
            gone.result(timeout=30)
            assert spec.folder.exists() == (engine.inspect(spec.sandbox_id, 1) is not None)
    engine.destroy(spec.sandbox_id, 1)
    assert not spec.folder.exists()


def test_a_newer_generation_replaces_an_older_one_which_cannot_harm_it(
    engine: Engine, make_spec: SpecMaker, started: Starter
) -> None:
    old = make_spec()
    started(engine, old)
    run(old, "echo old > mark")
    new = make_spec(sandbox_id=old.sandbox_id, generation=2, uid=10_002, gid=10_002)
    started(engine, new)
    assert engine.inspect(old.sandbox_id, 1) is None
    assert run(new, "ls").output == ""
    with pytest.raises(EngineError) as refused:
        engine.create(old)
    assert refused.value.retryable is False
    engine.destroy(old.sandbox_id, 1)
    assert run(new, "echo alive").output == "alive\n"


def test_list_labelled_sees_every_state_of_its_own_instance_only(
    engine: Engine, make_spec: SpecMaker, started: Starter
) -> None:
    parked, running = make_spec(), make_spec()
    engine.create(parked)
    started(engine, running)
    seen = {
        state.sandbox_id: (state.status, state.generation) for state in engine.list_labelled(parked.instance)
    }
    assert seen == {parked.sandbox_id: ("created", 1), running.sandbox_id: ("running", 1)}
    assert engine.list_labelled("another-instance") == []


def test_another_instance_cannot_see_touch_or_take_a_sandbox(
    engine: Engine, make_spec: SpecMaker, started: Starter, instance: str
) -> None:
    """SECURITY 5.10: an engine of another install, even on the same folder, leaves it alone."""
    spec = make_spec()
    started(engine, spec)
    kind = DockerEngine if isinstance(engine, DockerEngine) else ProcessEngine
    stranger = kind(instance="stranger", sandboxes_folder=spec.folder.parent)
    assert stranger.inspect(spec.sandbox_id, 1) is None
    assert stranger.leftovers() == []
    with pytest.raises(EngineError):
        stranger.create(make_spec(sandbox_id=spec.sandbox_id, instance="stranger"))
    with pytest.raises(EngineError):
        stranger.destroy(spec.sandbox_id, 1)
    assert run(spec, "echo alive").output == "alive\n"


def test_the_death_of_a_guest_is_an_event_with_its_exit_code(
    engine: Engine, make_spec: SpecMaker, started: Starter
) -> None:
    spec = make_spec(lifetime_seconds=2)
    stream = engine.events(spec.instance)
    seen: list[ContainerEvent] = []
    reader = threading.Thread(target=lambda: seen.extend(stream))
    reader.start()
    started(engine, spec)
    wait_for(lambda: any(event.kind == "died" for event in seen), "the event of its death")
    state = engine.inspect(spec.sandbox_id, 1)
    assert state is not None
    engine.destroy(spec.sandbox_id, 1)
    wait_for(lambda: any(event.kind == "destroyed" for event in seen), "the event of its removal")
    stream.close()
    reader.join(timeout=10)
    assert not reader.is_alive()
    assert [event.kind for event in seen] == ["created", "started", "died", "destroyed"]
    assert {(event.sandbox_id, event.generation) for event in seen} == {(spec.sandbox_id, 1)}
    assert [event.exit_code for event in seen] == [None, None, state.exit_code, None]


def test_a_folder_that_no_container_belongs_to_is_left_over_until_destroyed(
    engine: Engine, make_spec: SpecMaker
) -> None:
    """A crash right after the folder was made, or right after it was claimed."""
    owned, bare = make_spec(), make_spec()
    engine.create(owned)
    bare.folder.mkdir()
    left = engine.leftovers()
    assert [(item.sandbox_id, item.generation) for item in left] == [(bare.sandbox_id, None)]
    assert 0 <= left[0].age_seconds < 60
    engine.destroy(bare.sandbox_id, 1)
    assert engine.leftovers() == []
    assert not bare.folder.exists()
    assert engine.inspect(owned.sandbox_id, 1) is not None


@pytest.mark.parametrize("sandbox_id", ["../etc", "sbx_../x", "sbx_", "sbx_a/b", ""])
def test_an_id_that_could_be_a_path_is_refused(engine: Engine, sandbox_id: str) -> None:
    with pytest.raises(EngineError):
        engine.destroy(sandbox_id, 1)


def test_check_says_what_runs_and_which_limits_are_soft(engine: Engine) -> None:
    found = engine.check()
    assert found.available is True
    assert engine.name in found.version.lower()
    if isinstance(engine, ProcessEngine):
        assert any("NO ISOLATION" in sentence for sentence in found.soft_limits)
    else:
        assert found.soft_limits == ()
