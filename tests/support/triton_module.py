"""The part of Triton's Python module that the models use, for tests without a server.

Triton gives `triton_python_backend_utils` to its model processes only. This module has the same names.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from numpy.typing import NDArray

__all__ = ["Request", "installed"]

_NAME = "triton_python_backend_utils"


class Tensor:
    """A named array."""

    def __init__(self, name: str, array: NDArray[Any]) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        """Return the name."""
        return self._name

    def as_numpy(self) -> NDArray[Any]:
        """Return the array."""
        return self._array

    def shape(self) -> tuple[int, ...]:
        """Return the array's shape."""
        return self._array.shape


class Request:
    """One request, as Triton hands it to a model.

    Args:
        inputs: arrays by name.
        outputs: names of the outputs that are asked for.
        parameters: of the request.
    """

    def __init__(
        self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str], parameters: Mapping[str, Any]
    ) -> None:
        self.inputs, self._outputs, self._parameters = dict(inputs), list(outputs), json.dumps(parameters)

    def parameters(self) -> str:
        """Return the parameters as JSON."""
        return self._parameters

    def requested_output_names(self) -> list[str]:
        """Return the names of the outputs that are asked for."""
        return self._outputs


class TritonError:
    """An error with its status."""

    INVALID_ARG, UNAVAILABLE, INTERNAL = range(3)

    def __init__(self, message: str, code: int) -> None:
        self.text, self.code = message, code


class TritonModelException(Exception):  # noqa: N818 - Triton's name
    """A model cannot start."""


class InferenceResponse:
    """The outputs of one request, or its error."""

    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self.arrays = {tensor.name(): tensor.as_numpy() for tensor in output_tensors}
        self.error = error


class MetricFamily:
    """Metrics that count nothing."""

    COUNTER, HISTOGRAM = range(2)

    def __init__(self, **_: Any) -> None:
        """Take any description."""

    def Metric(self, **_: Any) -> MetricFamily:  # noqa: N802 - Triton's name
        """Return a metric."""
        return self

    def increment(self, _: float) -> None:
        """Count nothing."""

    def observe(self, _: float) -> None:
        """Count nothing."""


def _input(request: Request, name: str) -> Tensor | None:
    return Tensor(name, request.inputs[name]) if name in request.inputs else None


@contextmanager
def installed() -> Iterator[None]:
    """Let `siglip_serve.serving` import this module as Triton's until the block ends."""
    module = ModuleType(_NAME)
    for part in (Tensor, TritonError, TritonModelException, InferenceResponse, MetricFamily):
        setattr(module, part.__name__, part)
    module.get_input_tensor_by_name = _input  # type: ignore[attr-defined]
    sys.modules[_NAME] = module
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.startswith("siglip_serve.serving")]:
            del sys.modules[name]
        del sys.modules[_NAME]
