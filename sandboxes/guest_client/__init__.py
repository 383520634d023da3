"""How web and workers speak with the guest of a sandbox: typed calls through its node's gateway."""

from sandboxes.guest_client.aio import (
    AsyncFileStream,
    AsyncGuestClient,
    AsyncOutputStream,
    AsyncWatchStream,
)
from sandboxes.guest_client.frames import Exit, Frame, Gap, Output
from sandboxes.guest_client.shapes import (
    ArchiveWritten,
    Completed,
    FileInfo,
    FileWritten,
    FolderListing,
    GuestHealth,
    GuestStats,
    ProcessInfo,
    ProcessSpec,
    PtySize,
    RedactedValue,
)
from sandboxes.guest_client.sync import FileStream, GuestClient, OutputStream, WatchStream
from sandboxes.guest_client.watching import FileChange, FileChangeKind

__all__ = [
    "ArchiveWritten",
    "AsyncFileStream",
    "AsyncGuestClient",
    "AsyncOutputStream",
    "AsyncWatchStream",
    "Completed",
    "Exit",
    "FileChange",
    "FileChangeKind",
    "FileInfo",
    "FileStream",
    "FileWritten",
    "FolderListing",
    "Frame",
    "Gap",
    "GuestClient",
    "GuestHealth",
    "GuestStats",
    "Output",
    "OutputStream",
    "ProcessInfo",
    "ProcessSpec",
    "PtySize",
    "RedactedValue",
    "WatchStream",
]
