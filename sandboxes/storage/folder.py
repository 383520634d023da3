"""A local folder as a store: written aside, synced, and renamed into place."""

from __future__ import annotations

import datetime as dt
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sandboxes.storage.base import PIECE_BYTES, StorageError, StorageObject

_PART = ".part"


class FolderStorage:
    """Objects are files below `root`; readable by the user of e2a only."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def write(self, key: str, pieces: Iterable[bytes]) -> int:
        place = self._place(key)
        part = place.with_name(f"{place.name}.{secrets.token_hex(6)}{_PART}")
        size = 0
        with _translated(key):
            place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                for piece in pieces:
                    size += len(piece)
                    with _translated(key):
                        view = memoryview(piece)
                        while view:
                            view = view[os.write(fd, view) :]
                with _translated(key):
                    os.fsync(fd)
            finally:
                os.close(fd)
            with _translated(key):
                part.rename(place)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        with _translated(key):
            _sync_folder(place.parent)
        return size

    def read(self, key: str) -> Iterator[bytes]:
        with _translated(key):
            file = self._place(key).open("rb")

        def pieces() -> Iterator[bytes]:
            with file, _translated(key):
                while piece := file.read(PIECE_BYTES):
                    yield piece

        return pieces()

    def delete(self, key: str) -> None:
        place = self._place(key)
        with _translated(key):
            place.unlink(missing_ok=True)
            for part in place.parent.glob(f"{place.name}.*{_PART}"):
                part.unlink(missing_ok=True)

    def objects(self) -> Iterator[StorageObject]:
        for path in self._root.glob("*/*"):
            if path.suffix == _PART or not path.is_file():
                continue
            try:
                found = path.stat()
            except FileNotFoundError:
                continue
            moment = dt.datetime.fromtimestamp(found.st_mtime, dt.UTC)
            yield StorageObject(f"{path.parent.name}/{path.name}", found.st_size, moment)

    def leftovers_remove(self, *, older_than_seconds: float) -> int:
        count = 0
        for part in self._root.glob(f"*/*{_PART}"):
            with _translated(part.name):
                try:
                    is_old = part.stat().st_mtime < time.time() - older_than_seconds
                except FileNotFoundError:
                    continue
                if is_old:
                    part.unlink(missing_ok=True)
                    count += 1
        return count

    def _place(self, key: str) -> Path:
        folder, _, name = key.partition("/")
        if not folder or not name or "/" in name or key.startswith(".") or name.startswith("."):
            raise ValueError(f"{key!r} is not a key")
        return self._root / folder / name


@contextmanager
def _translated(key: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{key}: {error.strerror or error}") from error


def _sync_folder(folder: Path) -> None:
    """So that the new name outlives a power failure, too."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
