"""One start of `tritonserver`: wait until it answers, and notice one that hangs."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from siglip_serve.errors import ServerStartError
from siglip_serve.launcher.endpoint import Endpoint
from siglip_serve.launcher.family import ModelProcesses, family
from siglip_serve.launcher.log import cause, is_refused, loading, read, tail
from siglip_serve.launcher.progress import Progress, call_watched

__all__ = ["Start", "UnluckyStartError"]

# Triton's words for a model process that did not answer in time, as when the machine was too busy.
_UNLUCKY = re.compile(r"is not healthy|[Tt]imed out|lock_exception")


class UnluckyStartError(ServerStartError):
    """The start failed for a reason that another attempt may not meet."""


@dataclass(frozen=True)
class Start:
    """A `tritonserver` that was just started.

    Attributes:
        process: its process.
        endpoint: its HTTP endpoint.
        models: names of its models.
        log_file: its log.
        log_start: size of the log before the start, in bytes.
        timeout: seconds until the start counts as failed, whatever its processes do.
        stalled_after: seconds without progress until the start counts as failed.
    """

    process: subprocess.Popen[bytes]
    endpoint: Endpoint
    models: Sequence[str]
    log_file: Path
    log_start: int
    timeout: float
    stalled_after: float

    def wait_until_served(self, is_wanted: Callable[[], bool]) -> None:
        """Wait until the server has answered a real inference.

        Args:
            is_wanted: tells if the server shall still start.

        Raises:
            UnluckyStartError: it hangs, or died of what may not happen again.
            ServerStartError: it ended or is too slow, or it is no longer wanted.
        """
        progress = Progress(lambda: family(self.process.pid), self.log_file)
        check = partial(self._check, progress, time.monotonic() + self.timeout, is_wanted)
        while not self.endpoint.is_ready():
            check()
            time.sleep(0.05)
        if "embed_image" not in self.models:
            return
        try:
            call_watched(self.endpoint.embed_image, check)
        except UnluckyStartError:
            raise
        except ServerStartError as error:
            raise UnluckyStartError(f"{error}\n{tail(self.log_file)}") from error

    def _check(self, progress: Progress, deadline: float, is_wanted: Callable[[], bool]) -> None:
        if not is_wanted():
            raise ServerStartError("the server was stopped")
        status = self.process.poll()
        if status is not None:
            self._raise_cause(status)
        if time.monotonic() > deadline:
            raise ServerStartError(f"not ready after {self.timeout:.0f} s\n{tail(self.log_file)}")
        if progress.idle() >= self.stalled_after:
            raise UnluckyStartError(f"{self._hanging()} made no progress for {self.stalled_after:.0f} s")

    def _raise_cause(self, status: int) -> NoReturn:
        reason = cause(self.log_file)
        unlucky = status < 0 or _UNLUCKY.search(read(self.log_file, self.log_start))
        if not unlucky or is_refused(self.log_file, self.log_start):
            raise ServerStartError(reason)
        names = loading(self.log_file, self.log_start, self.models)
        raise UnluckyStartError(f"{', '.join(names)} did not load: {reason}" if names else reason)

    def _hanging(self) -> str:
        """Name the models that were loading, from the log, else from the processes."""
        names = loading(self.log_file, self.log_start, self.models)
        if not names and not read(self.log_file, self.log_start):
            names = sorted(set(ModelProcesses(self.models)(family(self.process.pid)).values()))
        if not names:
            return "tritonserver"
        return f"model{'s' if len(names) > 1 else ''} {', '.join(names)}"
