"""Heatmaps on a GPU: the trace of one image and its explanation, recorded as the passes are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from siglip_serve.engine.fused.replays import Replays, record
from siglip_serve.engine.passes import is_out_of_memory
from siglip_serve.heatmaps.attribution import ClipExplainer, Explanation, SiglipExplainer
from siglip_serve.towers.siglip import Block, TowerTrace, trace_blocks

__all__ = ["RecordedHeatmaps", "Traced", "trace_stream"]

_MOST_RECORDED = 8  # vectors: more keep the GPU busy while the next kernel is launched

_AnyExplainer = SiglipExplainer | ClipExplainer
_Found = Explanation[Tensor]


class Traced(Protocol):
    """A tower on the device, whose heatmaps are computed in two recorded steps."""

    def trace(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """[1, S, S, 3] uint8 -> tensors [1, ...], what `explain` reads"""

    def explain(self, explainer: Any, trace: Sequence[Tensor], prepared: Sequence[Tensor]) -> _Found:
        """Explain the image of a trace by vectors as the explainer prepared them."""


class RecordedHeatmaps:
    """Explain one image at a time.

    Args:
        tower: computes the steps.
        pixels: [1, S, S, 3] uint8, any content.
        device: device of the tower.
        graphs: record. See `Replays`.
    """

    def __init__(self, tower: Traced, pixels: Tensor, device: torch.device, graphs: bool) -> None:
        self._tower, self._graphs = tower, graphs
        self._traces = Replays(tower.trace, [pixels], device, graphs)
        self._explainers: dict[tuple[_AnyExplainer, int], _RecordedExplainer | None] = {}
        # Explanations run one after the other, so all share the same memory.
        self._pool = torch.cuda.graph_pool_handle() if graphs else None

    @torch.inference_mode()
    def explain(self, explainer: _AnyExplainer, pixels: NDArray[np.uint8], vectors: Tensor) -> _Found:
        """Explain pixels [1, S, S, 3] (`VisionRunner.explain`). Its tensors hold until the next call."""
        trace, count = self._traces(pixels), len(vectors)
        prepared = explainer.prepare(vectors)
        compute = partial(self._tower.explain, explainer, trace)
        if not self._graphs or count > _MOST_RECORDED:
            return compute(prepared)
        key = explainer, count
        if key not in self._explainers:
            self._explainers[key] = self._record(compute, prepared)
        recorded = self._explainers[key]
        return recorded(prepared) if recorded else compute(prepared)

    def _record(
        self, compute: Callable[[Sequence[Tensor]], _Found], prepared: Sequence[Tensor]
    ) -> _RecordedExplainer | None:
        """Record an explanation, or return None if there is no memory for it. It then runs unrecorded."""
        try:
            return _RecordedExplainer(compute, prepared, self._pool)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None


def trace_stream(stream: Tensor, layers: Sequence[Block], dtype: torch.dtype) -> TowerTrace:
    """Trace the residual stream [T, W] float32 of one image through blocks, with products in `dtype`."""
    # Without a cache of weights: a recording must not keep what it computes for the next one.
    with torch.autocast(stream.device.type, dtype, cache_enabled=False):
        return trace_blocks(stream[None], layers)


class _RecordedExplainer:
    """The explanation of a trace by P vectors, recorded.

    Args:
        compute: explains by vectors as an explainer prepared them. It reads tensors that are written anew
            before each call.
        prepared: for any P vectors.
        pool: memory pool of the recording.
    """

    def __init__(
        self, compute: Callable[[Sequence[Tensor]], _Found], prepared: Sequence[Tensor], pool: Any
    ) -> None:
        self._inputs = [tensor.clone() for tensor in prepared]
        self._held = prepared
        self._graph, self._found = record(lambda: compute(self._inputs), pool)

    @torch.inference_mode()
    def __call__(self, prepared: Sequence[Tensor]) -> _Found:
        """Explain by as many vectors. The result holds until the next call."""
        # The same prompts are asked for again and again, and an explainer keeps what it prepared for them.
        if prepared is not self._held:
            for target, source in zip(self._inputs, prepared, strict=True):
                target.copy_(source)
            self._held = prepared
        self._graph.replay()
        return self._found
