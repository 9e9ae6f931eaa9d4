"""What the clients do, without how: operations that yield the steps which somebody else performs.

An operation is a generator. It yields a `Call`, a `Register`, a `Withdraw` or a `Pause`, is sent the answer
or thrown the error, and returns its result. So `Client` and `AsyncClient` share everything but the waiting.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from siglip_serve_client.errors import DeadlineError, ServerError, UnavailableError

__all__ = [
    "Answer",
    "Call",
    "Describe",
    "Operation",
    "Pause",
    "Register",
    "Step",
    "Tensor",
    "Withdraw",
    "Work",
    "ask",
    "output",
    "strings",
]

# Seconds before a request is sent again that the server was too busy for; each is drawn from its half to it.
_BACK_OFF = (0.2, 0.6, 2.0, 6.0)

T = TypeVar("T")


@dataclass(frozen=True)
class Tensor:
    """An input: an array, or the name of a shared memory region that holds its bytes.

    Attributes:
        array: of objects (bytes) for BYTES; None with a region.
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
    """One request to a model; `timeout` is in seconds. Without `outputs` it is answered with all of them."""

    model: str
    inputs: Sequence[Tensor]
    parameters: Mapping[str, str | bool] = field(default_factory=dict)
    timeout: float = 120.0
    outputs: Sequence[str] = ()


@dataclass(frozen=True)
class Register:
    """Let the server know the region `name` of `size` bytes, which lies under the same name in /dev/shm."""

    name: str
    size: int


@dataclass(frozen=True)
class Withdraw:
    """Let the server forget a region."""

    name: str


@dataclass(frozen=True)
class Describe:
    """Ask for the string parameters in the configuration of a model."""

    model: str
    timeout: float


@dataclass(frozen=True)
class Pause:
    """Wait so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Work:
    """Call a function that reads files or computes, where it holds nobody up."""

    function: Callable[[], Any]


class Answer(Protocol):
    """What a server answered."""

    def as_numpy(self, name: str) -> NDArray[Any] | None:
        """An output by its name; None if there is none."""


Step: TypeAlias = Call | Describe | Register | Withdraw | Pause | Work
Operation: TypeAlias = Generator[Step, Any, T]


def ask(call: Call) -> Operation[Answer]:
    """The model's answer; a server that is too busy is asked again, within the call's timeout.

    Raises:
        ClientError: as the server answers, or does not.
    """
    deadline = time.monotonic() + call.timeout
    for longest in (*_BACK_OFF, None):
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlineError(f"{call.model} did not answer within {call.timeout:g} s")
        try:
            answer: Answer = yield replace(call, timeout=left)
        except UnavailableError as error:
            # Who did not answer in time may still be at work, and nobody is there to ask again.
            if type(error) is not UnavailableError or longest is None:
                raise
        else:
            return answer
        yield Pause(min(random.uniform(longest / 2, longest), max(deadline - time.monotonic(), 0)))
    raise AssertionError("the last attempt returns or raises")


def output(answer: Answer, name: str) -> NDArray[Any]:
    """An output that must be there."""
    array = answer.as_numpy(name)
    if array is None:
        raise ServerError(f"the answer has no output {name}")
    return np.asarray(array)


def strings(name: str, argument: str, values: Sequence[bytes], columns: bool = False) -> Tensor:
    """A BYTES tensor [n], with `columns` [n, 1]."""
    for value in values:
        if not isinstance(value, bytes):
            raise TypeError(f"{argument}: {type(value).__name__}, expected bytes")
    shape = (len(values), 1) if columns else (len(values),)
    array = np.empty(len(values), dtype=np.object_)
    array[:] = values
    return Tensor(name, "BYTES", shape, array.reshape(shape))
