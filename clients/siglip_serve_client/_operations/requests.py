"""Requests to models, and the transport that carries them.

The operations of this package are coroutines. `AsyncClient` awaits them, and `Client` runs them in an event
loop in a thread. One image takes the same road as each of many.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from siglip_serve_client.errors import ServerError

__all__ = [
    "CONTROL_TIMEOUT",
    "Answer",
    "Call",
    "Tensor",
    "Transport",
    "output",
    "refuse_single",
    "refuse_unknown",
    "strings",
    "utf8",
]

CONTROL_TIMEOUT = 30.0  # seconds for registering a region of shared memory
_GRACE = 0.25  # seconds that the server's refusal has to arrive, or a quarter of a shorter timeout
_LONGEST = 1e9  # seconds: some limit for a timeout without end


@dataclass(frozen=True)
class Tensor:
    """An input: an array, or the name of a shared memory region that holds its bytes.

    Attributes:
        array: of objects (bytes) for BYTES, or None with a region.
        region, size: the region, and how many of its bytes are the tensor's.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    array: NDArray[Any] | None = None
    region: str = ""
    size: int = 0


@dataclass(frozen=True)
class Call:
    """One request to a model.

    Attributes:
        timeout: in seconds.
        outputs: the outputs to return, or all of them if none is named.
    """

    model: str
    inputs: Sequence[Tensor]
    parameters: Mapping[str, str | bool] = field(default_factory=dict)
    timeout: float = 120.0
    outputs: Sequence[str] = ()

    @property
    def microseconds(self) -> int:
        """The time that the request may wait in a queue, as Triton's request parameter `timeout`.

        It ends a little before the call's timeout, so that the server's refusal arrives in time. It is at
        least 1, because Triton takes 0 for no limit.
        """
        waiting = max(self.timeout - _GRACE, self.timeout * 0.75)
        return max(1, round(min(waiting, _LONGEST) * 1e6))


class Answer(Protocol):
    """The outputs of a model."""

    def as_numpy(self, name: str) -> NDArray[Any] | None:
        """An output by its name, or None if there is none."""


class Transport(Protocol):
    """A way to the server. It belongs to the event loop that uses it first. Its methods raise ClientError."""

    async def infer(self, call: Call) -> Answer:
        """Send a request and return the model's answer."""

    async def parameters(self, model: str, timeout: float) -> dict[str, str]:
        """The string parameters in the configuration of a model."""

    async def register(self, name: str, size: int) -> None:
        """Let the server know the region `name` of `size` bytes. It lies in /dev/shm under this name."""

    async def withdraw(self, name: str) -> None:
        """Let the server forget a region."""

    async def close(self) -> None:
        """Close the connections."""


def output(answer: Answer, name: str) -> NDArray[Any]:
    """An output that must be there.

    Raises:
        ServerError: it is not.
    """
    array = answer.as_numpy(name)
    if array is None:
        raise ServerError(f"the answer has no output {name}")
    return np.asarray(array)


def strings(name: str, argument: str, values: Sequence[bytes], columns: bool = False) -> Tensor:
    """A BYTES tensor [n], with `columns` [n, 1].

    Raises:
        TypeError: a value is not bytes. The message names `argument`.
    """
    for value in values:
        if not isinstance(value, bytes):
            raise TypeError(f"{argument}: {type(value).__name__}, expected bytes")
    shape = (len(values), 1) if columns else (len(values),)
    array = np.empty(len(values), dtype=np.object_)
    array[:] = values
    return Tensor(name, "BYTES", shape, array.reshape(shape))


def refuse_single(argument: str, values: object, what: str) -> None:
    """Check that an argument is not one value in place of several, whose characters or bytes would be taken.

    Args:
        argument: its name in messages.
        values: as the caller gave them.
        what: the values that are expected, such as "texts".

    Raises:
        TypeError: one path, str or bytes.
    """
    if isinstance(values, str | bytes | bytearray | memoryview | Path):
        raise TypeError(f"{argument}: one {type(values).__name__}, expected several {what}")


def refuse_unknown(function: str, given: Collection[str], known: Collection[str]) -> None:
    """Check the names of keyword arguments that a method hands on.

    Args:
        function: name of the method in messages.
        given: as the caller wrote them.
        known: those that the method has.

    Raises:
        TypeError: a name is not known. The message has the nearest one.
    """
    unknown = sorted(set(given) - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"{function}() has no argument {unknown[0]!r}{hint}")


def utf8(argument: str, texts: Sequence[str], first: int = 0) -> list[bytes]:
    """Texts as bytes. `first` is the index of the first for messages.

    Raises:
        TypeError: not a sequence of texts.
    """
    refuse_single(argument, texts, "texts")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{argument}[{first + index}]: {type(text).__name__}, expected str")
    return [text.encode() for text in texts]
