"""Answer Triton's requests, each on its own or the rows of many as one batch.

An error belongs to the request that caused it, never to its neighbours in a batch.
"""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any, Generic, Protocol, TypeVar

import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from siglip_serve.embeddings.unit import l2_normalize
from siglip_serve.errors import InvalidInputError, SiglipServeError, UnavailableError
from siglip_serve.serving.context import Context
from siglip_serve.serving.counters import RefusalCounter
from siglip_serve.serving.request import Request

__all__ = ["BatchModel", "Computed", "Outputs", "RequestModel", "log_fault", "respond_each", "select"]

# An exception that reaches Triton fails every request of the batch and shows the caller a file path. So
# all are answered that numpy, torch and the decoders raise over one request's data.
_ANSWERED = (SiglipServeError, MemoryError, RuntimeError, ValueError, TypeError, LookupError, OSError)

Outputs = Mapping[str, NDArray[Any]]
Part = TypeVar("Part", bound=Sized)
Own = TypeVar("Own")
Own_co = TypeVar("Own_co", covariant=True)


class Computed(Protocol[Own_co]):
    """Results for the rows of a batch."""

    def rows(self, start: int, end: int) -> Own_co:
        """Return the results of rows `start` to `end`, or raise the error that concerns them."""


class RequestModel(ABC):
    """A model of the repository that answers each request on its own."""

    def __init__(self, context: Context) -> None:
        self._refusals = context.refusals

    @abstractmethod
    def answer(self, request: Request) -> Outputs:
        """Compute the outputs of one request."""

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return one response per request."""
        return respond_each(requests, self.answer, self._refusals)


class BatchModel(ABC, Generic[Part, Own]):
    """A model of the repository that computes the rows of several requests as one batch."""

    def __init__(self, context: Context) -> None:
        self._refusals = context.refusals

    @abstractmethod
    def read(self, request: Request) -> Part:
        """Return a request's rows, checked, as something whose length is their number."""

    @abstractmethod
    def compute(self, parts: Sequence[Part], requests: Sequence[Request]) -> Computed[Own]:
        """Compute the rows of several requests, in this order."""

    @abstractmethod
    def finish(self, request: Request, own: Own) -> Outputs:
        """Turn the results of a request's own rows into its outputs."""

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return one response per request, with the rows of all valid ones computed together."""
        responses: list[Any] = [None] * len(requests)
        valid: list[tuple[int, Request, Part]] = []
        for index, raw in enumerate(requests):
            try:
                request = Request(raw)
                valid.append((index, request, self.read(request)))
            except _ANSWERED as error:
                responses[index] = _refusal(error, self._refusals)
        if not valid:
            return responses
        try:
            computed = self.compute([own for _, _, own in valid], [request for _, request, _ in valid])
        except _ANSWERED as error:  # a fault of the device or of torch concerns every row
            for index, _, _ in valid:
                responses[index] = _refusal(error, self._refusals)
            return responses
        start = 0
        for index, request, own in valid:
            end = start + len(own)
            try:
                responses[index] = _response(self.finish(request, computed.rows(start, end)))
            except _ANSWERED as error:
                responses[index] = _refusal(error, self._refusals)
            start = end
        return responses


def respond_each(
    requests: Sequence[Any], answer: Callable[[Request], Outputs], refusals: RefusalCounter
) -> list[Any]:
    """Return one response per request, each by a call of its own."""
    responses = []
    for raw in requests:
        try:
            responses.append(_response(answer(Request(raw))))
        except _ANSWERED as error:
            responses.append(_refusal(error, refusals))
    return responses


def select(request: Request, outputs: Outputs) -> Outputs:
    """Keep the outputs that the caller asked for, at unit length if the request says `normalized`."""
    asked = {name: outputs[name] for name in request.wanted() if name in outputs}
    if request.flag("normalized"):
        asked = {name: l2_normalize(array) for name, array in asked.items()}
    return asked


def log_fault(error: Exception) -> None:
    """Write a fault that no caller has caused to the server's log."""
    pb_utils.Logger.log_error("".join(traceback.format_exception(error)))


def _response(outputs: Outputs) -> Any:
    tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items()]
    return pb_utils.InferenceResponse(output_tensors=tensors)


def _refusal(error: Exception, refusals: RefusalCounter) -> Any:
    refusals.add(error)
    codes = pb_utils.TritonError
    if isinstance(error, InvalidInputError):
        return _error(str(error), codes.INVALID_ARG)
    if isinstance(error, MemoryError):
        error = UnavailableError("not enough memory for this request; try again later")
    if isinstance(error, UnavailableError):
        return _error(str(error), codes.UNAVAILABLE)
    log_fault(error)  # the caller cannot help it, and the text may name files of this machine
    return _error(f"internal error ({type(error).__name__}), see the server's log", codes.INTERNAL)


def _error(message: str, code: int) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
