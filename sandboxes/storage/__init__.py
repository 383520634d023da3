"""Where snapshots lie: a folder, or a bucket of an S3-compatible store. Only workers speak with it."""

from __future__ import annotations

from pathlib import Path

from django.conf import settings

from sandboxes.storage.base import Storage, StorageError, StorageObject, StoragePlace

__all__ = ["Storage", "StorageError", "StorageObject", "storage", "storage_of"]


def storage_of(place: StoragePlace) -> Storage:
    """The store that `E2A_STORAGE_URL` names."""
    if place.bucket:
        from sandboxes.storage.s3 import (
            S3Storage,
        )  # boto3 takes a quarter of a second, and only workers need it.

        return S3Storage(place)
    from sandboxes.storage.folder import FolderStorage

    return FolderStorage(Path(place.folder))


def storage() -> Storage:
    """The store of the settings."""
    return storage_of(settings.E2A.storage)
