"""Towers on NVIDIA GPUs: recorded once for every batch size, then replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from siglip_serve.checkpoint.model_config import ClipTextConfig, ImageConfig
from siglip_serve.engine.buckets import rows_of_a_pass
from siglip_serve.engine.fused.blocks import Blocks, Stack, round_matrices
from siglip_serve.engine.fused.clip import ClipImages
from siglip_serve.engine.fused.float8 import Float8Blocks, draw_pictures
from siglip_serve.engine.fused.folded import FoldedPatchEmbedding, FoldedPooling
from siglip_serve.engine.fused.heatmaps import RecordedHeatmaps, Traced, trace_stream
from siglip_serve.engine.fused.replays import Replays
from siglip_serve.engine.passes import Finish
from siglip_serve.errors import SettingsError
from siglip_serve.heatmaps.attribution import ClipExplainer, Explanation, SiglipExplainer
from siglip_serve.towers.clip import ClipTextTower, ClipVisionTower
from siglip_serve.towers.clip_rules import end_places
from siglip_serve.towers.load import AnyTextTower, AnyVisionTower
from siglip_serve.towers.naflex import NaflexVisionTower
from siglip_serve.towers.siglip import Block, BlockTrace, TowerTrace, VisionTower

__all__ = ["FusedText", "FusedVision", "make_stack"]

_CALIBRATION_TOKENS = 12_000
_FLOAT8_MULTIPLE = 16  # of the sides of a matrix of 8 bits
# Recorded lengths of CLIP's texts besides the whole context. Most labels fit into the first.
_CLIP_LENGTHS = (16, 32)


class _Images(Traced, Protocol):
    """A vision tower on the device, whose passes a runner records."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[n, S, S, 3] uint8 -> what `patches` takes, [n, ...], and the embedding [n, E] float32"""

    def patches(self, tokens: Tensor) -> Tensor:
        """Compute the tokens of the patches [n, T, W], unrecorded. This may overwrite the argument."""


class FusedVision:
    """Run a SigLIP or CLIP tower: uint8 pixels -> outputs. On a GPU all passes are recorded at the start.

    Args:
        tower: on the CPU, float32. The runner takes it over.
        image: the checkpoint's normalisation.
        device: a CUDA device. On a CPU, for tests, nothing is recorded.
        dtype: bfloat16 or float16, for what is not float8.
        float8: compute three of the four products of a block in 8 bits. See `float8.py`. For SigLIP only.
        max_rows: largest batch that is recorded. 0 is the largest that is worth it.
        blocks: how many of the last blocks heatmaps of SigLIP are rolled back through.

    Attributes:
        max_rows: most rows of one call.
        replays: the recorded passes.
        staging: on GPUs, uint8 [rows, S, S, 3] in pinned memory, with room for two passes. Pixels that a
            caller writes there are not copied on the way to the device. They must stay unchanged until their
            outputs have been waited for.

    Raises:
        SettingsError: float8, and the tower's widths are not multiples of 16.
    """

    def __init__(
        self,
        tower: AnyVisionTower,
        image: ImageConfig,
        device: torch.device,
        dtype: torch.dtype,
        float8: bool = False,
        max_rows: int = 0,
        blocks: int = 0,
    ) -> None:
        tower.to(device)
        self._images: _Images
        if isinstance(tower, ClipVisionTower):
            self._images = ClipImages(tower, image, dtype)
        else:
            self._images = _SiglipImages(tower, image, dtype, float8, blocks)
        size, graphs = tower.config.image_size, device.type == "cuda"
        most = rows_of_a_pass(tower.config.grid_size**2, max_rows)  # of patches, as the server counts
        rows = torch.zeros(most, size, size, 3, dtype=torch.uint8)
        self.replays = Replays(self._images.forward, [rows], device, graphs)
        self._heatmaps = RecordedHeatmaps(self._images, rows[:1], device, graphs)
        self.max_rows = self.replays.max_rows
        self.staging: NDArray[np.uint8] | None = None
        if device.type == "cuda":
            self.staging = torch.cat([rows, rows]).pin_memory().numpy()

    @torch.inference_mode()
    def __call__(self, pixels: NDArray[np.uint8], /, wanted: Sequence[str]) -> Finish:
        """Start a pass over pixels [n, S, S, 3]. See `Runner`."""
        tokens, embedding = self.replays(pixels)
        if set(wanted) - {"EMBEDDING"}:
            tokens = self._images.patches(tokens)
        compute: dict[str, Callable[[], Tensor]] = {
            "EMBEDDING": lambda: embedding,
            "MEAN_EMBEDDING": lambda: tokens.mean(dim=1, dtype=torch.float32),
            "PATCH_EMBEDDINGS": lambda: tokens,
        }
        return self.replays.fetch({name: compute[name]() for name in wanted})

    def explain(
        self, explainer: SiglipExplainer | ClipExplainer, pixels: NDArray[np.uint8], vectors: Tensor
    ) -> Explanation[Tensor]:
        """Explain pixels [1, S, S, 3] by vectors [P, E]. See `VisionRunner`."""
        return self._heatmaps.explain(explainer, pixels, vectors)


