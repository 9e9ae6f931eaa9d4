"""Towers on NVIDIA GPUs: recorded once for every batch size, then replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from siglip_serve.checkpoint.config import ImageConfig
from siglip_serve.engine.buckets import BUCKETS, rows_of_a_pass
from siglip_serve.engine.fused import kernels
from siglip_serve.engine.fused.blocks import Blocks, Levers, Stack
from siglip_serve.engine.fused.float8 import Float8Blocks, draw_pictures
from siglip_serve.engine.passes import Arrays, Finish, is_out_of_memory
from siglip_serve.errors import SettingsError
from siglip_serve.heatmaps.attribution import Explanation, SiglipExplainer
from siglip_serve.towers.siglip import (
    AttentionPooling,
    Block,
    BlockTrace,
    Encoder,
    TextTower,
    TowerTrace,
    VisionEmbeddings,
    VisionTower,
    trace_blocks,
)

__all__ = ["FusedText", "FusedVision"]

_CALIBRATION_TOKENS = 12_000
_FLOAT8_MULTIPLE = 16  # of the sides of a matrix of 8 bits
_ALIGNMENT = 8  # elements: rows of a matrix product begin at multiples of 16 bytes
_RECORDED_VECTORS = (
    8  # so many prompts of a heatmap at most: more keep the GPU busy while the next is launched
)

_ALL_LEVERS = Levers()
_Computed = TypeVar("_Computed")


class FusedVision:
    """uint8 pixels -> outputs; takes the tower over.

    Args:
        tower: on the CPU, float32.
        image: the checkpoint's normalisation.
        device: a CUDA device.
        dtype: bfloat16 or float16; of what is not float8.
        levers: what is on.
        max_rows: no larger batch is recorded; 0: as fits the device.
        blocks: how many of the last blocks heatmaps are rolled back through.

    Attributes:
        staging: on GPUs, uint8 [rows, S, S, 3] in memory that the device reads by itself: pixels that a
            caller puts there are not copied on the way. To be left alone until their outputs have been
            waited for.
    """

    def __init__(
        self,
        tower: VisionTower,
        image: ImageConfig,
        device: torch.device,
        dtype: torch.dtype,
        levers: Levers,
        max_rows: int = 0,
        blocks: int = 0,
    ) -> None:
        tower.to(device)
        self._tokens, self._width = tower.context, tower.config.hidden_size
        self._embed = _PatchEmbedding(tower.embeddings, image, dtype, levers.fold)
        # Heatmaps are traced through the blocks as they read, whose matrices are rounded as those of the
        # stack; but to 16 bits where that has 8.
        self._device, self._dtype = device, dtype
        self._before = len(tower.encoder.layers) - blocks
        self._traced = _layers(tower.encoder)[self._before :]
        if not levers.float8:
            _round_matrices(self._traced, dtype)
        self._blocks = _vision_stack(tower, image, dtype, levers)
        _round_matrices(self._traced, dtype)
        self._head = _FoldedPooling(tower.head, dtype) if levers.fold else tower.head.to(dtype)
        size = tower.config.image_size
        rows = torch.zeros(rows_of_a_pass(self._tokens, max_rows), size, size, 3, dtype=torch.uint8)
        self._replays = _Replays(self._forward, rows, device, levers.graphs)
        self._traces = _Replays(self._trace, rows[:1], device, levers.graphs)
        self._graphs = levers.graphs
        self._explainers: dict[tuple[SiglipExplainer, int], _RecordedExplainer | None] = {}
        # One after the other they run in the same memory.
        self._pool = torch.cuda.graph_pool_handle() if levers.graphs else None
        self.max_rows = self._replays.max_rows
        self.staging: NDArray[np.uint8] | None = None
        if device.type == "cuda":
            self.staging = torch.cat([rows, rows]).pin_memory().numpy()

    @torch.inference_mode()
    def __call__(self, pixels: NDArray[np.uint8], /, wanted: Sequence[str]) -> Finish:
        """The wanted outputs of pixels [n, S, S, 3]."""
        tokens, embedding = self._replays(pixels)
        compute: dict[str, Callable[[], Tensor]] = {
            "EMBEDDING": lambda: embedding,
            "MEAN_EMBEDDING": lambda: tokens.mean(dim=1, dtype=torch.float32),
            "PATCH_EMBEDDINGS": lambda: tokens,
        }
        return self._replays.fetch({name: compute[name]() for name in wanted})

    def explain(self, explainer: SiglipExplainer, pixels: NDArray[np.uint8], vectors: Tensor) -> Explanation:
        """As `VisionRunner`."""
        trace, count = self.trace(pixels), len(vectors)
        if not self._graphs or count > _RECORDED_VECTORS:
            return explainer(trace, vectors.to(self._device))
        key = explainer, count
        if key not in self._explainers:
            self._explainers[key] = self._record_explainer(explainer, trace, vectors.to(self._device))
        recorded = self._explainers[key]
        return recorded(vectors) if recorded else explainer(trace, vectors.to(self._device))

    @torch.inference_mode()
    def trace(self, pixels: NDArray[np.uint8]) -> TowerTrace:
        """What the blocks that heatmaps go back through compute of pixels [1, S, S, 3].

        Its tensors hold until the next call.
        """
        before, after, *parts = self._traces(pixels)
        blocks = tuple(BlockTrace(*parts[start : start + 4]) for start in range(0, len(parts), 4))
        return TowerTrace(before, blocks, after)

    def _record_explainer(
        self, explainer: SiglipExplainer, trace: TowerTrace, vectors: Tensor
    ) -> _RecordedExplainer | None:
        """None if there is no memory for it: then the explainer runs as it is, with what there is."""
        try:
            return _RecordedExplainer(explainer, trace, vectors, self._pool)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None

    def replay_of(self, rows: int) -> Callable[[], object]:
        """What computes the embedding of `rows` rows that lie on the device already; for measurements."""
        return torch.inference_mode()(self._replays.replay_of(rows))

    def _forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[n, S, S, 3] uint8 -> tokens [n, T, W], embedding [n, W] float32"""
        x = self._embed(pixels)  # [n * T, W]
        x = self._blocks(x, len(pixels))
        tokens = x.view(len(pixels), self._tokens, self._width)
        return tokens, self._head(tokens).float()

    def _trace(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """[1, S, S, 3] uint8 -> the parts of a `TowerTrace`, one after the other"""
        stream = self._blocks.stream(self._embed(pixels), len(pixels), self._before)
        # Without a cache of weights: what a recording computes must not be kept for the next one.
        with torch.autocast(self._device.type, self._dtype, cache_enabled=False):
            found = trace_blocks(stream.view(len(pixels), self._tokens, self._width), self._traced)
        parts = [
            part for block in found.blocks for part in (block.queries, block.keys, block.values, block.mlp)
        ]
        return found.before, found.after, *parts


class _RecordedExplainer:
    """What an explainer makes of one trace and so many vectors, recorded.

    Args:
        trace: whose tensors are written anew before each call.
        vectors: [P, D] on the device.
        pool: what to take memory from.
    """

    def __init__(self, explainer: SiglipExplainer, trace: TowerTrace, vectors: Tensor, pool: Any) -> None:
        self._vectors = vectors.clone()
        self._graph, self._found = _record(lambda: explainer(trace, self._vectors), pool)

    @torch.inference_mode()
    def __call__(self, vectors: Tensor) -> Explanation:
        """The explanation for vectors [P, D], until the next call."""
        self._vectors.copy_(vectors)
        self._graph.replay()
        return self._found


class FusedText:
    """Token ids -> EMBEDDING; arguments as for `FusedVision`. Its products stay in 16 bits."""

    def __init__(
        self,
        tower: TextTower,
        device: torch.device,
        dtype: torch.dtype,
        max_rows: int = 0,
        levers: Levers = _ALL_LEVERS,
    ) -> None:
        tower.to(device)
        self._words = tower.embeddings.token_embedding.weight.to(dtype)
        self._positions = tower.embeddings.position_embedding.weight.to(dtype)
        self._blocks = Blocks(_layers(tower.encoder), tower.final_layer_norm, dtype, levers)
        self._head = tower.head.to(dtype)
        rows = torch.zeros(rows_of_a_pass(tower.context, max_rows), tower.context, dtype=torch.int64)
        self._replays = _Replays(self._forward, rows, device, levers.graphs)
        self.max_rows = self._replays.max_rows

    @torch.inference_mode()
    def __call__(self, ids: NDArray[np.int64], /, wanted: Sequence[str]) -> Finish:  # noqa: ARG002 - one output
        """EMBEDDING [n, P] of ids [n, T]."""
        (embedding,) = self._replays(ids)
        return self._replays.fetch({"EMBEDDING": embedding})

    def _forward(self, ids: Tensor) -> tuple[Tensor]:
        """[n, T] int64 -> embedding [n, P] float32"""
        x = F.embedding(ids, self._words) + self._positions  # [n, T, W]
        x = self._blocks(x.view(-1, x.shape[-1]), len(ids))
        return (self._head(x.view(len(ids), -1, x.shape[-1])[:, -1]).float(),)


class _PatchEmbedding:
    """uint8 pixels [n, S, S, 3] -> [n * T, W] of the tower's dtype, positions included."""

    def __init__(
        self, embeddings: VisionEmbeddings, image: ImageConfig, dtype: torch.dtype, fold: bool
    ) -> None:
        conv, positions = embeddings.patch_embedding, embeddings.position_embedding.weight.detach()
        self._fold, self._dtype = fold, dtype
        self._grid, self._patch = round(len(positions) ** 0.5), conv.kernel_size[0]
        device = positions.device
        self._rescale = image.rescale
        self._mean, self._std = (torch.tensor(v, device=device) for v in (image.mean, image.std))
        if not fold:
            self._conv, self._positions = conv.to(dtype), positions.to(dtype)
            return
        # Whole numbers up to 255 are exact in 16 bits, and small when the middle is taken off.
        self._centre = (self._mean / self._rescale).round()
        factor, shift = self._rescale / self._std, (self._centre * self._rescale - self._mean) / self._std
        weight = conv.weight.detach().permute(0, 2, 3, 1)  # [W, p, p, 3]
        bias = (weight * shift).sum((1, 2, 3)) + (0 if conv.bias is None else conv.bias.detach())
        self._positions = (positions + bias).to(dtype)
        weight = (weight * factor).flatten(1)  # [W, p * p * 3]
        self._weight = F.pad(weight, (0, -weight.shape[1] % _ALIGNMENT)).to(dtype).t()

    def __call__(self, pixels: Tensor) -> Tensor:
        n, grid, patch = len(pixels), self._grid, self._patch
        if not self._fold:
            x = pixels.permute(0, 3, 1, 2)
            x = (x * self._rescale - self._mean.view(3, 1, 1)) / self._std.view(3, 1, 1)
            return (self._conv(x.to(self._dtype)).flatten(2).transpose(1, 2) + self._positions).flatten(0, 1)
        patches = torch.empty(n * grid * grid, self._weight.shape[0], dtype=self._dtype, device=pixels.device)
        kernels.cut_patches(pixels, patch, self._centre, patches)
        x = self._positions.repeat(n, 1)
        return x.addmm_(patches, self._weight)


class _FoldedPooling:
    """The MAP head. Its query is a constant, so the scores of all heads are one product with the tokens."""

    def __init__(self, head: AttentionPooling, dtype: torch.dtype) -> None:
        attention = head.attention
        heads, depth = attention.num_heads, attention.head_dim
        w_q, w_k, w_v = (w.detach() for w in attention.in_proj_weight.chunk(3))
        b_q, _, b_v = (b.detach() for b in attention.in_proj_bias.chunk(3))  # b_k is the same for all tokens
        query = F.linear(head.probe.detach()[0, 0], w_q, b_q).view(heads, depth) * depth**-0.5
        keys = torch.einsum("hd,hdw->wh", query, w_k.view(heads, depth, -1))
        self._keys = keys.to(dtype)  # [W, H]
        self._values = w_v.view(heads, depth, -1).transpose(1, 2).to(dtype)  # [H, W, W/H]
        self._bias = b_v.view(heads, 1, depth).to(dtype)
        self._out = attention.out_proj.to(dtype)
        self._norm = head.layernorm.to(dtype)
        self._mlp = head.mlp.to(dtype)

    def __call__(self, tokens: Tensor) -> Tensor:
        """[n, T, W] -> [n, W], not normalised"""
        scores = (tokens @ self._keys).transpose(1, 2)  # [n, H, T]
        weights = scores.softmax(-1, dtype=torch.float32).to(tokens.dtype)
        pooled = (weights @ tokens).transpose(0, 1)  # [H, n, W]
        values = torch.baddbmm(self._bias, pooled, self._values)  # [H, n, W/H]
        x = self._out(values.transpose(0, 1).flatten(1))  # [n, W]
        return x + self._mlp(self._norm(x))


def _vision_stack(tower: VisionTower, image: ImageConfig, dtype: torch.dtype, levers: Levers) -> Stack:
    layers = _layers(tower.encoder)
    if not levers.float8:
        return Blocks(layers, tower.post_layernorm, dtype, levers)
    config = tower.config
    if config.hidden_size % _FLOAT8_MULTIPLE or config.intermediate_size % _FLOAT8_MULTIPLE:
        raise SettingsError(
            f"dtype float8: hidden_size {config.hidden_size} and intermediate_size "
            f"{config.intermediate_size} have to be multiples of {_FLOAT8_MULTIPLE}; use bfloat16"
        )
    rows = -(-_CALIBRATION_TOKENS // tower.context)
    pixels = torch.from_numpy(draw_pictures(rows, tower.config.image_size))
    embed = _PatchEmbedding(tower.embeddings, image, torch.float32, fold=True)
    tokens = embed(pixels.to(tower.post_layernorm.weight.device)).view(rows, tower.context, -1)
    return Float8Blocks(layers, tower.post_layernorm, levers, tokens)


def _round_matrices(layers: Sequence[Block], dtype: torch.dtype) -> None:
    for layer in layers:
        for linear in (layer.self_attn.qkv_proj, layer.self_attn.out_proj, layer.mlp.fc1, layer.mlp.fc2):
            linear.weight.data = linear.weight.data.to(dtype)


def _layers(encoder: Encoder) -> list[Block]:
    return cast("list[Block]", list(encoder.layers))


class _Slot:
    """Where rows wait on their way to the device."""

    def __init__(self, rows: Tensor, device: torch.device) -> None:
        # Copies from pageable memory go through a buffer of the driver's and block the caller.
        self.host = rows.pin_memory()
        self.device = self.host.to(device)
        self.copied, self.read = torch.cuda.Event(), torch.cuda.Event()


class _Replays:
    """A computation on a GPU, recorded for several numbers of rows.

    Args:
        compute: rows on the device -> tensors with as many rows; runs the same kernels every time.
        rows: as many as will ever come in one call.
        device: where.
        graphs: whether to record.

    Attributes:
        max_rows: of one call; fewer than `rows` if there is no memory for more.
    """

    def __init__(
        self,
        compute: Callable[[Tensor], tuple[Tensor, ...]],
        rows: Tensor,
        device: torch.device,
        graphs: bool,
    ) -> None:
        self._compute, self._device = compute, device
        self._input = rows.to(device)
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]] = {}
        self.max_rows = len(rows)
        if device.type == "cuda":
            # Two, so that one is filled while the other one's rows are computed.
            self._slots = [_Slot(rows, device), _Slot(rows, device)]
            self._copies = torch.cuda.Stream(device)
        if graphs:
            self._record_all()

    def __call__(self, rows: NDArray[Any]) -> tuple[Tensor, ...]:
        """The computed tensors of n <= max_rows rows, on the device; the next call overwrites them."""
        n = len(rows)
        self._send(rows)
        return tuple(output[:n] for output in self.replay_of(n)())

    def replay_of(self, n: int) -> Callable[[], tuple[Tensor, ...]]:
        """What computes the first n rows, and perhaps some more, of what lies in the input."""
        if not self._recorded:
            return lambda: self._compute(self._input[:n])
        graph, outputs = self._recorded[min(size for size in self._recorded if size >= n)]

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return outputs

        return replay

    def fetch(self, tensors: dict[str, Tensor]) -> Finish:
        """Start to copy tensors to the host; the returned function waits for them, float32."""
        if self._device.type != "cuda":
            arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
            return lambda: arrays
        hosts = {}
        for name, tensor in tensors.items():
            hosts[name] = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=True)
            hosts[name].copy_(tensor.float(), non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def finish() -> Arrays:
            done.synchronize()
            return {name: host.numpy() for name, host in hosts.items()}

        return finish

    def _send(self, rows: NDArray[Any]) -> None:
        """The rows into the input: a full batch by a stream of its own, while the call before computes."""
        n, source = len(rows), torch.from_numpy(rows)
        if self._device.type != "cuda":
            self._input[:n].copy_(source)
            return
        slot = self._slots[0]
        self._slots.reverse()
        slot.copied.synchronize()
        if not source.is_pinned():
            source = slot.host[:n].copy_(source)
        compute = torch.cuda.current_stream(self._device)
        if n < self.max_rows:  # alone, as a rule: fewer calls count more than overlap
            self._input[:n].copy_(source, non_blocking=True)
            slot.copied.record(compute)
            return
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(slot.read)
            slot.device[:n].copy_(source, non_blocking=True)
            slot.copied.record()
        compute.wait_event(slot.copied)
        self._input[:n].copy_(slot.device[:n])
        slot.read.record(compute)

    @torch.inference_mode()
    def _record_all(self) -> None:
        pool = torch.cuda.graph_pool_handle()
        sizes = {size for size in BUCKETS if size < self.max_rows} | {self.max_rows}
        for rows in sorted(sizes, reverse=True):  # the largest first: the others fit into its memory
            try:
                self._recorded[rows] = _record(partial(self._compute, self._input[:rows]), pool)
            except RuntimeError as error:
                if rows == 1 or not is_out_of_memory(error):
                    raise
        self.max_rows = max(self._recorded)


def _record(compute: Callable[[], _Computed], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, _Computed]:
    """A graph of what `compute` does, and what it returned, which each replay writes anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, allocates and chooses, which a recording must not
        compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = compute()
    return graph, outputs
