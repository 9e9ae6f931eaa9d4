"""Compile a graph for this CPU, with a fixed precision and threads that yield to neighbours."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray

from siglip_serve.engine.plan import Plan
from siglip_serve.machine import available_cores

__all__ = ["Compiled"]

_HINTS = {"float32": "f32", "bfloat16": "bf16"}


class Compiled:
    """A graph with one input and one float32 output, compiled for this CPU.

    Attributes:
        precision: of the arithmetic, `f32` or `bf16`; a CPU without bfloat16 computes that in float32.
    """

    def __init__(self, model: ov.Model, plan: Plan) -> None:
        settings = {
            # Without this float32 would become bfloat16 wherever the processor has it.
            "INFERENCE_PRECISION_HINT": _HINTS[plan.wide_dtype],
            "INFERENCE_NUM_THREADS": plan.threads or available_cores(),
            "NUM_STREAMS": 1,
            # Threads bound to cores cannot move away from a neighbour that computes there.
            "ENABLE_CPU_PINNING": False,
        }
        compiled = ov.Core().compile_model(model, "CPU", settings)
        self.precision: str = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self._request = compiled.create_infer_request()

    def __call__(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """The output of `rows`, of any number.

        Raises:
            torch.OutOfMemoryError: not enough memory for so many rows.
        """
        try:
            outputs = self._request.infer([np.ascontiguousarray(rows)], share_inputs=True)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, MemoryError) or "Failed to allocate" in str(error):
                # As torch says it: whoever divides rows into passes knows this one.
                raise torch.OutOfMemoryError(f"OpenVINO: no memory for {len(rows)} rows") from error
            raise
        result: NDArray[np.float32] = outputs[0]
        return result