class FusedText:
    """Run a SigLIP or CLIP text tower in 16 bits: token ids -> EMBEDDING. Arguments as for `FusedVision`.

    Attributes:
        max_rows: most rows of one call.
        lengths: the numbers of tokens for which passes are recorded, in ascending order, the last for whole
            texts. No token of a CLIP sees a later one, so its texts may be cut behind the end token.
    """

    def __init__(
        self, tower: AnyTextTower, device: torch.device, dtype: torch.dtype, max_rows: int = 0
    ) -> None:
        tower.to(device)
        self._words = tower.embeddings.token_embedding.weight.to(dtype)
        self._positions = tower.embeddings.position_embedding.weight.to(dtype)
        self._blocks = Blocks(tower.encoder.blocks, tower.final_layer_norm, dtype)
        self._config, self.lengths = tower.config, [tower.context]
        head: nn.Module
        if isinstance(tower, ClipTextTower):
            head, shorter = tower.projection, [length for length in _CLIP_LENGTHS if length < tower.context]
            self.lengths = [*shorter, tower.context]
        else:
            head = tower.head
        self._head = head.to(dtype)
        most = rows_of_a_pass(tower.context, max_rows)
        self._replays: dict[int, Replays] = {}
        for length in self.lengths:
            ids = torch.zeros(most, length, dtype=torch.int64)
            self._replays[length] = Replays(self._forward, [ids], device, device.type == "cuda")
        self.max_rows = min(replays.max_rows for replays in self._replays.values())

    @torch.inference_mode()
    def __call__(self, ids: NDArray[np.int64], /, wanted: Sequence[str]) -> Finish:  # noqa: ARG002 - one output
        """Start a pass over ids [n, T] -> EMBEDDING [n, P], T being one of `lengths`. See `Runner`."""
        replays = self._replays[ids.shape[1]]
        (embedding,) = replays(ids)
        return replays.fetch({"EMBEDDING": embedding})

    def _forward(self, ids: Tensor) -> tuple[Tensor]:
        """[n, T] int64 -> embedding [n, P] float32"""
        x = F.embedding(ids, self._words) + self._positions[: ids.shape[1]]
        rows, length, width = x.shape
        x = x.view(-1, width)
        place = end_places(self._config, ids) if isinstance(self._config, ClipTextConfig) else length - 1
        _, x = self._blocks.pick(x, rows, torch.arange(0, len(x), length, device=ids.device) + place)
        return (self._head(x).float(),)


