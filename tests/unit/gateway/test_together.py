"""Single inputs that share requests to Triton: who waits for whom, and who fails with whom."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, ParamSpec

import numpy as np
import pytest
from gateways import PNG, WIDTH, StandIn, encoded, vector
from numpy.typing import NDArray
from siglip_serve_client.errors import (
    ClientError,
    DeadlineError,
    InvalidInputError,
    ModelDiedError,
    UnavailableError,
)

from siglip_gateway.backend import Backend
from siglip_gateway.inputs import File, Picture, Resolved, Text
from siglip_gateway.together import Together

P = ParamSpec("P")


def in_a_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """A test as a coroutine, in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


class Sender:
    """Embeds texts, one request after another being let through. `bad` ones end their request."""

    def __init__(self, error: ClientError | None = None) -> None:
        self.error = error or InvalidInputError("INPUT_TEXT[0]: bad")
        self.calls: list[list[str]] = []
        self.gate = asyncio.Semaphore(0)

    async def send(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.calls.append(list(texts))
        await self.gate.acquire()
        if "bad" in texts:
            raise self.error
        return np.stack([vector(text) for text in texts])

    def open(self) -> None:
        for _ in range(1000):
            self.gate.release()


async def _settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def _asked(together: Together[str], texts: Sequence[str]) -> list[asyncio.Task[NDArray[np.float32]]]:
    tasks = [asyncio.create_task(together.embed(text)) for text in texts]
    await _settled()
    return tasks


@in_a_loop
async def test_inputs_go_at_once_while_few_are_in_flight() -> None:
    sender = Sender()
    tasks = await _asked(Together(sender.send, 4, 60.0), [str(n) for n in range(8)])
    assert sender.calls == [[str(n)] for n in range(8)]
    sender.open()
    for number, task in enumerate(tasks):
        assert np.array_equal(await task, vector(str(number))[None])


@in_a_loop
async def test_inputs_that_wait_share_a_request_in_their_order() -> None:
    sender = Sender()
    tasks = await _asked(Together(sender.send, 4, 60.0), [str(n) for n in range(8 + 6)])
    assert len(sender.calls) == 8
    sender.gate.release()
    await _settled()
    assert sender.calls[8:] == [["8", "9", "10", "11"]]
    sender.open()
    for number, task in enumerate(tasks):
        assert np.array_equal(await task, vector(str(number))[None])
    assert sender.calls[9:] == [["12", "13"]]


@in_a_loop
async def test_large_inputs_do_not_share_a_request() -> None:
    sender = Sender()
    large = [str(n) * 2**19 for n in range(3)]
    tasks = await _asked(Together(sender.send, 4, 60.0), [*map(str, range(8)), *large, "x" * 2**21])
    sender.open()
    await asyncio.gather(*tasks)
    assert [[text[0] for text in texts] for texts in sender.calls[8:]] == [["0", "1"], ["2"], ["x"]]


@pytest.mark.parametrize("error", [InvalidInputError("INPUT_TEXT[0]: bad"), ModelDiedError("died")])
@in_a_loop
async def test_a_bad_input_fails_alone(error: ClientError) -> None:
    sender = Sender(error)
    tasks = await _asked(Together(sender.send, 4, 60.0), [*map(str, range(8)), "a", "bad", "b"])
    sender.open()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert found[9] is error
    for index, text in ((8, "a"), (10, "b")):
        assert np.array_equal(np.asarray(found[index]), vector(text)[None])
    assert sender.calls[8:] == [["a", "bad", "b"], ["a"], ["bad"], ["b"]]


@in_a_loop
async def test_a_busy_server_is_not_asked_again_for_each_input() -> None:
    sender = Sender(UnavailableError("busy"))
    tasks = await _asked(Together(sender.send, 4, 60.0), [*map(str, range(8)), "a", "bad", "b"])
    sender.open()
    found = await asyncio.gather(*tasks[8:], return_exceptions=True)
    assert [type(error) for error in found] == [UnavailableError] * 3
    assert len(sender.calls) == 9


@in_a_loop
async def test_an_input_does_not_wait_for_ever() -> None:
    sender = Sender()
    tasks = await _asked(Together(sender.send, 4, 0.05), [str(n) for n in range(9)])
    await asyncio.sleep(0.1)
    sender.open()
    with pytest.raises(DeadlineError, match=r"the inference server was busy for 0\.05 s"):
        await tasks[8]
    assert sender.calls == [[str(n)] for n in range(8)]
    assert np.array_equal(await tasks[0], vector("0")[None])


@in_a_loop
async def test_a_caller_that_gave_up_leaves_the_others_alone() -> None:
    sender = Sender()
    tasks = await _asked(Together(sender.send, 4, 60.0), [*map(str, range(8)), "a", "b"])
    tasks[8].cancel()
    await _settled()
    sender.open()
    assert np.array_equal(await tasks[9], vector("b")[None])
    with pytest.raises(asyncio.CancelledError):
        await tasks[8]
    assert sender.calls[8:] == [["b"]]


@in_a_loop
async def test_a_caller_that_gave_up_long_ago_leaves_the_others_alone() -> None:
    sender = Sender()
    tasks = await _asked(Together(sender.send, 4, 0.05), [*map(str, range(8)), "a"])
    tasks[8].cancel()
    await asyncio.sleep(0.1)
    sender.open()
    assert np.array_equal(await tasks[7], vector("7")[None])
    assert sender.calls[8:] == []


@in_a_loop
async def test_only_inputs_with_the_same_parameters_share_a_request() -> None:
    stand_in = StandIn(gate=asyncio.Event())
    backend = Backend(stand_in)
    png = encoded(PNG).encode()
    inputs: list[Resolved] = [Text("t", "a"), Picture("p", png), File("f", PNG)]
    asked = [(item, normalized) for item in inputs for normalized in (True, False) for _ in range(10)]
    tasks = [asyncio.create_task(backend.embed([item], normalized, False)) for item, normalized in asked]
    await _settled()
    assert stand_in.gate is not None
    stand_in.gate.set()
    for (item, normalized), task in zip(asked, tasks, strict=True):
        content = "a" if isinstance(item, Text) else PNG
        assert np.array_equal(await task, vector(content)[None] * (1 if normalized else 2))
    pictures = {"texts": 0, "images": 0}
    for kind, count, *_ in stand_in.calls:
        pictures[kind] += count
    assert pictures == {"texts": 20, "images": 40}
    assert len(stand_in.calls) == 6 * 9  # eight at once, and two together


@in_a_loop
async def test_errors_of_shared_requests_name_the_input_of_the_caller() -> None:
    stand_in = StandIn(gate=asyncio.Event())
    backend = Backend(stand_in)
    tasks = [
        asyncio.create_task(backend.embed([Text(f"texts[{n}]", text)], True, False))
        for n, text in enumerate(["a"] * 8 + ["b", "too long", "c"])
    ]
    await _settled()
    assert stand_in.gate is not None
    stand_in.gate.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(found[9], InvalidInputError)
    assert str(found[9]).startswith("texts[9]: ")
    assert np.asarray(found[10]).shape == (1, WIDTH)
