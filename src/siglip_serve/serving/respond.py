"""What the Triton models share: settings, dimensions, rows in, rows out, errors of single requests.

A `model.py` is glue of a few lines over this module: it names the library call, this module does the
rest. Row counts are each request's own; an error belongs to the request that caused it and never to
its neighbours in a batch.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from siglip_serve.checkpoint.config import ModelConfig, load_config, tensor_dims
from siglip_serve.checkpoint.files import resolve
from siglip_serve.config import Settings, load_settings
from siglip_serve.engine.turns import Turns, peers_name
from siglip_serve.errors import (
    START_REFUSED,
    InvalidInputError,
    ParameterError,
    SiglipServeError,
    UnavailableError,
)
from siglip_serve.serving.counters import RefusalMeter

if TYPE_CHECKING:
    from siglip_serve.engine.passes import Batch

__all__ = [
    "Context",
    "Request",
    "RowBuffer",
    "fill_dims",
    "has_input",
    "log_fault",
    "map_rows",
    "open_context",
    "open_turns",
    "readable_start",
    "respond_each",
    "respond_together",
]


# Read by torch's OpenMP when torch is first imported, which is later than here. Threads that spin while
# they wait take the cores from the other model processes: five times the throughput on two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# One vocabulary for all models, since the steps of an ensemble all see the request's parameters.
_PARAMETERS = frozenset(
    {"base64_encoded", "color_order", "embed_model", "normalized", "softmax", "truncation"}
)

_LONGEST_REMEMBERED = 256

# An exception that reaches Triton fails every request of the batch and shows the caller a file path. So
# everything is answered that numpy, torch and the decoders raise over one request's data.
_ANSWERED = (SiglipServeError, MemoryError, RuntimeError, ValueError, TypeError, LookupError, OSError)

Item = TypeVar("Item")
Part = TypeVar("Part", bound=Sized)
Row = NDArray[Any]
Outputs = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Context:
    """What a model knows when it starts.

    Attributes:
        settings: from the environment and the model's parameters.
        config: the JSON files of the checkpoint that this model takes.
        device: `cpu`, or `cuda:<index>` as Triton placed the instance.
        model: its name in the repository.
        refusals: counts what it refuses.
        shared: whether the server has several processes of this model on the device.
    """

    settings: Settings
    config: ModelConfig
    device: str
    model: str
    refusals: RefusalMeter
    shared: bool


def open_context(args: Mapping[str, str]) -> Context:
    """The context of a model instance, from the arguments of `initialize`.

    Raises:
        SettingsError, CheckpointError: with a message for the operator.
    """
    described = json.loads(args["model_config"])
    settings, config = _read(described)
    gpu = args["model_instance_kind"] == "GPU"
    device = f"cuda:{args['model_instance_device_id']}" if gpu else "cpu"
    model = args["model_name"]
    shared = any(group["count"] > 1 for group in described["instance_group"])
    return Context(settings, config, device, model, RefusalMeter(model), shared)


def open_turns(context: Context) -> Turns:
    """The turns of this process with those that compute the same on its device."""
    if not context.shared or context.settings.turns == "off":
        return Turns("")
    try:
        return Turns(peers_name(context.model, context.device))
    except OSError as error:
        pb_utils.Logger.log_warn(f"{context.model}: its processes compute without turns: {error}")
        return Turns("")


def fill_dims(model: Any) -> Any:
    """Complete the dimensions that a `config.pbtxt` leaves to the checkpoint.

    The launcher has done so already; this serves a tritonserver that somebody starts by hand.

    Args:
        model: the `pb_utils.ModelConfig` of `auto_complete_config`.
    """
    described = model.as_dict()
    _, config = _read(described)
    dims = tensor_dims(config)
    for tensors, add in (("input", model.add_input), ("output", model.add_output)):
        for tensor in described[tensors]:
            if tensor["name"] in dims:
                add({key: tensor[key] for key in ("name", "data_type")} | {"dims": dims[tensor["name"]]})
    return model


def _read(model_config: Mapping[str, Any]) -> tuple[Settings, ModelConfig]:
    parameters = {key: value["string_value"] for key, value in model_config.get("parameters", {}).items()}
    with readable_start():
        settings = load_settings(parameters=parameters)
        return settings, load_config(resolve(settings.own_checkpoint))


@contextmanager
def readable_start() -> Iterator[None]:
    """Errors of our own end a model's start with one marked line, which the launcher shows."""
    try:
        yield
    except SiglipServeError as error:
        raise pb_utils.TritonModelException(f"{START_REFUSED}{error}") from None


