"""The processes of a server: find them, tell of which model each is, and notice those that are stopped."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

__all__ = ["STOPPED_TOO_LONG", "ModelProcesses", "Stopped", "family", "find", "kill", "mapped_files"]

STOPPED_TOO_LONG = 5.0  # seconds
_STUB = "triton_python_backend_stub"


def find(pid: int) -> list[psutil.Process]:
    """Find the process `pid`; empty if it does not run."""
    try:
        return [psutil.Process(pid)]
    except psutil.Error:
        return []


def family(pid: int) -> list[psutil.Process]:
    """List the process `pid` and all below it; empty if it does not run."""
    try:
        server = psutil.Process(pid)
        return [server, *server.children(recursive=True)]
    except psutil.Error:
        return []


def kill(process: psutil.Process) -> None:
    """Kill a process that may have ended meanwhile."""
    with suppress(psutil.Error):
        process.kill()


def mapped_files(processes: Iterable[psutil.Process]) -> set[Path]:
    """Find the files that are mapped into the memory of any of these processes.

    Raises:
        OSError: the system does not tell it of a process that runs.
    """
    found = set()
    for process in processes:
        with suppress(FileNotFoundError, ProcessLookupError):
            for line in Path(f"/proc/{process.pid}/maps").read_text(errors="replace").splitlines():
                _, _, path = line.partition("/")
                if path:
                    found.add(Path("/" + path))
    return found


class ModelProcesses:
    """Finds the running model processes of a server.

    Args:
        models: names of the models that it serves.
    """

    def __init__(self, models: Sequence[str]) -> None:
        self._models = models
        self._found: dict[psutil.Process, str] = {}

    def __call__(self, processes: Iterable[psutil.Process]) -> dict[int, str]:
        """Find the model of each model process by its process id.

        Args:
            processes: all of the server.
        """
        running = [process for process in processes if not _is_zombie(process)]
        # A process is asked only once: the system may refuse to tell about one that runs on.
        known = {process: self._found.get(process) or self._model(process) for process in running}
        self._found = {process: model for process, model in known.items() if model}
        return {process.pid: model for process, model in self._found.items()}

    def _model(self, process: psutil.Process) -> str | None:
        try:
            words = process.cmdline() if process.name()[:15] == _STUB[:15] else []
        except psutil.Error:
            return None
        for model in self._models:
            if any(f"/{model}/" in word for word in words):
                return model
        return None


class Stopped:
    """Notices processes that a signal such as SIGSTOP has stopped for too long.

    Such a process holds the requests that it was given, and Triton waits for it without end. A debugger
    stops a process in another way, which does not count.

    Args:
        patience: seconds.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._since: dict[psutil.Process, float] = {}

    def overdue(self, processes: Iterable[psutil.Process]) -> list[psutil.Process]:
        """List those of `processes` that were seen stopped for all of the last `patience` seconds."""
        now = time.monotonic()
        stopped = [process for process in processes if _status(process) == psutil.STATUS_STOPPED]
        self._since = {process: self._since.get(process, now) for process in stopped}
        return [process for process, since in self._since.items() if now - since >= self._patience]


def _is_zombie(process: psutil.Process) -> bool:
    return _status(process) in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def _status(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return str(psutil.STATUS_DEAD)
    except psutil.Error:
        return ""
