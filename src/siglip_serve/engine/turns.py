"""Processes that compute the same on one device take turns.

Two processes that compute at the same time share a GPU by slices of time: each batch takes twice as long, and
nothing is gained. In turns one computes while the other one answers its callers, takes its next batch and
puts it where the device can read it.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["Turns", "peers_name", "remove_unused"]

_FOLDER = Path("/dev/shm")  # Triton's Python backend needs it as well
_PREFIX = "siglip-serve-turns-"
# Seconds. To hand the device over takes up to half a millisecond, in which it waits: shorter computations
# share it by slices of time.
_LEAST = 0.02
_PAUSE = 0.0002  # between two looks whether it is one's turn
_PATIENCE = 5.0  # then a turn counts as hung
_LITTLE_PATIENCE = 0.05  # after one that hung


def peers_name(model: str, device: str) -> str:
    """A name for the processes of a model on a device in one server, which is their parent."""
    # Containers that share /dev/shm count their processes from one each.
    return f"{os.stat('/proc/self/ns/pid').st_ino}-{os.getppid()}-{model}-{device}"  # noqa: PTH116 - a link


class Turns:
    """One process's part in the turns of those that have the same name.

    They find each other through a file. A lock on its bytes is the turn; a shared lock on the file itself
    says that it is used, and whoever leaves as the last one removes it. Both end with the process, however it
    ends. No more than one object may live in a process.

    Args:
        name: what the processes have in common; empty: there are no others, and nothing is done.
        folder: where the file lies.

    Raises:
        OSError: the file could not be opened.
    """

    def __init__(self, name: str, folder: Path = _FOLDER) -> None:
        self._path = folder / f"{_PREFIX}{name}"
        self._file = _open(self._path) if name else None
        self._pace = 0.0  # seconds a row, of the last batch that took long
        self._patience = _PATIENCE

    @contextmanager
    def turn(self, rows: int) -> Iterator[None]:
        """Compute so many rows, alone if that takes long.

        Waits while another process has its turn, but not for one that is stuck.
        """
        alone = self._file is not None and rows * self._pace >= _LEAST and self._enter(self._file)
        begin = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - begin
            if alone and self._file is not None:
                fcntl.lockf(self._file, fcntl.LOCK_UN)
        if seconds >= _LEAST:
            self._pace = seconds / rows

    def close(self) -> None:
        """Leave; no turn may follow."""
        if self._file is not None:
            _remove_if_unused(self._path, self._file)
            os.close(self._file)
            self._file = None

    def _enter(self, file: int) -> bool:
        """Wait for the turn; False if it hangs with another process."""
        until = time.monotonic() + self._patience
        while True:
            with suppress(BlockingIOError, PermissionError):  # whichever the system says that it is taken by
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._patience = _PATIENCE
                return True
            if time.monotonic() > until:
                self._patience = _LITTLE_PATIENCE
                return False
            time.sleep(_PAUSE)


def remove_unused(folder: Path = _FOLDER) -> None:
    """Remove this user's files that no process uses any more; killed ones leave them.

    Not to be called by a process that has a turn: it would lose it.
    """
    for path in folder.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # it is another user's, or was removed just now
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            _remove_if_unused(path, file)
            os.close(file)


def _open(path: Path) -> int:
    """The file, marked as used."""
    remove_unused(path.parent)
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(file, fcntl.LOCK_SH)
        status = os.fstat(file)
        if status.st_uid != os.getuid():
            os.close(file)
            raise PermissionError(f"{path} belongs to another user")
        if status.st_nlink:
            return file
        os.close(file)  # removed by another process before it was marked


def _remove_if_unused(path: Path, file: int) -> None:
    # Of several that leave at once one succeeds: each gives up its shared lock before it asks for the other.
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file).st_nlink:  # else the path is another file's by now
            path.unlink()
