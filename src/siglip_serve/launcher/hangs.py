"""Notice model processes that live but never answer, as after a deadlock, and kill them.

A process is hung if it has used no CPU for as long as requests have waited for it. A process that computes
uses some, also one that waits for a GPU, because it starts kernels. Nothing waits for a process that holds
the only request of all. So a model whose counts stand still is asked a few questions, which then wait.
"""

from __future__ import annotations

import http.client
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from siglip_serve.errors import ServerStartError
from siglip_serve.launcher.family import family, find, kill
from siglip_serve.launcher.progress import Progress

__all__ = ["Hangs", "Probes", "Work", "read_work"]

# An idle model process takes less than 0.1% of a core, and one that waits for a GPU several times that.
_LEAST_SHARE = 0.002
_MOST_PROBES = 3  # of one model without an answer: the hung process has one, and Triton may hold one for it
_PATIENCE = 5.0  # seconds for the metrics
_LINE = re.compile(
    r"^nv_inference_(pending_request_count|request_success|request_failure)"
    r'\{model="(\w+)"[^}]*\} ([0-9.e+]+)$',
    re.MULTILINE,
)
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Work(NamedTuple):
    """Requests that a model has to answer and has answered, by Triton's metrics.

    Attributes:
        waiting: requests in its queue.
        done: requests that it answered or failed.
    """

    waiting: int
    done: int


def read_work(address: str) -> dict[str, Work]:
    """Read the work of each model from Triton's metrics at `host:port`.

    Raises:
        OSError, http.client.HTTPException: they cannot be read.
    """
    with _OPENER.open(f"http://{address}/metrics", timeout=_PATIENCE) as answer:
        text = answer.read().decode()
    found: dict[str, Work] = {}
    for kind, model, number in _LINE.findall(text):
        waiting, done = found.get(model, (0, 0))
        if kind == "pending_request_count":
            waiting += int(float(number))
        else:
            done += int(float(number))
        found[model] = Work(waiting, done)
    return found


class Hangs:
    """Kills model processes that do nothing while requests wait for them, or a server that does nothing.

    A server is hung if its metrics do not come although its port is open, and all its processes do nothing.

    Args:
        after: seconds until such a process counts as hung.
        server: finds the process id of `tritonserver`.
        processes: finds the model of each model process by its process id.
        work: reads the work of each model (`read_work`).
        probes: asks models whose counts stand still.
        say: writes a line for the operator.
    """

    def __init__(
        self,
        after: float,
        server: Callable[[], int],
        processes: Callable[[], Mapping[int, str]],
        work: Callable[[], Mapping[str, Work]],
        probes: Probes,
        say: Callable[[str], None],
    ) -> None:
        self._after, self._server = after, server
        self._processes, self._work = processes, work
        self._probes, self._say = probes, say
        self._idle: dict[int, Progress] = {}
        self._silent: Progress | None = None  # of all processes, since the metrics do not come
        self._done: dict[str, int] = {}
        self._next = 0.0

    def look(self) -> None:
        """Look at the processes that may be hung, and a dozen times within `after` at all; call it often."""
        watched = [*self._idle.values(), *([self._silent] if self._silent else [])]
        idle = [progress.idle() for progress in watched]
        now = time.monotonic()
        if now < self._next and max(idle, default=0.0) < self._after:
            return
        self._next = now + self._after / 12
        try:
            work = self._work()
        except (OSError, http.client.HTTPException) as error:
            self._idle.clear()
            # A server that is away refuses the connection, which others notice.
            self._watch_silence(isinstance(getattr(error, "reason", error), TimeoutError))
            return
        self._silent = None
        self._probes.ask({model: one.done for model, one in work.items()})
        processes = self._processes()
        self._forget(processes, work)
        for pid, model in processes.items():
            waiting = work[model].waiting if model in work else 0
            if waiting and pid not in self._idle:
                self._idle[pid] = Progress(partial(family, pid), least_share=_LEAST_SHARE)
            elif waiting and self._idle[pid].idle() >= self._after:
                self._kill(pid, model, waiting)

    def _watch_silence(self, silent: bool) -> None:
        server = self._server()
        if not silent:
            self._silent = None
        elif self._silent is None:
            self._silent = Progress(partial(family, server), least_share=_LEAST_SHARE)
        elif self._silent.idle() >= self._after:
            self._say(f"tritonserver: process {server} did not answer for {self._after:.0f} s; killing it")
            self._silent = None
            for process in find(server):
                kill(process)

    def _forget(self, processes: Mapping[int, str], work: Mapping[str, Work]) -> None:
        """Forget the processes that have ended, have nothing to do, or have done something."""
        names = list(processes.values())
        done = {model: one.done for model, one in work.items()}
        # Of several processes of a model others may do what one does not.
        moved = {model for model in done if done[model] != self._done.get(model) and names.count(model) == 1}
        self._done = done
        kept = {
            pid
            for pid, model in processes.items()
            if model in work and work[model].waiting and model not in moved
        }
        self._idle = {pid: progress for pid, progress in self._idle.items() if pid in kept}

    def _kill(self, pid: int, model: str, waiting: int) -> None:
        self._say(
            f"{model}: process {pid} did nothing for {self._after:.0f} s while {waiting} "
            f"request{'s' * (waiting > 1)} waited for it; killing it"
        )
        del self._idle[pid]
        for process in find(pid):
            kill(process)


class Probes:
    """Small inferences with models whose counts stand still, which hang where the model hangs.

    Args:
        after: seconds without movement until a model is asked, and asked again.
        questions: by model, makes an inference; raises ServerStartError when that fails.
    """

    def __init__(self, after: float, questions: Mapping[str, Callable[[], None]]) -> None:
        self._after, self._questions = after, questions
        self._done: dict[str, int] = {}
        self._moved: dict[str, float] = {}
        self._open = dict.fromkeys(questions, 0)
        self._lock = threading.Lock()

    def ask(self, done: Mapping[str, int]) -> None:
        """Ask what has to be asked; it answers later.

        Args:
            done: by model, the requests that it has completed.
        """
        now = time.monotonic()
        for model, question in self._questions.items():
            count = done.get(model, 0)
            if count != self._done.get(model):
                self._done[model], self._moved[model] = count, now
            elif now - self._moved[model] >= self._after and self._open[model] < _MOST_PROBES:
                self._moved[model] = now - self._after * 3 / 4 if self._open[model] else now
                with self._lock:
                    self._open[model] += 1
                threading.Thread(target=self._run, args=(model, question), daemon=True).start()

    def _run(self, model: str, question: Callable[[], None]) -> None:
        try:
            question()
        except ServerStartError:
            return  # the process was killed, or the server is busy
        finally:
            with self._lock:
                self._open[model] -= 1
