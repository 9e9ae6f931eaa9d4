"""Turns of processes that compute on the same device.

Two processes that compute at the same time share a GPU by time slices: each batch takes twice as long, and
nothing is gained. With turns, one process computes while the other answers its callers, takes its next batch
and copies it to memory that the device can read.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["Places", "Turns", "peers_name", "remove_unused"]

_FOLDER = Path("/dev/shm")  # Triton's Python backend needs it as well
_PREFIX = "siglip-serve-turns-"
# Times are in seconds. Handing the device over takes up to half a millisecond, in which it is idle, so
# shorter computations share it by time slices.
_LEAST = 0.02
_PAUSE = 0.0002  # between two attempts to take the turn
_PATIENCE = 5.0  # a longer turn counts as hung
_LITTLE_PATIENCE = 0.05  # after a turn that hung


def peers_name(model: str, device: str) -> str:
    """Name the processes of a model on a device in one server, which is their parent process."""
    # Containers that share /dev/shm count their processes from one each.
    return f"{os.stat('/proc/self/ns/pid').st_ino}-{os.getppid()}-{model}-{device}"  # noqa: PTH116 - a link


class Turns:
    """The part of one process in the turns of all processes with the same name.

    They meet at a file. A lock on its bytes is the turn. A shared lock on the file itself marks it as used,
    and the last process that leaves removes it. The system releases both locks when a process ends, however
    it ends. A process may have only one object of this class.

    Args:
        name: common name of the processes, as of `peers_name`. If empty, the process computes without turns.
        folder: folder of the file.

    Raises:
        OSError: the file could not be opened, or belongs to another user.
    """

    def __init__(self, name: str, folder: Path = _FOLDER) -> None:
        self._path = folder / f"{_PREFIX}{name}"
        self._file = _open(self._path) if name else None
        self._pace = 0.0  # seconds per row, of the last batch that took long
        self._patience = _PATIENCE

    @contextmanager
    def turn(self, rows: int) -> Iterator[None]:
        """Compute a batch in the body of a `with` statement, alone if it is expected to take 20 ms or more.

        Waits while another process has its turn, but not longer than 5 s for one that is stuck.

        Args:
            rows: rows of the batch, from which its time is estimated.
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
        """Leave the other processes. No turn may follow."""
        if self._file is not None:
            _remove_if_unused(self._path, self._file)
            os.close(self._file)
            self._file = None

    def _enter(self, file: int) -> bool:
        """Wait for the turn, or return False if another process holds it too long."""
        until = time.monotonic() + self._patience
        while True:
            with suppress(BlockingIOError, PermissionError):  # systems differ in the error for a taken lock
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._patience = _PATIENCE
                return True
            if time.monotonic() > until:
                self._patience = _LITTLE_PATIENCE
                return False
            time.sleep(_PAUSE)


class Places:
    """A few places that several processes share, of which each process holds one at most.

    The system frees the place of a process that ends, however it ends.

    Args:
        name: common name of the processes, as of `peers_name`.
        count: number of places. If it is 0, there is never a free one.
        folder: folder of the file at which the processes meet.

    Raises:
        OSError: the file could not be opened, or belongs to another user.
    """

    def __init__(self, name: str, count: int, folder: Path = _FOLDER) -> None:
        self._path = folder / f"{_PREFIX}{name}-places"
        self._file = _open(self._path) if count else None
        self._count = count

    def take(self) -> bool:
        """Take a place. Returns False if all are taken."""
        if self._file is None:
            return False
        for place in range(self._count):
            with suppress(BlockingIOError, PermissionError):
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
                return True
        return False

    def leave(self) -> None:
        """Give the place back."""
        if self._file is not None:
            fcntl.lockf(self._file, fcntl.LOCK_UN, self._count)

    def close(self) -> None:
        """Leave the other processes. No place can be taken afterwards."""
        file, self._file = self._file, None
        if file is not None:
            _remove_if_unused(self._path, file)
            os.close(file)


def remove_unused(folder: Path = _FOLDER) -> None:
    """Remove files of this user that no process uses any more, as killed processes leave them.

    A process that has a turn must not call this, as it would lose the turn.

    Args:
        folder: folder of the files.
    """
    for path in folder.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, or removed just now
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            _remove_if_unused(path, file)
            os.close(file)


def _open(path: Path) -> int:
    """Open the file and mark it as used."""
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
    # One of several that leave at once succeeds, as each gives up its shared lock before it asks for this
    # one.
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file).st_nlink:  # else the path is another file's by now
            path.unlink()
