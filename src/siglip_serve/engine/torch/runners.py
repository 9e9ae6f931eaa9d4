"""Towers as torch runs them, operation by operation, on CPUs with weights packed for oneDNN."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from siglip_serve.checkpoint.model_config import ImageConfig
from siglip_serve.engine.passes import Arrays, Finish
from siglip_serve.engine.torch.normalization import Normalization
from siglip_serve.engine.torch.packed import pack_linear_layers
from siglip_serve.heatmaps.attribution import Explainer, Explanation
from siglip_serve.towers.load import AnyTextTower, AnyVisionTower

__all__ = ["VISION_ROWS", "TorchText", "TorchVision", "place"]

# Rows by which a GPU is full, or the caches of a CPU.
VISION_ROWS = {"cuda": 64, "cpu": 8}
_TEXT_ROWS = {"cuda": 256, "cpu": 32}


class TorchVision:
    """Run a vision tower of either family: uint8 pixels -> outputs.

    Args:
        tower: on the CPU, float32. The runner takes it over.
        image: the checkpoint's normalisation, computed on the device.
        device: any device of torch.
        dtype: arithmetic of the tower.
        max_rows: most rows of one call. 0 is the default of the device.

    Attributes:
        max_rows: most rows of one call.
        tower: the tower, on the device, in `dtype`.
        normalize: the normalisation.
    """

    def __init__(
        self,
        tower: AnyVisionTower,
        image: ImageConfig,
        device: torch.device,
        dtype: torch.dtype,
        max_rows: int = 0,
    ) -> None:
        self.max_rows = max_rows or VISION_ROWS[device.type]
        self.tower = tower
        place(tower, device, dtype, self.max_rows * tower.context)
        self.normalize = Normalization(image, device, dtype)

    @torch.inference_mode()
    def __call__(self, pixels: NDArray[np.uint8], /, wanted: Sequence[str]) -> Finish:
        """Compute the wanted outputs of pixels [n, S, S, 3]. See `Runner`."""
        tokens = self.tower(self.normalize(pixels))
        compute: dict[str, Callable[[], Tensor]] = {
            "EMBEDDING": lambda: self.tower.head(tokens),
            "MEAN_EMBEDDING": lambda: self.tower.patches(tokens).mean(dim=1, dtype=torch.float32),
            "PATCH_EMBEDDINGS": lambda: self.tower.patches(tokens).contiguous(),
        }
        return _done({name: compute[name]().float().cpu().numpy() for name in wanted})

    @torch.inference_mode()
    def explain(
        self, explainer: Explainer, pixels: NDArray[np.uint8], vectors: Tensor
    ) -> Explanation[Tensor]:
        """Explain pixels [1, S, S, 3] by vectors [P, E]. See `VisionRunner`."""
        x = self.normalize(pixels)
        return explainer.explain(self.tower, x, vectors.to(x.device))


class TorchText:
    """Run a text tower of either family: token ids -> EMBEDDING. Arguments as for `TorchVision`."""

    def __init__(
        self, tower: AnyTextTower, device: torch.device, dtype: torch.dtype, max_rows: int = 0
    ) -> None:
        self.max_rows = max_rows or _TEXT_ROWS[device.type]
        self.tower, self.device = tower, device
        place(tower, device, dtype, self.max_rows * tower.context)

    @torch.inference_mode()
    def __call__(self, ids: NDArray[np.int64], /, wanted: Sequence[str]) -> Finish:  # noqa: ARG002 - one output
        """Compute EMBEDDING [n, P] of ids [n, T]. See `Runner`."""
        on_device = torch.from_numpy(ids).to(self.device)
        tokens = self.tower(on_device)
        return _done({"EMBEDDING": self.tower.pool(tokens, on_device).float().cpu().numpy()})


def _done(outputs: Arrays) -> Finish:
    return lambda: outputs


def place(tower: nn.Module, device: torch.device, dtype: torch.dtype, tokens: int) -> None:
    """Move a tower to a device, on CPUs with weights packed for this number of tokens at once."""
    tower.to(device, dtype)
    if device.type == "cpu":
        pack_linear_layers(tower, tokens)