class RowBuffer:
    """Memory in which the rows of several requests become one batch.

    It is kept, since fresh memory costs a page fault for every 4 kB, and it is overwritten by the next batch.

    Args:
        staging: [most rows, ...] that a device reads faster than other memory; larger batches lie elsewhere.
    """

    def __init__(self, staging: NDArray[Any] | None = None) -> None:
        self._staging = staging
        self._rows: NDArray[Any] = np.empty(0)

    def join(self, parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """The parts [n, ...], of one dtype and trailing shape, one after the other."""
        count = sum(map(len, parts))
        if self._staging is not None and count <= len(self._staging):
            return np.concatenate(parts, out=self._staging[:count])
        if len(parts) == 1:
            return parts[0]
        if count > len(self._rows):
            self._rows = np.empty((count, *parts[0].shape[1:]), parts[0].dtype)
        return np.concatenate(parts, out=self._rows[:count])


class Request:
    """One request's inputs and parameters, checked."""

    __slots__ = ("_parameters", "_request")

    def __init__(self, request: Any) -> None:
        self._request = request
        text = request.parameters() or ""
        read = _read_parameters if len(text) <= _LONGEST_REMEMBERED else _read_parameters.__wrapped__
        self._parameters = read(text)

    def strings(self, name: str) -> list[bytes]:
        """The rows of a BYTES input of shape [n] or [n, 1]; none if it is optional and was not sent."""
        tensor = pb_utils.get_input_tensor_by_name(self._request, name)
        if tensor is None:
            return []
        array = tensor.as_numpy()
        if array.ndim > 2 or array.shape[1:] not in {(), (1,)}:
            raise InvalidInputError(f"{name}: got shape {list(array.shape)}, expected [rows, 1]")
        return [bytes(row) for row in array.reshape(-1)]

    def has(self, name: str) -> bool:
        """Whether an optional input was sent."""
        return has_input(self._request, name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an input that was sent."""
        return tuple(pb_utils.get_input_tensor_by_name(self._request, name).shape())

    def optional(self, name: str, rows: int, dtype: Any) -> NDArray[Any] | None:
        """An optional input of `dtype` and shape [rows]; None if it was not sent."""
        tensor = pb_utils.get_input_tensor_by_name(self._request, name)
        if tensor is None:
            return None
        array: NDArray[Any] = tensor.as_numpy()
        if array.shape != (rows,) or array.dtype != dtype:
            raise InvalidInputError(
                f"{name}: got {array.dtype} {list(array.shape)}, expected {np.dtype(dtype)} [{rows}]"
            )
        return array

    def array(self, name: str, shape: Sequence[int], dtype: Any, least: int = 1) -> NDArray[Any]:
        """An input of `dtype` and shape [n, *shape]; n is at least `least`."""
        array: NDArray[Any] = pb_utils.get_input_tensor_by_name(self._request, name).as_numpy()
        if array.shape[1:] != tuple(shape) or array.dtype != dtype:
            raise InvalidInputError(
                f"{name}: got {array.dtype} {list(array.shape)}, "
                f"expected {np.dtype(dtype)} {['rows', *shape]}"
            )
        if len(array) < least:
            raise InvalidInputError(f"{name}: no rows, expected at least one")
        return array

    def flag(self, name: str) -> bool:
        """A boolean parameter, false unless given; forwarded HTTP headers arrive as `true` or `false`."""
        value = self._parameters.get(name, False)
        if isinstance(value, str) and value.lower() in {"true", "false"}:
            return value.lower() == "true"
        if not isinstance(value, bool):
            raise ParameterError(f"parameter {name!r}: got {value!r}, expected true or false")
        return value

    def choice(self, name: str, choices: str) -> str:
        """A parameter that must be one of the comma-separated `choices`; the first one unless given."""
        allowed = _split(choices)
        value = self._parameters.get(name, allowed[0])
        if value not in allowed:
            raise ParameterError(f"parameter {name!r}: got {value!r}, expected one of {', '.join(allowed)}")
        return str(value)

    def has_parameter(self, name: str) -> bool:
        """Whether a parameter was sent."""
        return name in self._parameters

    def wanted(self) -> list[str]:
        """The outputs that the caller asked for."""
        return list(self._request.requested_output_names())


def has_input(request: Any, name: str) -> bool:
    """Whether Triton's request has an optional input."""
    return pb_utils.get_input_tensor_by_name(request, name) is not None


@lru_cache(maxsize=256)
def _read_parameters(text: str) -> Mapping[str, Any]:
    """Parameters by name, from their JSON, which is the same for most requests."""
    # They may come as HTTP headers, whose names have no case.
    parameters = {name.lower(): value for name, value in json.loads(text or "{}").items()}
    for name in parameters:
        if name not in _PARAMETERS and not name.startswith("triton_"):
            known = ", ".join(sorted(_PARAMETERS))
            raise ParameterError(f"parameter {name!r}: unknown; the parameters are {known}")
    return parameters


@lru_cache(maxsize=16)
def _split(choices: str) -> list[str]:
    return [choice.strip() for choice in choices.split(",")]


def map_rows(name: str, rows: Sequence[Item], function: Callable[[Item], Row]) -> NDArray[Any]:
    """`function` of every row, stacked.

    Raises:
        InvalidInputError: names each row that was refused, by its index.
    """
    done: list[Row] = []
    refused: list[InvalidInputError] = []
    if not len(rows):
        raise InvalidInputError(f"{name}: no rows, expected at least one")
    for index, row in enumerate(rows):
        try:
            done.append(function(row))
        except InvalidInputError as error:
            refused.append(error.at(name, index))
    if refused:
        shown = "; ".join(str(error) for error in refused[:5])
        more = f"; and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise type(refused[0])(shown + more)
    return np.asarray(done[0])[np.newaxis] if len(done) == 1 else np.stack(done)


def respond_each(
    requests: Sequence[Any], answer: Callable[[Request], Outputs], refusals: RefusalMeter
) -> list[Any]:
    """One response a request, each by a call of its own."""
    return [_answer_one(answer, raw, refusals) for raw in requests]


def respond_together(
    requests: Sequence[Any],
    read: Callable[[Request], Part],
    compute: Callable[[Sequence[Part], Sequence[Request]], Batch],
    finish: Callable[[Request, Outputs], Outputs],
    refusals: RefusalMeter,
) -> list[Any]:
    """One response a request; the rows of all valid requests are computed as one batch.

    Args:
        requests: as Triton hands them to `execute`.
        read: a request -> its rows, as many as it has.
        compute: the rows of several requests, and the requests -> outputs of all rows, in this order.
        finish: a request and its own rows of the outputs -> what it is answered.
        refusals: counts what is refused.
    """
    responses: list[Any] = [None] * len(requests)
    valid: list[tuple[int, Request, Part]] = []
    for index, raw in enumerate(requests):
        try:
            request = Request(raw)
            valid.append((index, request, read(request)))
        except _ANSWERED as error:
            responses[index] = _refusal(error, refusals)
    if not valid:
        return responses
    try:
        batch = compute([own for _, _, own in valid], [request for _, request, _ in valid])
        failures = bool(batch.failed.any())
    except _ANSWERED as error:  # a fault of the device or of torch concerns every row
        for index, _, _ in valid:
            responses[index] = _refusal(error, refusals)
        return responses
    start = 0
    for index, request, own in valid:
        end = start + len(own)
        try:
            if failures:
                outputs = batch.rows(start, end)
            else:
                outputs = {name: array[start:end] for name, array in batch.outputs.items()}
            responses[index] = _response(finish(request, outputs))
        except _ANSWERED as error:
            responses[index] = _refusal(error, refusals)
        start = end
    return responses


def _answer_one(answer: Callable[[Request], Outputs], raw: Any, refusals: RefusalMeter) -> Any:
    try:
        return _response(answer(Request(raw)))
    except _ANSWERED as error:
        return _refusal(error, refusals)


def _response(outputs: Outputs) -> Any:
    tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items()]
    return pb_utils.InferenceResponse(output_tensors=tensors)


def _refusal(error: Exception, refusals: RefusalMeter) -> Any:
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


def log_fault(error: Exception) -> None:
    """Tell the server's log of a fault that no caller has made."""
    pb_utils.Logger.log_error("".join(traceback.format_exception(error)))


def _error(message: str, code: int) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
