"""Watch a server: load the models of dead processes again, and start a dead server again.

Nothing ends the watching but the end of the server on request. A server that dies again and again is started
at longer and longer intervals.
"""

from __future__ import annotations

import http.client
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import psutil

from siglip_serve.errors import ServerStartError
from siglip_serve.launcher.back_off import BackOff
from siglip_serve.launcher.family import STOPPED_TOO_LONG, ModelProcesses, Stopped, family, kill
from siglip_serve.launcher.log import Journal
from siglip_serve.launcher.progress import Progress, call_watched
from siglip_serve.launcher.status import Status

__all__ = ["Actions", "Repeated", "Watcher"]

_INTERVAL = 0.25
_RETRY = 5.0
# A server that was asked to end closes its ports first. It may complete requests for 30 s.
_END_WITHOUT_MODELS, _END = 5.0, 45.0
_TIDY = (2.0, 6.0)  # after a reload; shared memory is removed if it was unused both times


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Actions:
    """Functions with which a watcher acts on its server.

    Attributes:
        load: loads a model again; raises OSError or http.client.HTTPException when that fails.
        restart: starts the server again and returns its process; raises ServerStartError or OSError.
        refuses: tells if nothing listens on the server's port.
        asked_to_end: tells if the server, which has ended, had been asked to; None where that is not known.
        tidy: removes the shared memory that was unused this time and the last time.
        also: called as often as the server is looked at, in a thread of its own.
    """

    load: Callable[[str], None]
    restart: Callable[[], subprocess.Popen[bytes]]
    refuses: Callable[[], bool]
    asked_to_end: Callable[[], bool | None]
    tidy: Callable[[], None] = _nothing
    also: Callable[[], None] = _nothing