class _SiglipImages:
    """SigLIP's image tower on the device. See `_Images`; arguments as for `FusedVision`."""

    def __init__(
        self, tower: VisionTower, image: ImageConfig, dtype: torch.dtype, float8: bool, blocks: int
    ) -> None:
        self._tokens, self._width, self._dtype = tower.context, tower.config.hidden_size, dtype
        self._embed = FoldedPatchEmbedding(tower.embeddings, image, dtype)
        self._before = len(tower.encoder.blocks) - blocks
        drawn = partial(_drawn_tokens, tower, image) if float8 else None
        self._blocks, self._traced = make_stack(tower, dtype, blocks, drawn)
        self._head = FoldedPooling(tower.head, dtype)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[n, S, S, 3] uint8 -> tokens [n, T, W], embedding [n, W] float32"""
        x = self._embed(pixels)  # [n * T, W]
        x = self._blocks(x, len(pixels))
        tokens = x.view(len(pixels), self._tokens, self._width)
        return tokens, self._head(tokens).float()

    def patches(self, tokens: Tensor) -> Tensor:
        """Return all tokens, as they are."""
        return tokens

    def trace(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """[1, S, S, 3] uint8 -> the parts of the trace of the last blocks, one after the other"""
        stream = self._blocks.stream(self._embed(pixels), len(pixels), self._before)
        found = trace_stream(stream, self._traced, self._dtype)
        blocks = [(block.queries, block.keys, block.values, block.mlp) for block in found.blocks]
        return found.before, found.after, *chain.from_iterable(blocks)

    def explain(
        self, explainer: SiglipExplainer, trace: Sequence[Tensor], prepared: Sequence[Tensor]
    ) -> Explanation[Tensor]:
        """Explain the image of a trace. See `Traced`."""
        before, after, *parts = trace
        blocks = tuple(BlockTrace(*parts[start : start + 4]) for start in range(0, len(parts), 4))
        return explainer(TowerTrace(before, blocks, after), *prepared)


def make_stack(
    tower: VisionTower | NaflexVisionTower,
    dtype: torch.dtype,
    blocks: int,
    drawn: Callable[[int], Tensor] | None,
) -> tuple[Stack, list[Block]]:
    """Make the blocks of a tower run as one, and round the matrices of those that heatmaps trace.

    Args:
        tower: on the device, float32. It is taken over.
        dtype: bfloat16 or float16, for what is not float8.
        blocks: how many of the last blocks are traced.
        drawn: makes the input of the first block, [B, T, W] float32, of at least that number of tokens of
            drawn pictures, to calibrate float8 on. None: no float8.

    Returns:
        The stack, and the traced blocks.

    Raises:
        SettingsError: float8, and the tower's widths are not multiples of 16.
    """
    layers, final = tower.encoder.blocks, tower.post_layernorm
    traced = layers[len(layers) - blocks :]
    # The traced blocks have matrices of 16 bits. In 16 bits the stack then shares their memory; in float8 it
    # is made of the exact ones.
    if drawn is None:
        round_matrices(traced, dtype)
        return Blocks(layers, final, dtype), traced
    config = tower.config
    if config.hidden_size % _FLOAT8_MULTIPLE or config.intermediate_size % _FLOAT8_MULTIPLE:
        raise SettingsError(
            f"dtype float8: hidden_size {config.hidden_size} and intermediate_size "
            f"{config.intermediate_size} have to be multiples of {_FLOAT8_MULTIPLE}; use bfloat16"
        )
    stack = Float8Blocks(layers, final, drawn(_CALIBRATION_TOKENS))
    round_matrices(traced, dtype)
    return stack, traced


def _drawn_tokens(tower: VisionTower, image: ImageConfig, least: int) -> Tensor:
    rows = -(-least // tower.context)
    pixels = torch.from_numpy(draw_pictures(rows, tower.config.image_size))
    embed = FoldedPatchEmbedding(tower.embeddings, image, torch.float32)
    return embed(pixels.to(tower.post_layernorm.weight.device)).view(rows, tower.context, -1)
