"""Admission of calls: their number, their order, and the calls of callers that gave up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from siglip_gateway.doors.admission import Admission, Admissions, FullError, GoneError


class Work:
    """Calls that run until they are told to end, each with its name."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.started: list[str] = []
        self._ends: dict[str, asyncio.Future[str]] = {}

    def call(self, name: str) -> asyncio.Task[str]:
        """Have a caller ask for a call."""
        return asyncio.create_task(self.admission.run(partial(self._run, name)))

    async def _run(self, name: str) -> str:
        self.started.append(name)
        self._ends[name] = asyncio.get_running_loop().create_future()
        return await self._ends[name]

    async def end(self, name: str, error: Exception | None = None) -> None:
        """End a call, and let all that follows from it happen."""
        if error is None:
            self._ends[name].set_result(name)
        else:
            self._ends[name].set_exception(error)
        await settle()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def give_up(caller: asyncio.Task[str]) -> None:
    caller.cancel()
    with suppress(asyncio.CancelledError):
        await caller
    await settle()


def check(test: Callable[[Work], Awaitable[Any]], **limits: Any) -> None:
    async def run() -> None:
        await test(Work(Admission(**({"in_flight": 100, "waiting": 100} | limits))))

    asyncio.run(run())


def test_calls_wait_in_order_for_a_place() -> None:
    async def test(work: Work) -> None:
        callers = [work.call(name) for name in "abcde"]
        await settle()
        assert work.started == ["a", "b"]
        await work.end("b")
        assert work.started == ["a", "b", "c"]
        for name in "acde":
            await work.end(name)
        assert [await caller for caller in callers] == list("abcde")
        assert work.admission.in_flight == 0

    check(test, in_flight=2)


def test_what_exceeds_the_waiting_is_refused() -> None:
    async def test(work: Work) -> None:
        callers = [work.call(name) for name in "abc"]
        await settle()
        with pytest.raises(FullError, match="3 calls"):
            await work.call("d")
        with pytest.raises(FullError):
            work.admission.check()
        await work.end("a")
        await work.end("b")
        await work.end("c")
        assert [await caller for caller in callers] == list("abc")
        work.admission.check()

    check(test, in_flight=1, waiting=2)


def test_a_caller_that_gives_up_while_it_waits_costs_nothing() -> None:
    async def test(work: Work) -> None:
        first, second, third = (work.call(name) for name in "abc")
        await settle()
        await give_up(second)
        await work.end("a")
        assert work.started == ["a", "c"]
        await work.end("c")
        assert (await first, await third) == ("a", "c")

    check(test, in_flight=1)


@pytest.mark.parametrize("steps", range(6))
def test_a_caller_that_gives_up_as_it_is_let_in_passes_its_place_on(steps: int) -> None:
    """Whatever step of the event loop it gives up in."""

    async def test(work: Work) -> None:
        first, second, third = (work.call(name) for name in "abc")
        await settle()
        work._ends["a"].set_result("a")
        for _ in range(steps):
            await asyncio.sleep(0)
        await give_up(second)
        if "b" in work.started:
            await work.end("b")
        assert work.started[-1] == "c"
        await work.end("c")
        assert (await first, await third) == ("a", "c")
        assert work.admission.in_flight == 0

    check(test, in_flight=1)


@pytest.mark.parametrize("error", [GoneError, ValueError])
def test_a_call_that_cannot_start_passes_its_place_on(error: type[Exception]) -> None:
    """Its caller has gone, for example."""

    def start() -> Coroutine[Any, Any, str]:
        raise error

    async def test(work: Work) -> None:
        first = work.call("a")
        await settle()
        gone = asyncio.create_task(work.admission.run(start))
        last = work.call("b")
        await settle()
        await work.end("a")
        assert work.started == ["a", "b"]
        await work.end("b")
        with pytest.raises(error):
            await gone
        assert [await first, await last] == ["a", "b"]
        assert work.admission.in_flight == 0

    check(test, in_flight=1)


def test_further_calls_wait_while_many_are_forgotten() -> None:
    async def test(work: Work) -> None:
        impatient = [work.call(name) for name in "ab"]
        await settle()
        for caller in impatient:
            await give_up(caller)
        assert (work.admission.forgotten, work.admission.in_flight) == (2, 2)
        patient = [work.call(name) for name in "cdef"]
        await settle()
        assert work.started == ["a", "b"]
        await work.end("a")
        assert work.started == ["a", "b", "c", "d"]  # two for one, so that the number grows again
        await work.end("c")
        assert work.started == ["a", "b", "c", "d", "e", "f"]
        for name in "bdef":
            await work.end(name)
        assert [await caller for caller in patient] == list("cdef")
        assert (work.admission.forgotten, work.admission.in_flight) == (0, 0)

    check(test, forgotten=2)


