"""Notices dead model processes, which Triton never restarts, and loads their model again."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

__all__ = ["Watcher"]

_STUB = "triton_python_backend_stub"
_INTERVAL = 0.25


class Watcher(threading.Thread):
    """A thread that polls the model processes of one server.

    Args:
        server: process id of `tritonserver`.
        models: names of the models it serves.
        load: loads a model again; raises OSError when that fails.
        log_file: what happens is written there, and to standard error.
    """

    def __init__(
        self, server: int, models: Sequence[str], load: Callable[[str], None], log_file: Path
    ) -> None:
        super().__init__(name="siglip-serve-watcher", daemon=True)
        self._server = server
        self._models = models
        self._load = load
        self._log_file = log_file
        self._stopping = threading.Event()
        self._replaced = False

    def stop(self) -> bool:
        """End the thread, waiting for a reload under way; whether any process was replaced."""
        self._stopping.set()
        self.join()
        return self._replaced

    def run(self) -> None:
        known = self._processes()
        while not self._stopping.wait(_INTERVAL):
            if not psutil.pid_exists(self._server):
                return
            alive = self._processes()
            for model in sorted({known[pid] for pid in known.keys() - alive.keys()}):
                died = sorted(pid for pid in known.keys() - alive.keys() if known[pid] == model)
                self._reload(model, died)
                alive = self._processes()
            known = alive

    def _reload(self, model: str, died: Sequence[int]) -> None:
        self._say(f"{model}: model process {', '.join(map(str, died))} died; loading the model again")
        self._replaced = True
        start = time.monotonic()
        try:
            self._load(model)
        except OSError as error:
            self._say(f"{model}: loading again failed: {error}")
        else:
            self._say(f"{model}: served again after {time.monotonic() - start:.1f} s")

    def _processes(self) -> dict[int, str]:
        """The model processes that run, and the model of each."""
        found = {}
        for process in _children(self._server):
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
