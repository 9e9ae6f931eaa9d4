"""Heatmaps on a GPU: the trace of one image and its explanation, recorded as the passes are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from siglip_serve.engine.fused.replays import Replays, record
from siglip_serve.engine.passes import is_out_of_memory
from siglip_serve.heatmaps.attribution import ClipExplainer, Explanation, SiglipExplainer
from siglip_serve.towers.siglip import Block, BlockTrace, TowerTrace, trace_blocks

__all__ = ["RecordedHeatmaps", "trace_stream"]

_MOST_RECORDED = 8  # vectors: more keep the GPU busy while the next kernel is launched

_AnyExplainer = SiglipExplainer | ClipExplainer


class RecordedHeatmaps:
    """Explain one image at a time.

    Args:
        trace: pixels [1, S, S, 3] uint8 on the device -> the trace that the explainers of the tower take.
        pixels: [1, S, S, 3] uint8, any content.
        device: device of the tower.
        graphs: record. See `Replays`.
    """

    def __init__(
        self,
        trace: Callable[[Tensor], TowerTrace],
        pixels: Tensor,
        device: torch.device,
        graphs: bool,
    ) -> None:
        self._trace, self._graphs = trace, graphs
        self._traces = Replays(self._trace_parts, [pixels], device, graphs)
        self._explainers: dict[tuple[_AnyExplainer, int], _RecordedExplainer | None] = {}
        # Explanations run one after the other, so all share the same memory.
        self._pool = torch.cuda.graph_pool_handle() if graphs else None

    def explain(
        self, explainer: _AnyExplainer, pixels: NDArray[np.uint8], vectors: Tensor
    ) -> Explanation[Tensor]:
        """Explain pixels [1, S, S, 3] (`VisionRunner.explain`). Its tensors hold until the next call."""
        trace, count = self._find_trace(pixels), len(vectors)
        prepared = explainer.prepare(vectors)
        if not self._graphs or count > _MOST_RECORDED:
            return explainer(trace, *prepared)
        key = explainer, count
        if key not in self._explainers:
            self._explainers[key] = self._record(explainer, trace, prepared)
        recorded = self._explainers[key]
        return recorded(prepared) if recorded else explainer(trace, *prepared)

    @torch.inference_mode()
    def _find_trace(self, pixels: NDArray[np.uint8]) -> TowerTrace:
        before, after, *parts = self._traces(pixels)
        blocks = tuple(BlockTrace(*parts[start : start + 4]) for start in range(0, len(parts), 4))
        return TowerTrace(before, blocks, after)

    def _trace_parts(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """[1, S, S, 3] uint8 -> the parts of a `TowerTrace`, one after the other"""
        found = self._trace(pixels)
        parts = [
            part for block in found.blocks for part in (block.queries, block.keys, block.values, block.mlp)
        ]
        return found.before, found.after, *parts

    def _record(
        self, explainer: _AnyExplainer, trace: TowerTrace, prepared: Sequence[Tensor]
    ) -> _RecordedExplainer | None:
        """Record an explainer, or return None if there is no memory for it. It then runs unrecorded."""
        try:
            return _RecordedExplainer(explainer, trace, prepared, self._pool)
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
    """An explainer's work on one trace and P vectors, recorded.

    Args:
        trace: tensors that are written anew before each call.
        prepared: what the explainer prepared for the vectors.
        pool: memory pool of the recording.
    """

    def __init__(
        self, explainer: _AnyExplainer, trace: TowerTrace, prepared: Sequence[Tensor], pool: Any
    ) -> None:
        self._prepared = [tensor.clone() for tensor in prepared]
        self._graph, self._found = record(lambda: explainer(trace, *self._prepared), pool)

    @torch.inference_mode()
    def __call__(self, prepared: Sequence[Tensor]) -> Explanation[Tensor]:
        """Explain by as many vectors. The result holds until the next call."""
        for target, source in zip(self._prepared, prepared, strict=True):
            target.copy_(source)
        self._graph.replay()
        return self._found
