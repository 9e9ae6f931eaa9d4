"""Read one Triton request: its inputs and parameters, checked."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from siglip_serve.embeddings.unit import check_values
from siglip_serve.errors import InvalidInputError, ParameterError, UnavailableError

__all__ = ["Request", "has_input"]

# One vocabulary for all models, since the steps of an ensemble all see the request's parameters.
_PARAMETERS = frozenset(
    {"base64_encoded", "color_order", "embed_model", "normalized", "softmax", "truncation"}
)
_ARRIVED = "arrived"  # microseconds of this machine's monotonic clock; the doors say when a request came
# Strategies of transformers, which clients of other SigLIP repositories send. A text is one sequence, so all
# that cut are the same.
_STRATEGIES = {"longest_first": True, "only_first": True, "only_second": True, "do_not_truncate": False}


class Request:
    """One request's inputs and parameters.

    Args:
        request: Triton's own `InferenceRequest`.

    Raises:
        ParameterError: a parameter is unknown, or not UTF-8.
        UnavailableError: the request has waited for longer than its `timeout`, so that its caller has gone.
    """

    __slots__ = ("_parameters", "_request")

    def __init__(self, request: Any) -> None:
        self._request = request
        try:
            text = request.parameters() or ""
        except UnicodeDecodeError as error:
            raise ParameterError(f"a parameter's name or value is not UTF-8 ({error.reason})") from error
        self._parameters = _read_parameters(text)
        if _ARRIVED in self._parameters:
            self._check_time()

    def strings(self, name: str) -> list[bytes]:
        """Return the rows of a BYTES input [n] or [n, 1], none if it was not sent."""
        tensor = pb_utils.get_input_tensor_by_name(self._request, name)
        if tensor is None:
            return []
        array = tensor.as_numpy()
        if array.ndim > 2 or array.shape[1:] not in {(), (1,)}:
            raise InvalidInputError(f"{name}: got shape {list(array.shape)}, expected [rows, 1]")
        return [bytes(row) for row in array.reshape(-1)]

    def has(self, name: str) -> bool:
        """Tell if an optional input was sent."""
        return has_input(self._request, name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an input that was sent."""
        return tuple(self._tensor(name).shape())

    def optional(self, name: str, rows: int, dtype: Any) -> NDArray[Any] | None:
        """Return an optional input of `dtype` and shape [rows], or None if it was not sent."""
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
        """Return an input of `dtype` and shape [n, *shape], with n at least `least`."""
        array: NDArray[Any] = self._tensor(name).as_numpy()
        if array.shape[1:] != tuple(shape) or array.dtype != dtype:
            raise InvalidInputError(
                f"{name}: got {array.dtype} {list(array.shape)}, "
                f"expected {np.dtype(dtype)} {['rows', *shape]}"
            )
        if len(array) < least:
            raise InvalidInputError(f"{name}: no rows, expected at least one")
        return array

    def finite(self, name: str, shape: Sequence[int]) -> NDArray[np.float32]:
        """Return an input [n, *shape] FP32 without NaN, infinities and values that would overflow."""
        array: NDArray[np.float32] = self.array(name, shape, np.float32)
        check_values(name, array)
        return array

    def option(self, name: str, choices: Sequence[str]) -> str:
        """Return the one text of an optional BYTES input, or the first of `choices` if it was not sent."""
        rows = self.strings(name)
        if not rows:
            return choices[0]
        given = rows[0].decode("utf-8", "replace")
        if len(rows) > 1 or given not in choices:
            got = f"{len(rows)} values" if len(rows) > 1 else repr(given[:100])
            raise InvalidInputError(f"{name}: got {got}, expected one of {', '.join(choices)}")
        return given

    def flag(self, name: str, others: str = "") -> bool:
        """Return a boolean parameter, false unless given.

        HTTP headers that Triton forwards arrive as the texts `true` and `false`. `others` ends the message
        that names the expected values.
        """
        value = self._parameters.get(name, False)
        if isinstance(value, str) and value.lower() in {"true", "false"}:
            return value.lower() == "true"
        if not isinstance(value, bool):
            raise ParameterError(f"parameter {name!r}: got {value!r}, expected true or false{others}")
        return value

    def truncates(self) -> bool:
        """Return the parameter `truncation`, false unless given: a boolean or the name of a strategy."""
        given = self._parameters.get("truncation", False)
        if given is False:
            return False
        if isinstance(given, str) and given.lower() in _STRATEGIES:
            return _STRATEGIES[given.lower()]
        return self.flag("truncation", ", or one of " + ", ".join(_STRATEGIES))

    def choice(self, name: str, choices: str) -> str:
        """Return a parameter that is one of the comma-separated `choices`, by default the first."""
        allowed = _split(choices)
        value = self._parameters.get(name, allowed[0])
        if value not in allowed:
            raise ParameterError(f"parameter {name!r}: got {value!r}, expected one of {', '.join(allowed)}")
        return str(value)

    def has_parameter(self, name: str) -> bool:
        """Tell if a parameter was sent."""
        return name in self._parameters

    def _check_time(self) -> None:
        """Refuse a request that has waited for as long as Triton's own parameter `timeout` says."""
        try:
            arrived = int(self._parameters[_ARRIVED])
        except (TypeError, ValueError):
            got = self._parameters[_ARRIVED]
            raise ParameterError(f"parameter {_ARRIVED!r}: got {got!r}, expected microseconds") from None
        limit = self._request.timeout()
        if limit and time.monotonic_ns() // 1000 - arrived > limit:
            raise UnavailableError("Request timeout expired")

    def _tensor(self, name: str) -> Any:
        """Return a required input.

        Triton only counts the inputs, so an optional one may stand for a required one that is missing.
        """
        tensor = pb_utils.get_input_tensor_by_name(self._request, name)
        if tensor is None:
            raise InvalidInputError(f"{name}: missing")
        return tensor

    def wanted(self) -> list[str]:
        """Return the names of the outputs that the caller asked for."""
        return list(self._request.requested_output_names())


def has_input(request: Any, name: str) -> bool:
    """Tell if Triton's own request has an optional input."""
    return pb_utils.get_input_tensor_by_name(request, name) is not None


def _read_parameters(text: str) -> Mapping[str, Any]:
    """Parameters by name, from their JSON."""
    # They may come as HTTP headers, whose names have no case.
    parameters = {name.lower(): value for name, value in json.loads(text or "{}").items()}
    for name in parameters:
        if name not in _PARAMETERS and name != _ARRIVED and not name.startswith("triton_"):
            known = ", ".join(sorted(_PARAMETERS))
            raise ParameterError(f"parameter {name!r}: unknown; the parameters are {known}")
    return parameters


@lru_cache(maxsize=16)
def _split(choices: str) -> list[str]:
    return [choice.strip() for choice in choices.split(",")]
