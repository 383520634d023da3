"""What a store of objects must do. One contract suite tests every implementation."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from e2a.core.errors import OurError
from e2a.settings.environment import StoragePlace

__all__ = ["PIECE_BYTES", "Storage", "StorageError", "StorageObject", "StoragePlace"]

PIECE_BYTES = 256 * 1024


class StorageError(OurError):
    """The store does not do what it should: it is away, full, or lacks an object. Trying again may help."""

    code = "storage_error"
    title = "The storage of snapshots failed"


@dataclass(frozen=True, slots=True)
class StorageObject:
    """One whole object. `written_at` by the store's clock."""

    key: str
    size: int
    written_at: dt.datetime


class Storage(Protocol):
    """Objects by keys such as `ten_…/snp_….1`. All methods raise `StorageError`."""

    def write(self, key: str, pieces: Iterable[bytes]) -> int:
        """Store an object of any length in bounded memory; returns its size. It is there whole or not at all, also
        when `pieces` raises (which is passed on) or the process is killed."""
        ...

    def read(self, key: str) -> Iterator[bytes]:
        """The object's bytes. Raises `StorageError` at once when it is missing."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object, and what an unfinished write of it left. Fine when there is none."""
        ...

    def objects(self) -> Iterator[StorageObject]:
        """All whole objects."""
        ...

    def leftovers_remove(self, *, older_than_seconds: float) -> int:
        """Remove what writes that never ended left so long ago; returns how many."""
        ...
