"""Honest traffic of all models through the project's clients, whose answers are compared with right ones."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from images import encode, photo
from numpy.typing import NDArray
from players import CROPS
from siglip_serve_client import AsyncClient, Client
from siglip_serve_client.errors import ClientError

from tests.chaos.canaries import difference
from tests.chaos.server import ChaosError

__all__ = ["Ask", "Operation", "Traffic", "operations"]

_TIMEOUT = 120.0
_LOST = 150.0  # seconds after which a client that knows its timeout has lost an answer


@dataclass(frozen=True)
class Operation:
    """A call of a client's method, and the arrays of its result that are compared."""

    name: str
    method: str
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    arrays: Callable[[Any], Mapping[str, NDArray[Any]]]


@dataclass(frozen=True)
class Ask:
    """One call of a client: when it began and ended (time.monotonic()), and what was not right about it."""

    client: str
    name: str
    begin: float
    end: float
    error: str = ""
    wrong: str = ""

    @property
    def seconds(self) -> float:
        """From the call to its end."""
        return self.end - self.begin


def _itself(result: Any) -> Mapping[str, NDArray[Any]]:
    return {"": np.asarray(result)}


def _heatmaps(result: Any) -> Mapping[str, NDArray[Any]]:
    return {"heatmaps": result.heatmaps, "scores": result.scores}


def _labels(result: Any) -> Mapping[str, NDArray[Any]]:
    return {"labels": result.labels}


def operations(state: bytes) -> list[Operation]:
    """Make calls of every public model, the cheap ones several times."""
    jpeg, png = encode(photo(160, 120, 90), "JPEG"), encode(photo(90, 120, 91), "PNG")
    crops = [encode(crop, "JPEG") for crop in CROPS[:10]]
    unit = {"normalized": True}
    return [
        Operation("embed_image jpeg", "embed_image", (jpeg,), unit, _itself),
        Operation("embed_text", "embed_text", ("a photo of a dog",), unit, _itself),
        Operation("classify", "classify", (jpeg, ["dog", "a red shirt", "car"]), {}, _itself),
        Operation("embed_image png", "embed_image", (png,), unit, _itself),
        Operation("classify_teams", "classify_teams", (), {"state": state, "crops": crops[:5]}, _labels),
        Operation("embed_texts", "embed_texts", (["dog", "cat", "house"],), unit, _itself),
        Operation("explain", "explain", (png, ["dog", "grass"]), {"size": (32, 24)}, _heatmaps),
        Operation("fit_teams", "fit_teams", (), {"crops": crops}, _labels),
    ]


class Traffic:
    """Callers that ask all the time.

    Args:
        grpc, http: addresses; without `http` all callers use gRPC.
        state: of teams, from the server.
        tolerance: largest difference of a right answer.
        seed: of the order in which operations are asked.

    Attributes:
        asked: all calls that have ended.
        lost: calls without an end when the traffic was stopped.
    """

    def __init__(self, grpc: str, http: str, state: bytes, tolerance: float, seed: int) -> None:
        self._urls = [f"grpc://{grpc}", *([f"http://{http}"] if http else [])]
        self._operations = operations(state)
        self._tolerance, self._seed = tolerance, seed
        self._right: dict[str, Mapping[str, NDArray[Any]]] = {}
        self.asked: list[Ask] = []
        self.lost = 0
        self._ending = threading.Event()
        self.pause = 0.0

    async def learn(self) -> None:
        """Ask the quiet server, over each protocol.

        Raises:
            ChaosError: it fails, or answers differently over the other protocol.
        """
        for url in self._urls:
            async with AsyncClient(url, timeout=_TIMEOUT) as client:
                for operation in self._operations:
                    ask = await self._ask(client, url, operation)
                    if ask.error or ask.wrong:
                        raise ChaosError(f"{operation.name}: {ask.error}{ask.wrong}")
        self.asked.clear()

    @asynccontextmanager
    async def running(self, callers: int) -> AsyncIterator[None]:
        """Keep `callers` of each kind of client asking: AsyncClient over each protocol, and Client."""
        self._ending.clear()
        tasks = []
        for number, url in itertools.product(range(callers), self._urls):
            tasks.append(asyncio.create_task(self._asynchronous(url, number)))
        threads = [
            threading.Thread(target=self._waiting, args=(self._urls[0], n), daemon=True)
            for n in range(callers)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ending.set()
            _, left = await asyncio.wait(tasks, timeout=_LOST)
            for task in left:
                task.cancel()
            deadline = time.monotonic() + _LOST
            while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
            self.lost += len(left) + sum(thread.is_alive() for thread in threads)

    def _order(self, number: int) -> Sequence[Operation]:
        order = list(self._operations)
        random.Random(f"{self._seed}:{number}").shuffle(order)
        return order

    async def _asynchronous(self, url: str, number: int) -> None:
        async with AsyncClient(url, timeout=_TIMEOUT) as client:
            for operation in itertools.cycle(self._order(number)):
                if self._ending.is_set():
                    return
                await self._ask(client, f"AsyncClient {url.partition(':')[0]}", operation)
                await asyncio.sleep(self.pause)

    def _waiting(self, url: str, number: int) -> None:
        with Client(url, timeout=_TIMEOUT) as client:
            for operation in itertools.cycle(self._order(100 + number)):
                if self._ending.is_set():
                    return
                asyncio.run(self._ask(client, "Client", operation))
                time.sleep(self.pause)

    async def _ask(self, client: AsyncClient | Client, name: str, operation: Operation) -> Ask:
        begin, error, wrong = time.monotonic(), "", ""
        try:
            result = getattr(client, operation.method)(*operation.arguments, **operation.keywords)
            if inspect.isawaitable(result):
                result = await result
        except ClientError as failed:
            error = f"{type(failed).__name__}: {failed}"
        else:
            found = operation.arrays(result)
            apart = difference(found, self._right.setdefault(operation.name, found))
            wrong = "" if apart <= self._tolerance else f"off by {apart:g}"
        ask = Ask(name, operation.name, begin, time.monotonic(), error, wrong)
        self.asked.append(ask)
        return ask
