"""Admission of calls to Triton, which works for few callers that gave up.

A call that Triton has cannot be taken back: cancelling it may end the server, so it is computed for no
caller. Callers that give up again and again would fill Triton with such calls. While it has as many of them
as allowed, further calls wait here, in order. A call whose caller gives up here costs Triton nothing.

This alone would let all that wait in at once whenever Triton has done with the last ones. So the calls that
Triton may have are limited by a window too, as TCP limits what is on the way. It grows by one with each
answer, and shrinks with each call whose caller gave up. Where all give up it comes down to one call. Beside
patient callers it settles where the impatient give up while they wait here, which costs nothing: the first in
the queue is the one that has waited for the longest.

Triton may lose a call when a model process is killed. So a call that it has not answered after some seconds
holds up no other any more.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

__all__ = ["Admission", "Admissions", "FullError", "GoneError", "Places"]

T = TypeVar("T")

_MANY_NAMES = 64  # more than there are models, so callers have made up names
# Each call that is computed in vain delays the next by its share of a pass, which is long on a CPU.
_MOST_FORGOTTEN = 2
_SHARE_FORGOTTEN = 8  # of as many calls one more, so that a GPU with hundreds of them never waits for a few
_SHRINK = _SHARE_FORGOTTEN - 1  # places for each, so that the window stays wide while fewer give up
_HOLDS_UP = 5.0  # seconds for which a call holds others up; a pass of a large tower on a CPU takes less
_WIDEN = 2  # calls that are let in for each that ends, so that after a wait the number grows again


class FullError(Exception):
    """No further call may wait.

    Attributes:
        count: of these calls.
    """

    def __init__(self, count: int) -> None:
        super().__init__(f"{count} calls are in progress")
        self.count = count


class GoneError(Exception):
    """The caller gave up while its call waited."""


class Places:
    """Places with Triton, which several admissions may share. One that becomes free goes to them in turn.

    Args:
        count: of places.

    Attributes:
        free: of these.
    """

    def __init__(self, count: int) -> None:
        self.free = count
        self._queues: dict[Admission, None] = {}  # in the order of their turns

    def wait(self, admission: Admission) -> None:
        """Give an admission its turn, too."""
        self._queues.setdefault(admission)

    def let_in(self) -> None:
        """Let some calls in that may pass."""
        for _ in range(_WIDEN):
            if not any(self._let_in_one_of(admission) for admission in list(self._queues)):
                return

    def _let_in_one_of(self, admission: Admission) -> bool:
        if not admission.has_waiter():
            del self._queues[admission]
            return False
        if not admission.let_in_one():
            return False
        del self._queues[admission]
        self._queues[admission] = None
        return True


class Admission:
    """Bounds the calls that Triton has, and those of callers that gave up among them.

    Args:
        in_flight: calls that Triton has at once.
        waiting: calls that wait for one of these places.
        places: shared with other admissions, whose calls count too.
        forgotten: calls of callers that gave up, from which on other calls wait; an eighth of the calls that
            Triton has if that is more.
        holds_up: seconds for which a call counts, from when it was let in, and again from when its caller
            gave up.
        narrows: callers that give up reduce the number of calls that Triton has at once.
    """

    def __init__(
        self,
        in_flight: int,
        waiting: int,
        places: Places | None = None,
        forgotten: int = _MOST_FORGOTTEN,
        holds_up: float = _HOLDS_UP,
        narrows: bool = True,
    ) -> None:
        self._most, self._most_waiting, self._most_forgotten = in_flight, waiting, forgotten
        self._holds_up, self._narrows = holds_up, narrows
        self._window = in_flight
        self._places = places or Places(in_flight)
        self._admitted = 0
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()  # a task that nothing refers to may be collected
        self._holding_up: dict[asyncio.Task[Any], asyncio.TimerHandle] = {}  # with the end of their time
        self._gone: set[asyncio.Task[Any]] = set()  # those of callers that gave up

    @property
    def in_flight(self) -> int:
        """Calls that Triton has, those of callers that gave up included."""
        return self._admitted

    @property
    def is_idle(self) -> bool:
        """Neither does Triton have a call, nor does one wait."""
        return not self._admitted and not self._waiters

    @property
    def tasks(self) -> frozenset[asyncio.Task[Any]]:
        """The calls that Triton has."""
        return frozenset(self._tasks)

    @property
    def forgotten(self) -> int:
        """Calls of callers that gave up, which Triton still has and which hold others up."""
        return len(self._gone & self._holding_up.keys())

    def check(self) -> None:
        """Check that another call may wait.

        Raises:
            FullError: too many wait.
        """
        if len(self._waiters) >= self._most_waiting and not self._may_pass():
            raise FullError(self._admitted + len(self._waiters))

    async def run(self, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Wait for a place, then run a call to its end, whatever happens to the caller.

        Args:
            start: called once there is a place; makes the coroutine of the call. May raise `GoneError`, since
                a busy event loop learns late that a caller gave up.

        Raises:
            FullError: too many wait.
            GoneError: from `start`. The place goes to the next call, as after any other error of it.
        """
        self.check()
        await self._enter()
        try:
            call = start()
        except BaseException:  # a place that is lost is lost for good
            self._give_back()
            raise
        task = asyncio.create_task(call)
        self._tasks.add(task)
        task.add_done_callback(self._leave)
        self._hold_up(task)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.done():
                self._forget(task)
            raise

    async def drain(self, seconds: float) -> None:
        """Wait until Triton has answered all calls, those of callers that gave up included."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    def has_waiter(self) -> bool:
        """Tell if a call waits."""
        while self._waiters and self._waiters[0].cancelled():
            self._waiters.popleft()
        return bool(self._waiters)

    def let_in_one(self) -> bool:
        """Let the first call in that waits, if it may pass. Not without one."""
        if not self._may_pass():
            return False
        self._take()
        self._waiters.popleft().set_result(None)
        return True

    def _may_pass(self) -> bool:
        forgotten = max(self._most_forgotten, self._admitted // _SHARE_FORGOTTEN)
        is_free = self._places.free > 0 and self._admitted < self._most
        overdue = len(self._tasks) - len(self._holding_up)
        return is_free and self._admitted - overdue < self._window and self.forgotten < forgotten

    async def _enter(self) -> None:
        if self._may_pass() and not self._waiters:
            self._take()
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(turn)
        self._places.wait(self)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was let in at the last moment
                self._give_back()
            elif turn in self._waiters:
                self._waiters.remove(turn)
            raise

    def _take(self) -> None:
        self._admitted += 1
        self._places.free -= 1

    def _give_back(self) -> None:
        self._admitted -= 1
        self._places.free += 1
        self._places.let_in()

    def _leave(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if timer := self._holding_up.pop(task, None):
            timer.cancel()
        if task not in self._gone:
            self._window = min(self._window + 1, self._most)
        self._gone.discard(task)
        self._give_back()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        """Note that the caller of a call gave up."""
        if self._narrows:
            self._window = max(self._window - _SHRINK, 1)
        self._gone.add(task)
        self._hold_up(task)
        task.add_done_callback(_retrieve)

    def _hold_up(self, task: asyncio.Task[Any]) -> None:
        """Count a call from now on for some seconds, unless it ends before."""
        if timer := self._holding_up.get(task):
            timer.cancel()
        loop = asyncio.get_running_loop()
        self._holding_up[task] = loop.call_later(self._holds_up, self._hold_up_no_more, task)

    def _hold_up_no_more(self, task: asyncio.Task[Any]) -> None:
        del self._holding_up[task]
        self._places.let_in()


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Take the error of a call that has ended; nothing else asks for it."""
    if not task.cancelled():
        task.exception()