@pytest.mark.parametrize("ends", [True, False])
def test_a_call_that_triton_has_lost_does_not_hold_up_others_for_ever(
    ends: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(work: Work) -> None:
        for name in "ab":
            caller = work.call(name)
            await settle()
            await give_up(caller)
        held_back = [work.call(name) for name in "cd"]
        await settle()
        assert work.started == ["a", "b"]
        async with asyncio.timeout(10):
            while len(work.started) < 4:
                await asyncio.sleep(0.01)
        for name in "cd":
            await work.end(name)
        assert [await caller for caller in held_back] == ["c", "d"]
        assert (work.admission.forgotten, work.admission.in_flight) == (0, 2)
        if ends:
            await work.end("a", ValueError("very late"))
            assert work.admission.in_flight == 1

    async def run() -> None:
        await test(Work(Admission(100, 100, forgotten=2, holds_up=0.2)))

    asyncio.run(run())
    assert caplog.records == []


def test_a_forgotten_call_that_fails_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    async def test(work: Work) -> None:
        caller = work.call("a")
        await settle()
        await give_up(caller)
        await work.end("a", ValueError("of nobody"))
        failing = work.call("b")
        await settle()
        await work.end("b", ValueError("of its caller"))
        with pytest.raises(ValueError, match="of its caller"):
            await failing

    check(test)
    assert caplog.records == []


def test_the_end_waits_for_forgotten_calls() -> None:
    async def test(work: Work) -> None:
        caller = work.call("a")
        await settle()
        await give_up(caller)
        await work.admission.drain(0.01)
        assert work.admission.in_flight == 1
        asyncio.get_running_loop().call_later(0.05, work._ends["a"].set_result, "a")
        await work.admission.drain(10)
        assert work.admission.in_flight == 0

    check(test)


class Models:
    """Calls of several models, each of which runs until it is told to end."""

    def __init__(self, **limits: int) -> None:
        self.admissions = Admissions(**({"in_flight": 1, "waiting": 1, "total": 10} | limits))
        self.started: list[str] = []
        self.end = asyncio.Event()

    def call(self, model: str) -> asyncio.Task[None]:
        return asyncio.create_task(self.admissions.run(model.encode(), partial(self._run, model)))

    async def _run(self, model: str) -> None:
        self.started.append(model)
        await self.end.wait()


def test_the_queue_of_one_model_holds_up_no_other() -> None:
    async def run() -> None:
        models = Models()
        calls = [models.call(name) for name in ("slow", "slow", "fast")]
        await settle()
        assert models.started == ["slow", "fast"]
        with pytest.raises(FullError, match="2 calls"):
            await models.call("slow")
        models.end.set()
        await asyncio.gather(*calls)
        assert (models.started, models.admissions.in_flight) == (["slow", "fast", "slow"], 0)

    asyncio.run(run())


def test_calls_of_all_models_together_are_limited() -> None:
    async def run() -> None:
        models = Models(total=3)
        calls = [models.call(name) for name in "abc"]
        await settle()
        with pytest.raises(FullError, match="3 calls"):
            await models.call("d")
        models.end.set()
        await asyncio.gather(*calls)
        await models.call("d")

    asyncio.run(run())


def test_places_that_become_free_go_to_the_models_in_turn() -> None:
    async def run() -> None:
        models = Models(in_flight=3, waiting=10, total=100, places=4)
        calls = [models.call(name) for name in ["slow"] * 6 + ["other"] * 3 + ["third"]]
        await settle()
        assert models.started == ["slow", "slow", "slow", "other"]
        calls[0].cancel()  # forgotten, and still in its place
        await settle()
        assert len(models.started) == 4
        models.end.set()
        await asyncio.gather(*calls, return_exceptions=True)
        assert models.started[4:8] == ["other", "slow", "third", "other"]  # a slow one gave up
        assert (len(models.started), models.admissions.in_flight) == (10, 0)
        assert models.admissions._places.free == 4

    asyncio.run(run())


def test_a_place_passes_on_when_the_one_that_got_it_has_gone() -> None:
    async def run() -> None:
        models = Models(in_flight=1, waiting=10, total=100, places=1)
        first, second, third = (models.call(name) for name in "abc")
        await settle()
        models.end.set()
        for _ in range(6):  # whenever it goes: while it waits, as it is let in, or once it runs
            await asyncio.sleep(0)
            second.cancel()
        await asyncio.gather(first, second, third, return_exceptions=True)
        assert models.started[-1] == "c"
        assert models.admissions._places.free == 1

    asyncio.run(run())


def test_names_that_callers_made_up_are_forgotten() -> None:
    async def run() -> None:
        models = Models(in_flight=10)
        waiting = models.call("model")
        await settle()
        models.end.set()
        for number in range(500):
            await models.call(f"made up {number}")
        await waiting
        assert len(models.admissions._of) < 100

    asyncio.run(run())


def test_draining_waits_for_calls_of_callers_that_gave_up() -> None:
    async def run() -> None:
        models = Models()
        caller = models.call("a")
        await settle()
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)
        await models.admissions.drain(0.01)
        assert models.admissions.in_flight == 1
        asyncio.get_running_loop().call_later(0.01, models.end.set)
        await models.admissions.drain(10)
        assert models.admissions.in_flight == 0

    asyncio.run(run())


