"""One contract for every store: an object is there whole or not at all, whatever its size, in bounded memory."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.conf import settings

from e2a.settings.environment import StoragePlace, read
from sandboxes.storage import Storage, StorageError, storage_of
from tests.sandboxes.object_store import BUCKET, object_store
from tests.sandboxes.running import ROOT, wait_until

MIB = 1024 * 1024


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoragePlace]:
    if request.param == "folder":
        yield StoragePlace(folder=str(tmp_path / "store"))
        return
    with object_store() as found:
        yield found


@pytest.fixture
def store(place: StoragePlace) -> Storage:
    return storage_of(place)


def pieces(count: int, size: int = 100_000) -> Iterator[bytes]:
    for number in range(count):
        yield bytes([number & 255]) * size


def keys(store: Storage) -> list[str]:
    return sorted(found.key for found in store.objects())


@pytest.mark.parametrize("count", [0, 1, 200, 500])
def test_what_is_written_is_read(store: Storage, count: int) -> None:
    assert store.write("ten_a/snp_b.1", pieces(count)) == count * 100_000
    digest = hashlib.sha256()
    for piece in store.read("ten_a/snp_b.1"):
        digest.update(piece)
    assert digest.digest() == hashlib.sha256(b"".join(pieces(count))).digest()
    (found,) = store.objects()
    assert (found.key, found.size) == ("ten_a/snp_b.1", count * 100_000)
    store.delete("ten_a/snp_b.1")
    store.delete("ten_a/snp_b.1")
    assert keys(store) == []


@pytest.mark.parametrize("after", [0, 1, 400])
def test_one_that_breaks_off_is_not_there_and_leaves_nothing(store: Storage, after: int) -> None:
    def broken() -> Iterator[bytes]:
        yield from pieces(after)
        raise RuntimeError("the guest is gone")

    with pytest.raises(RuntimeError, match="the guest is gone"):
        store.write("ten_a/snp_b.1", broken())
    assert keys(store) == []
    assert store.leftovers_remove(older_than_seconds=-1) == 0


def test_one_that_is_missing_is_said_at_once(store: Storage) -> None:
    with pytest.raises(StorageError, match="snp_b"):
        store.read("ten_a/snp_b.1")


def test_memory_is_bounded(store: Storage) -> None:
    store.write("ten_a/warm", pieces(200))
    tracemalloc.start()
    try:
        store.write("ten_a/big", pieces(2000))
        for _ in store.read("ten_a/big"):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # moto runs in this process and holds all of it; a folder holds one piece.
    if isinstance(store, type(storage_of(StoragePlace(folder="/nowhere")))):
        assert peak < 4 * MIB


WRITER = """
import sys, time
import django
django.setup()
from sandboxes.storage import storage_of
from e2a.settings.environment import StoragePlace
def pieces():
    for number in range(450):
        yield bytes(100_000)
    print("written", flush=True)
    time.sleep(600)
    yield b"the end"
storage_of(StoragePlace(**eval(sys.argv[1]))).write("ten_a/snp_b.1", pieces())
"""


def test_a_writer_that_is_killed_leaves_only_what_the_sweep_removes(
    place: StoragePlace, store: Storage
) -> None:
    told = {name: getattr(place, name) for name in place.__dataclass_fields__}
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, repr(told)],
        stdout=subprocess.PIPE, cwd=ROOT, env=os.environ | {"DJANGO_SETTINGS_MODULE": "e2a.settings"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"written\n"
    process.kill()
    process.wait()
    process.stdout.close()
    assert keys(store) == []
    if not place.bucket:  # moto says of every upload that it began in 2010.
        assert store.leftovers_remove(older_than_seconds=3600) == 0
    wait_until(lambda: store.leftovers_remove(older_than_seconds=-1), what="the parts are found")
    assert store.leftovers_remove(older_than_seconds=-1) == 0
    store.write("ten_a/snp_b.1", pieces(3))
    assert keys(store) == ["ten_a/snp_b.1"]


def test_a_store_that_is_away_is_said_without_its_keys() -> None:
    place = StoragePlace(
        bucket=BUCKET,
        endpoint="http://127.0.0.1:9",
        region="x",
        access_key="planted-a",
        secret_key="planted-s",
    )
    with pytest.raises(StorageError) as failed:
        storage_of(place).read("ten_a/x")
    assert "planted" not in failed.value.detail
    assert "planted" not in repr(place)


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("file:///some/folder", StoragePlace(folder="/some/folder")),
        ("s3://bucket", StoragePlace(bucket="bucket", access_key="a", secret_key="s")),
        (
            "s3://bucket/pre/fix?endpoint=https://store.example.com:9000&region=eu-1",
            StoragePlace(
                bucket="bucket", prefix="pre/fix", endpoint="https://store.example.com:9000", region="eu-1",
                access_key="a", secret_key="s",
            ),
        ),
    ],
)  # fmt: skip
def test_the_setting_names_a_folder_or_a_bucket(
    monkeypatch: pytest.MonkeyPatch, url: str, place: StoragePlace
) -> None:
    monkeypatch.setenv("E2A_STORAGE_URL", url)
    monkeypatch.setenv("E2A_STORAGE_ACCESS_KEY", "a")
    monkeypatch.setenv("E2A_STORAGE_SECRET_KEY", "s")
    ours = read(settings.BASE_DIR)
    assert (ours.storage, ours.problems) == (place, ())


@pytest.mark.parametrize(
    "url", ["s3://k:planted@bucket", "gs://bucket", "file://host/x", "s3://b?endpont=x", "x"]
)
def test_a_setting_that_makes_no_sense_is_refused_without_showing_it(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("E2A_STORAGE_URL", url)
    problems = read(settings.BASE_DIR).problems
    assert [check_id for check_id, _ in problems] == ["e2a.E007"]
    assert "planted" not in str(problems)