class Admissions:
    """Admits the calls of each model by themselves, so that one model's queue holds up no other's.

    Args:
        in_flight: calls of one model that Triton has at once.
        waiting: calls of one model that wait for one of these places.
        total: calls of all models, those that wait included.
        places: calls of all models that Triton has at once; None: any number.
    """

    def __init__(self, in_flight: int, waiting: int, total: int, places: int | None = None) -> None:
        self._in_flight, self._waiting, self._total = in_flight, waiting, total
        self._places = Places(total if places is None else places)
        self._calls = 0
        self._of: dict[bytes, Admission] = {}

    @property
    def in_flight(self) -> int:
        """Calls that Triton has, those of callers that gave up included."""
        return sum(admission.in_flight for admission in self._of.values())

    def check(self, model: bytes) -> None:
        """Check that another call of a model may wait.

        Raises:
            FullError: too many calls wait.
        """
        self._check_total()
        if admission := self._of.get(model):
            admission.check()

    async def run(self, model: bytes, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Wait for a place of the model, then run a call to its end. See `Admission.run`.

        Raises:
            FullError: too many calls wait.
            GoneError: from `start`.
        """
        self._check_total()
        if len(self._of) > _MANY_NAMES:
            self._of = {name: known for name, known in self._of.items() if not known.is_idle}
        admission = self._of.get(model)
        if admission is None:
            narrows = bool(model)  # other calls cost Triton little, and a stream ends when its caller wishes
            limits = self._in_flight, self._waiting, self._places
            admission = self._of[model] = Admission(*limits, narrows=narrows)
        self._calls += 1
        try:
            return await admission.run(start)
        finally:
            self._calls -= 1

    async def drain(self, seconds: float) -> None:
        """Wait until Triton has answered all calls, those of callers that gave up included."""
        tasks = [task for admission in self._of.values() for task in admission.tasks]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)

    def _check_total(self) -> None:
        if self._calls >= self._total:
            raise FullError(self._calls)