def test_many_calls_allow_for_more_that_are_forgotten() -> None:
    async def test(work: Work) -> None:
        callers = [work.call(str(number)) for number in range(80)]
        await settle()
        for number in range(10):
            await give_up(callers[number])
        held_back = work.call("held back")
        await settle()
        assert (work.admission.forgotten, len(work.started)) == (10, 80)
        await work.end("0")
        await work.end("1")
        assert work.started[-1] == "held back"
        for name in [*map(str, range(2, 80)), "held back"]:
            await work.end(name)
        assert await held_back == "held back"

    check(test, narrows=False)


async def abandon(work: Work, count: int) -> None:
    """Have callers give up calls that Triton has, and end these."""
    for number in range(count):
        caller = work.call(f"gone {number}")
        await settle()
        await give_up(caller)
        await work.end(f"gone {number}")


def test_after_calls_that_were_given_up_each_answer_lets_in_one_more() -> None:
    async def test(work: Work) -> None:
        await abandon(work, 2)
        assert work.admission.in_flight == 0
        callers = [work.call(name) for name in "abcdefgh"]
        await settle()
        rounds: list[str] = []
        while started := work.started[2 + len("".join(rounds)) :]:
            rounds.append("".join(started))
            for name in started:
                await work.end(name)
        assert rounds == ["a", "bc", "defg", "h"]
        assert [await caller for caller in callers] == list("abcdefgh")

    check(test, in_flight=8)


@pytest.mark.parametrize(("answered", "let_in"), [(7, 20), (6, 7)])
def test_fewer_calls_are_let_in_while_more_than_an_eighth_are_given_up(answered: int, let_in: int) -> None:
    async def test(work: Work) -> None:
        for part in range(40):
            await abandon(work, 1)
            for name in (f"{part} {number}" for number in range(answered)):
                caller = work.call(name)
                await settle()
                await work.end(name)
                assert await caller == name
        begin = len(work.started)
        callers = [work.call(f"last {number}") for number in range(25)]
        await settle()
        assert len(work.started) - begin == let_in
        for number in range(25):
            await work.end(f"last {number}")
        await asyncio.gather(*callers)

    check(test, in_flight=20)


def test_many_answers_make_the_window_no_wider_than_the_places() -> None:
    async def test(work: Work) -> None:
        for name in map(str, range(20)):
            caller = work.call(name)
            await settle()
            await work.end(name)
            assert await caller == name
        await abandon(work, 1)
        callers = [work.call(name) for name in "ab"]
        await settle()
        assert work.started[-1] == "a"
        for name in "ab":
            await work.end(name)
        await asyncio.gather(*callers)

    check(test, in_flight=2)


def test_a_call_that_is_never_answered_does_not_keep_the_window_closed() -> None:
    """Its caller may wait for half an hour, over HTTP."""

    async def test(work: Work) -> None:
        await abandon(work, 2)
        lost, held_back = work.call("lost"), work.call("held back")
        await settle()
        assert work.started[2:] == ["lost"]
        async with asyncio.timeout(10):
            while len(work.started) < 4:
                await asyncio.sleep(0.01)
        await work.end("held back")
        assert await held_back == "held back"
        await give_up(lost)
        assert work.admission.forgotten == 1
        await work.end("lost")
        assert (work.admission.forgotten, work.admission.in_flight) == (0, 0)

    check(test, in_flight=8, holds_up=1)


def test_the_late_end_of_a_call_that_was_given_up_is_no_answer() -> None:
    """Otherwise the window would open as soon as Triton has done with all that it was late with."""

    async def test(work: Work) -> None:
        gone = [work.call(name) for name in "abc"]
        await settle()
        for caller in gone:
            await give_up(caller)
        async with asyncio.timeout(10):
            while work.admission.forgotten:
                await asyncio.sleep(0.01)
        work.admission._holds_up = 60  # or the next call would hold up the last for a moment only
        for name in "abc":
            await work.end(name)
        callers = [work.call(name) for name in "de"]
        await settle()
        assert work.started == ["a", "b", "c", "d"]
        for name in "de":
            await work.end(name)
        await asyncio.gather(*callers)

    check(test, in_flight=8, holds_up=0.05)


@pytest.mark.parametrize(("model", "let_in"), [("siglip", 1), ("", 8)])
def test_streams_and_probes_that_their_callers_end_hold_up_no_others(model: str, let_in: int) -> None:
    async def run() -> None:
        models = Models(in_flight=8, waiting=8, total=100)
        for _ in range(2):
            caller = models.call(model)
            await settle()
            caller.cancel()
            models.end.set()
            await asyncio.gather(caller, return_exceptions=True)
            await settle()
            models.end.clear()
        calls = [models.call(model) for _ in range(8)]
        await settle()
        assert models.admissions.in_flight == let_in
        models.end.set()
        await asyncio.gather(*calls)

    asyncio.run(run())
