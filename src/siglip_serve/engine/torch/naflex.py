"""NaFlex towers as torch runs them: images of different grids, padded to the longest of a pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_serve.checkpoint.model_config import NaflexImageConfig
from siglip_serve.engine.passes import Finish
from siglip_serve.engine.patches import PatchRows
from siglip_serve.engine.torch.normalization import PatchNormalization
from siglip_serve.engine.torch.runners import VISION_ROWS, place
from siglip_serve.heatmaps.attribution import Explanation, SiglipExplainer
from siglip_serve.towers.naflex import NaflexVisionTower, padding_mask

__all__ = ["TorchNaflex", "explain_alone", "outputs_of_places"]


class TorchNaflex:
    """Run a NaFlex vision tower: uint8 patches -> outputs. Arguments as for `TorchVision`."""

    grouped = True

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
        self._normalize = PatchNormalization(image, device, dtype)

    @torch.inference_mode()
    def __call__(self, rows: PatchRows, /, wanted: Sequence[str]) -> Finish:
        """Compute the wanted outputs of n images. See `Runner`. PATCH_EMBEDDINGS end with zeros."""
        mask = padding_mask(torch.from_numpy(rows.real), self._dtype)
        mask = None if mask is None else mask.to(self._device)
        grids = torch.from_numpy(rows.grids).to(self._device)
        tokens = self.tower(self._normalize(rows.patches), grids, mask)
        outputs = outputs_of_places(tokens, rows, self._most, wanted)
        if "EMBEDDING" in wanted:
            outputs["EMBEDDING"] = self.tower.head(tokens, mask).float()
        arrays = {name: outputs[name].cpu().numpy() for name in wanted}
        return lambda: arrays

    def explain(self, explainer: SiglipExplainer, rows: PatchRows, vectors: Tensor) -> Explanation[Tensor]:
        """Explain one image without padding by vectors [P, E]. See `VisionRunner`."""
        return explain_alone(explainer, self.tower, self._normalize, rows, vectors)


@torch.inference_mode()
def explain_alone(
    explainer: SiglipExplainer,
    tower: NaflexVisionTower,
    normalize: PatchNormalization,
    rows: PatchRows,
    vectors: Tensor,
) -> Explanation[Tensor]:
    """Explain one image without padding by vectors [P, E], on the device on which patches are normalised."""
    patches = normalize(rows.patches)
    trace = tower.trace(patches, torch.from_numpy(rows.grids).to(patches.device), explainer.blocks)
    return explainer(trace, vectors.to(patches.device))


def outputs_of_places(tokens: Tensor, rows: PatchRows, most: int, wanted: Sequence[str]) -> dict[str, Tensor]:
    """Compute those of the wanted outputs that do without the pooling head, float32, on the tokens' device.

    Args:
        tokens: [n, T, D] of the rows, without meaning where these are padding.
        rows: n images.
        most: most patches of an image. PATCH_EMBEDDINGS [n, most, D] end with zeros.
        wanted: which of `OUTPUTS` to compute. EMBEDDING is ignored.
    """
    if {"MEAN_EMBEDDING", "PATCH_EMBEDDINGS"}.isdisjoint(wanted):
        return {}
    outputs = {}
    kept = tokens.float() * torch.from_numpy(rows.real).to(tokens.device)[..., None]
    if "MEAN_EMBEDDING" in wanted:
        outputs["MEAN_EMBEDDING"] = kept.sum(1) / torch.from_numpy(rows.counts).to(tokens.device)[:, None]
    if "PATCH_EMBEDDINGS" in wanted:
        outputs["PATCH_EMBEDDINGS"] = F.pad(kept, (0, 0, 0, most - kept.shape[1]))
    return outputs