class Repeated(threading.Thread):
    """A thread that repeats something every quarter of a second, whatever it raises.

    Args:
        name: of the thread.
        journal: gets a line for every error.
    """

    def __init__(self, name: str, journal: Journal, once: Callable[[], bool]) -> None:
        super().__init__(name=name, daemon=True)
        self._journal = journal
        self._once = once
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Ask the thread to end; it completes what it has begun."""
        self._stopping.set()

    def run(self) -> None:
        pause = _INTERVAL
        while not self._stopping.wait(pause):
            pause = _INTERVAL
            try:
                if not self._once():
                    return
            except Exception as error:  # noqa: BLE001 - the server must be watched whatever happens
                self._journal.say(f"{self.name}: {type(error).__name__}: {error}; it continues")
                pause = _RETRY


class Watcher(Repeated):
    """A thread that polls the processes of one server, until that has ended on request.

    Args:
        server: the process of `tritonserver`.
        models: names of the models that it serves.
        actions: what can be done to it.
        journal: gets a line for every event.
        status: told about every event.
        stalled_after: seconds without progress until the loading of a model counts as failed.
    """

    def __init__(
        self,
        server: subprocess.Popen[bytes],
        models: Sequence[str],
        actions: Actions,
        journal: Journal,
        status: Status,
        stalled_after: float,
    ) -> None:
        super().__init__("siglip-serve-watcher", journal, self._look)
        self._server = server
        self._actions = actions
        self._status = status
        self._stalled_after = stalled_after
        self._back_off = BackOff()
        self._back_off.served()
        self._stopped = Stopped(STOPPED_TOO_LONG)
        self._processes = ModelProcesses(models)
        self._also = Repeated("siglip-serve-also", journal, self._call_also)
        self._hung_at_end = False
        # Here instead of in the thread, so that the death of a process is noticed from now on.
        self._begin()

    @property
    def replaced(self) -> bool:
        """True if any model process of the running server was replaced."""
        return self._replaced

    @property
    def hung_at_end(self) -> bool:
        """True if the server was asked to end, did not, and was killed."""
        return self._hung_at_end

    def start(self) -> None:
        self._also.start()
        super().start()

    def stop(self) -> None:
        self._also.stop()
        super().stop()

    def _call_also(self) -> bool:
        self._actions.also()
        return True

    def _begin(self) -> None:
        """Begin with a server whose models are all served."""
        self._replaced = False
        # By process id, the model of each. The dead stay until their model is served again.
        self._known = self._processes(family(self._server.pid))
        self._retired: set[int] = set()  # other processes of a model that was loaded again; Triton ends them
        self._retry: dict[str, float] = {}  # when to load a model again that could not be loaded
        self._refuses_since: float | None = None
        self._tidy: list[float] = []

    def _look(self) -> bool:
        if self._server.poll() is not None:
            again = self._start_again()
            if not again:
                self._also.stop()
            return again
        members = family(self._server.pid)
        self._kill_stopped(members)
        present = self._processes(members)
        self._retired &= present.keys()
        self._known |= {pid: model for pid, model in present.items() if pid not in self._retired}
        dead = sorted({self._known[pid] for pid in self._known.keys() - present.keys()})
        self._status.load(dead)
        if dead and self._actions.refuses():
            self._end_hung(present)
            return True
        self._refuses_since = None
        for model in dead:
            if self._stopping.is_set() or self._server.poll() is not None:
                return True
            if time.monotonic() >= self._retry.get(model, 0.0):
                self._reload(model, present)
        if not dead and self._tidy and time.monotonic() >= self._tidy[0]:
            del self._tidy[0]
            self._actions.tidy()
        return True

    def _kill_stopped(self, processes: Iterable[psutil.Process]) -> None:
        for process in self._stopped.overdue(processes):
            other = "tritonserver" if process.pid == self._server.pid else "a program of a model"
            what = self._known.get(process.pid, other)
            self._say(f"{what}: process {process.pid} was stopped for {STOPPED_TOO_LONG:.0f} s; killing it")
            kill(process)

    def _end_hung(self, present: dict[int, str]) -> None:
        """Kill a server that closed its ports, but does not end."""
        now = time.monotonic()
        self._refuses_since = self._refuses_since or now
        if now - self._refuses_since >= (_END if present else _END_WITHOUT_MODELS):
            self._say("tritonserver closed its ports but did not end; killing it")
            self._hung_at_end = True
            self._server.kill()
            self._server.wait()

    def _reload(self, model: str, present: dict[int, str]) -> None:
        own = {pid for pid, of in self._known.items() if of == model}
        died = sorted(own - present.keys())
        if model not in self._retry:
            self._status.model_died(model)
        self._say(f"{model}: model process {', '.join(map(str, died))} died; loading the model again")
        self._replaced = True
        begin = time.monotonic()
        try:
            self._load(model, own & present.keys())
        except (OSError, http.client.HTTPException) as error:
            self._say(f"{model}: loading again failed: {error}")
            self._retry[model] = time.monotonic() + _RETRY
            return
        self._say(f"{model}: served again after {time.monotonic() - begin:.1f} s")
        self._retry.pop(model, None)
        self._retired |= own
        self._known = {pid: of for pid, of in self._known.items() if pid not in own}
        self._tidy = [time.monotonic() + seconds for seconds in _TIDY]

    def _load(self, model: str, old: Iterable[int]) -> None:
        """Load a model, and kill its new processes, then the server, if they make no progress."""
        progress = Progress(lambda: self._of_model(model))
        hung = 0

        def check() -> None:
            nonlocal progress, hung
            self._kill_stopped(family(self._server.pid))
            if progress.idle() < self._stalled_after:
                return
            hung += 1
            new = [process for process in self._of_model(model) if process.pid not in old]
            if hung == 1 and new:
                what = f"killing process {', '.join(str(process.pid) for process in new)}"
            else:
                what, new = "killing tritonserver", family(self._server.pid)[:1]
            self._say(f"model {model} made no progress for {self._stalled_after:.0f} s; {what}")
            for process in new:
                kill(process)
            progress = Progress(lambda: self._of_model(model))

        call_watched(partial(self._actions.load, model), check)

    def _of_model(self, model: str) -> list[psutil.Process]:
        members = family(self._server.pid)
        models = self._processes(members)
        return [process for process in members if models.get(process.pid) == model]

    def _start_again(self) -> bool:
        """Start the server again, until that succeeds; False if it ended on request."""
        status = self._server.returncode
        asked = self._hung_at_end or self._actions.asked_to_end()
        # The status alone proves nothing: Python reports 0 for a process whose status it could not get.
        if asked or (asked is None and not status):
            self._say("tritonserver ended on request")
            return False
        signaled = status is not None and status < 0
        how = f"tritonserver died ({f'signal {-status}' if signaled else f'status {status}'})"
        self._status.died(how)
        begin = time.monotonic()
        while not self._stopping.is_set():
            delay = self._back_off.next()
            self._say(f"{how}; starting it again{f' in {delay:.0f} s' if delay else ''}")
            if self._stopping.wait(delay):
                break
            self._status.attempt("restarting")
            try:
                self._server = self._actions.restart()
            except (ServerStartError, OSError) as error:  # OSError: there is no process to start
                reason = "\n".join(str(error).splitlines()[:3])
                self._status.failed(reason)
                how = f"starting tritonserver again failed: {reason}"
                continue
            self._back_off.served()
            self._status.served()
            self._begin()
            self._say(f"tritonserver: served again after {time.monotonic() - begin:.1f} s")
            return True
        return False

    def _say(self, text: str) -> None:
        self._journal.say(text)
