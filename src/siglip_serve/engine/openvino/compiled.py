"""Compile a graph for this CPU, with a fixed precision and threads that make room for other processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from siglip_serve.engine.plan import Plan
from siglip_serve.machine import available_cores

__all__ = ["Compiled"]

_HINTS = {"float32": "f32", "bfloat16": "bf16"}


class Compiled:
    """A graph with one float32 output, compiled for this CPU.

    Args:
        model: the graph.
        plan: resolved, for its dtype and threads. A CPU without bfloat16 computes it in float32.
    """

    def __init__(self, model: ov.Model, plan: Plan) -> None:
        settings = {
            # The default would turn float32 into bfloat16 wherever the processor has it.
            "INFERENCE_PRECISION_HINT": _HINTS[plan.wide_dtype],
            "INFERENCE_NUM_THREADS": plan.threads or available_cores(),
            "NUM_STREAMS": 1,
            # Threads that are bound to cores cannot move away from another process that computes there.
            "ENABLE_CPU_PINNING": False,
        }
        self._request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()

    def __call__(self, *inputs: NDArray[Any]) -> NDArray[np.float32]:
        """Compute the output of any number of rows. All inputs [n, ...] have as many.

        Raises:
            RuntimeError: out of memory for these rows (`passes.is_out_of_memory`).
        """
        try:
            outputs = self._request.infer([np.ascontiguousarray(rows) for rows in inputs], share_inputs=True)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, MemoryError) or "Failed to allocate" in str(error):
                # `passes.in_passes` then halves the pass.
                raise RuntimeError(f"OpenVINO: out of memory for {len(inputs[0])} rows") from error
            raise
        result: NDArray[np.float32] = outputs[0]
        return result
