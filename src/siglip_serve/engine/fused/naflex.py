"""NaFlex towers on NVIDIA GPUs: every image in a row of as many tokens as an image may have patches.

Images are resized to as many patches as fit below that bound, so few tokens of a row are padding. Passes thus
differ in the number of images only, and are recorded for it as those of other towers are. Attention and
pooling read the real tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import isqrt

import numpy as np
import torch
from torch import Tensor

from siglip_serve.checkpoint.model_config import NaflexImageConfig
from siglip_serve.engine.buckets import rows_of_a_pass
from siglip_serve.engine.fused.float8 import draw_pictures
from siglip_serve.engine.fused.folded import FoldedPatches, FoldedPooling
from siglip_serve.engine.fused.heatmaps import trace_stream
from siglip_serve.engine.fused.replays import Replays
from siglip_serve.engine.fused.runners import make_stack
from siglip_serve.engine.passes import Finish
from siglip_serve.engine.patches import PatchRows
from siglip_serve.engine.torch.naflex import outputs_of_places
from siglip_serve.heatmaps.attribution import Explanation, SiglipExplainer
from siglip_serve.towers.naflex import NaflexVisionTower

__all__ = ["FusedNaflex"]


class FusedNaflex:
    """Run a NaFlex vision tower: uint8 patches -> outputs. Arguments and errors as for `FusedVision`.

    Attributes:
        max_rows: most rows of one call.
        grouped: see `NaflexRunner`.
        replays: the recorded passes.
    """

    grouped = False

    def __init__(
        self,
        tower: NaflexVisionTower,
        image: NaflexImageConfig,
        device: torch.device,
        dtype: torch.dtype,
        float8: bool = False,
        max_rows: int = 0,
        blocks: int = 0,
    ) -> None:
        tower.to(device)
        self._device, self._dtype, self._most = device, dtype, image.max_patches
        self._embed = FoldedPatches(tower.embeddings, image, dtype)
        self._before = len(tower.encoder.blocks) - blocks
        drawn = partial(_drawn_tokens, tower, image) if float8 else None
        self._blocks, self._traced = make_stack(tower, dtype, blocks, drawn)
        self._head = FoldedPooling(tower.head, dtype)
        rows = rows_of_a_pass(self._most, max_rows)
        patches = torch.zeros(rows, self._most, 3 * image.patch_size**2, dtype=torch.uint8)
        grids = torch.tensor([[1, self._most]]).repeat(rows, 1)
        self.replays = Replays(self._forward, [patches, grids], device, device.type == "cuda")
        self.max_rows = self.replays.max_rows

    @torch.inference_mode()
    def __call__(self, rows: PatchRows, /, wanted: Sequence[str]) -> Finish:
        """Start a pass over n images. See `Runner`. PATCH_EMBEDDINGS end with zeros."""
        short = self._most - rows.patches.shape[1]
        if short:
            rows = PatchRows(np.pad(rows.patches, ((0, 0), (0, short), (0, 0))), rows.grids)
        tokens, embedding = self.replays(rows.patches, rows.grids)
        outputs = outputs_of_places(tokens, rows, self._most, wanted)
        if "EMBEDDING" in wanted:
            outputs["EMBEDDING"] = embedding
        return self.replays.fetch(outputs)

    @torch.inference_mode()
    def explain(self, explainer: SiglipExplainer, rows: PatchRows, vectors: Tensor) -> Explanation[Tensor]:
        """Explain one image without padding by vectors [P, E]. See `VisionRunner`. Nothing is recorded."""
        patches, grids = (torch.from_numpy(array).to(self._device) for array in (rows.patches, rows.grids))
        stream = self._blocks.stream(self._embed(patches, grids), 1, self._before, _lengths(grids))
        return explainer(trace_stream(stream, self._traced, self._dtype), vectors.to(self._device))

    def _forward(self, patches: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
        """Patches [n, T, 3 P P] uint8 and grids [n, 2] -> tokens [n, T, W], embedding [n, W] float32"""
        lengths = _lengths(grids)
        x = self._blocks(self._embed(patches, grids), len(patches), lengths)
        tokens = x.view(len(patches), self._most, -1)
        real = torch.arange(self._most, device=self._device) < lengths[:, None]
        return tokens, self._head(tokens, real).float()


def _lengths(grids: Tensor) -> Tensor:
    """Grids [n, 2] -> [n] int32"""
    return grids.prod(1).int()


def _drawn_tokens(tower: NaflexVisionTower, image: NaflexImageConfig, least: int) -> Tensor:
    """Embed drawn squares of as many patches as an image may have, about."""
    grid, side = isqrt(image.max_patches), image.patch_size
    rows = -(-least // grid**2)
    pixels = draw_pictures(rows, grid * side).reshape(rows, grid, side, grid, side, 3)
    patches = torch.from_numpy(pixels.swapaxes(2, 3).reshape(rows, grid**2, -1))
    device = tower.post_layernorm.weight.device
    embed = FoldedPatches(tower.embeddings, image, torch.float32)
    tokens = embed(patches.to(device), torch.tensor([[grid, grid]], device=device).repeat(rows, 1))
    return tokens.view(rows, grid**2, -1)
