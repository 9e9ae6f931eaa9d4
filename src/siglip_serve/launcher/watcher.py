"""Watch a server: load the models of dead processes again, and start a dead server again."""

from __future__ import annotations

import http.client
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from siglip_serve.errors import ServerStartError

__all__ = ["Watcher"]

_STUB = "triton_python_backend_stub"
_INTERVAL = 0.25
_RETRY = 5.0
_DEATHS, _WITHIN = 3, 600.0  # a server that dies more often within these seconds is not started again


class Watcher(threading.Thread):
    """A thread that polls the model processes of one server.

    The thread ends when the server has ended on request or has died too often.

    Args:
        server: the process of `tritonserver`.
        models: names of the models that it serves.
        load: loads a model again; raises OSError or http.client.HTTPException when that fails.
        restart: starts the server again and returns its process; raises ServerStartError or OSError.
        log_file: receives a line for every event, as does standard error.
        also: called as often as the processes are looked at.
    """

    def __init__(
        self,
        server: subprocess.Popen[bytes],
        models: Sequence[str],
        load: Callable[[str], None],
        restart: Callable[[], subprocess.Popen[bytes]],
        log_file: Path,
        also: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(name="siglip-serve-watcher", daemon=True)
        self._server = server
        self._models = models
        self._load = load
        self._restart = restart
        self._log_file = log_file
        self._also = also
        self._stopping = threading.Event()
        self._replaced = False
        self._deaths: list[float] = []
        # Here instead of in the thread, so that the death of a process is noticed from now on.
        self._present = self._processes()

    @property
    def replaced(self) -> bool:
        """True if any model process of the running server was replaced."""
        return self._replaced

    def stop(self) -> None:
        """Ask the thread to end; it completes a reload that has begun."""
        self._stopping.set()

    def run(self) -> None:
        while not self._stopping.is_set():
            self._watch_models()
            if self._stopping.is_set() or not self._start_again():
                return
            self._present = self._processes()

    def _watch_models(self) -> None:
        """Load the models of dead processes again, until the server ends."""
        known = self._present  # dead processes stay in it until their model is served again
        retired: set[int] = set()  # the other processes of a model that was loaded again; Triton ends them
        pause = _INTERVAL
        while not self._stopping.wait(pause) and self._server.poll() is None:
            self._also()
            present = self._processes()
            retired &= present.keys()
            known |= {pid: model for pid, model in present.items() if pid not in retired}
            pause = _INTERVAL
            for model in sorted({known[pid] for pid in known.keys() - present.keys()}):
                own = {pid for pid, of in known.items() if of == model}
                if self._stopping.is_set():
                    return
                if not self._reload(model, sorted(own - present.keys())):
                    pause = _RETRY if self._server.poll() is None else 0
                    continue
                retired |= own
                known = {pid: of for pid, of in known.items() if pid not in own}

    def _reload(self, model: str, died: Sequence[int]) -> bool:
        self._say(f"{model}: model process {', '.join(map(str, died))} died; loading the model again")
        self._replaced = True
        start = time.monotonic()
        try:
            self._load(model)
        except (OSError, http.client.HTTPException) as error:
            self._say(f"{model}: loading again failed: {error}")
            return False
        self._say(f"{model}: served again after {time.monotonic() - start:.1f} s")
        return True

    def _start_again(self) -> bool:
        status = self._server.poll()
        if not status:  # ended on request
            return False
        now = time.monotonic()
        self._deaths = [*(died for died in self._deaths if now - died < _WITHIN), now]
        how = f"tritonserver died ({f'signal {-status}' if status < 0 else f'status {status}'})"
        if len(self._deaths) > _DEATHS:
            self._say(f"{how}, {len(self._deaths)} times within {_WITHIN:.0f} s; giving up")
            return False
        self._say(f"{how}; starting it again")
        try:
            self._server = self._restart()
        except (ServerStartError, OSError) as error:  # OSError: there is no process to start
            if not self._stopping.is_set():
                self._say(f"starting tritonserver again failed: {error}")
            return False
        self._replaced = False
        self._say(f"tritonserver: served again after {time.monotonic() - now:.1f} s")
        return True

    def _processes(self) -> dict[int, str]:
        """Find the running model processes, and the model of each."""
        found = {}
        for process in _children(self._server.pid):
            try:
                if process.status() == psutil.STATUS_ZOMBIE or process.name()[:15] != _STUB[:15]:
                    continue
                words = process.cmdline()
            except psutil.NoSuchProcess:
                continue
            for model in self._models:
                if any(f"/{model}/" in word for word in words):
                    found[process.pid] = model
        return found

    def _say(self, text: str) -> None:
        line = f"siglip-serve: {text}\n"
        sys.stderr.write(line)
        with self._log_file.open("a", encoding="utf-8") as log:
            log.write(line)


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
