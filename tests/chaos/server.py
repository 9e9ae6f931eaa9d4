"""The server under attack: one of its own, started again where it does not come back, or one that runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from paths import JERSEY, MODELS, ROOT, TINY

from tests.chaos.processes import Death, Watch, shared_memory

__all__ = ["ChaosError", "Recipe", "Target"]

_STOP = 45.0


class ChaosError(Exception):
    """A part cannot be run."""


@dataclass(frozen=True)
class Recipe:
    """The server that parts start.

    Attributes:
        checkpoint: of the images and texts.
        teams: checkpoint of the teams.
        models: models to serve with their steps, or none for all.
        settings: further settings.
        start_timeout: seconds.
    """

    checkpoint: str = str(TINY)
    teams: str = str(JERSEY)
    models: Sequence[str] = ()
    settings: Mapping[str, str] = field(default_factory=lambda: {"dtype": "float32"})
    start_timeout: float = 300.0

    def process(self, log: Path) -> subprocess.Popen[str]:
        """Start the server's process, which prints its addresses when it serves."""
        settings = {**self.settings, "teams_checkpoint": self.teams}
        given: dict[str, Any] = {"models_folder": str(MODELS), "checkpoint": self.checkpoint}
        given |= {"models": list(self.models), "settings": settings, "log": str(log)}
        given["start_timeout"] = self.start_timeout
        with log.with_suffix(".launcher.log").open("ab") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.serve", json.dumps(given)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )


class Target:
    """A server and its addresses; use it as a context manager.

    Args:
        recipe: of an own server, or None for one that runs.
        log: file of an own server's log.
        addresses: `grpc`, `http` and `metrics` of a server that runs.
        launcher: process id of that server's launcher on this machine, or 0 if it cannot be watched.

    Attributes:
        grpc, http, metrics: addresses, `host:port`; "" if unknown.
        launcher: process id of the launcher, or 0.
        starts: how often an own server was started.
    """

    def __init__(
        self, recipe: Recipe | None, log: Path, addresses: Mapping[str, str] | None = None, launcher: int = 0
    ) -> None:
        self._recipe = recipe
        self.log = log
        self.launcher = launcher
        self.starts = 0
        self._process: subprocess.Popen[str] | None = None
        self._watch: Watch | None = None
        self._past: list[Death] = []
        self.grpc = self.http = self.metrics = ""
        self._aim(addresses or {})

    def __enter__(self) -> Self:
        if self._recipe is not None:
            self.start()
        elif self.launcher:
            self._begin_watch()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def owned(self) -> bool:
        """True for a server that this program starts."""
        return self._recipe is not None

    @property
    def gave_up(self) -> bool:
        """True if the launcher of an own server has ended."""
        return self._process is not None and self._process.poll() is not None

    def start(self) -> None:
        """Start an own server.

        Raises:
            ChaosError: it did not start; the message says why.
        """
        if self._recipe is None:
            raise ChaosError("the server is not this program's, so it cannot be started")
        self._process = process = self._recipe.process(self.log)
        assert process.stdout is not None
        line = process.stdout.readline()
        told = json.loads(line) if line else {"error": f"the launcher ended with {process.wait()}"}
        if "error" in told:
            process.wait()
            raise ChaosError(f"the server did not start: {told['error'][:2000]}")
        self.starts += 1
        self.launcher = process.pid
        self._aim(told)
        self._begin_watch()

    def stop(self) -> None:
        """Stop an own server, and the watch."""
        if self._watch is not None:
            self._watch.stop()
            self._watch.join()
            self._past += self._watch.deaths()
            self._watch = None
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(_STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def restart(self) -> None:
        """Stop an own server and start another."""
        self.stop()
        self.start()

    def members(self) -> dict[int, str]:
        """Kinds of the living processes by process id."""
        found = self._watch.members if self._watch is not None else {}
        return {pid: member.kind for pid, member in found.items()}

    def deaths(self) -> list[Death]:
        """All deaths until now, also of earlier servers."""
        return [*self._past, *(self._watch.deaths() if self._watch is not None else [])]

    def shared_memory(self) -> dict[str, int]:
        """Sizes of its files in shared memory."""
        return shared_memory(self.launcher)

    def wait_for_death(self, count: int, seconds: float) -> bool:
        """Wait until there are more than `count` deaths, for `seconds` at most."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if len(self.deaths()) > count:
                return True
            time.sleep(0.05)
        return False

    def _aim(self, addresses: Mapping[str, str]) -> None:
        self.grpc = addresses.get("grpc", "").removeprefix("grpc://")
        self.http = addresses.get("http", "").removeprefix("http://")
        self.metrics = addresses.get("metrics", "")

    def _begin_watch(self) -> None:
        self._watch = Watch(self.launcher)
        self._watch.start()
