"""NaFlex towers as torch runs them: images of different grids, padded to the longest of a pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from siglip_serve.checkpoint.model_config import NaflexImageConfig
from siglip_serve.engine.passes import Finish
from siglip_serve.engine.patches import PatchRows
from siglip_serve.engine.torch.runners import VISION_ROWS, place
from siglip_serve.heatmaps.attribution import Explanation, SiglipExplainer
from siglip_serve.towers.naflex import NaflexVisionTower, padding_mask

__all__ = ["TorchNaflex"]


class TorchNaflex:
    """Run a NaFlex vision tower: uint8 patches -> outputs. Arguments as for `TorchVision`."""

    def __init__(
        self,
        tower: NaflexVisionTower,
        image: NaflexImageConfig,
        device: torch.device,
        dtype: torch.dtype,
        max_rows: int = 0,
    ) -> None:
        self.max_rows = max_rows or VISION_ROWS[device.type]
        self.tower = tower
        self._most = image.max_patches
        self._device, self._dtype = device, dtype
        place(tower, device, dtype, self.max_rows * self._most)
        # x * rescale, then (x - mean) / std, in the reference's order, so that float32 rounds alike.
        self._rescale = image.rescale
        pixels = image.patch_size**2
        self._mean = torch.tensor(image.mean, device=device).repeat(pixels)
        self._std = torch.tensor(image.std, device=device).repeat(pixels)

    @torch.inference_mode()
    def __call__(self, rows: PatchRows, /, wanted: Sequence[str]) -> Finish:
        """Compute the wanted outputs of n images. See `Runner`. PATCH_EMBEDDINGS end with zeros."""
        patches, grids = self._inputs(rows)
        real = torch.from_numpy(rows.real)
        mask = padding_mask(real, self._dtype)
        mask = None if mask is None else mask.to(self._device)
        tokens = self.tower(patches, grids, mask)
        outputs: dict[str, Tensor] = {}
        if "EMBEDDING" in wanted:
            outputs["EMBEDDING"] = self.tower.head(tokens, mask).float()
        if {"MEAN_EMBEDDING", "PATCH_EMBEDDINGS"}.intersection(wanted):
            kept = tokens.float() * real.to(self._device)[..., None]  # [n, T, D]
            if "MEAN_EMBEDDING" in wanted:
                outputs["MEAN_EMBEDDING"] = kept.sum(1) / grids.prod(1)[:, None]
            if "PATCH_EMBEDDINGS" in wanted:
                outputs["PATCH_EMBEDDINGS"] = torch.nn.functional.pad(
                    kept, (0, 0, 0, self._most - kept.shape[1])
                )
        arrays = {name: outputs[name].cpu().numpy() for name in wanted}
        return lambda: arrays

    @torch.inference_mode()
    def explain(self, explainer: SiglipExplainer, rows: PatchRows, vectors: Tensor) -> Explanation[Tensor]:
        """Explain one image without padding by vectors [P, E]. See `VisionRunner`."""
        patches, grids = self._inputs(rows)
        return explainer(self.tower.trace(patches, grids, explainer.blocks), vectors.to(self._device))

    def _inputs(self, rows: PatchRows) -> tuple[Tensor, Tensor]:
        """Normalise the patches, [n, T, 3 P P] of the tower's dtype, and move their grids, [n, 2]."""
        patches: NDArray[np.uint8] = rows.patches
        x = torch.from_numpy(patches).to(self._device)
        x = ((x * self._rescale - self._mean) / self._std).to(self._dtype)
        return x, torch.from_numpy(rows.grids).to(self._device)
