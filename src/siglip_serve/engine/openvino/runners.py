"""Towers on CPUs by OpenVINO, in float32, bfloat16 and int8.

Only the int8 model is kept on disk, since it takes minutes to make (`int8.py`). In the other dtypes graph and
kernels of a base-sized tower are ready in about half a second. Reading a compiled copy would take as long,
even before it is checked against the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from siglip_serve.checkpoint.model_config import ImageConfig
from siglip_serve.engine.openvino.compiled import Compiled
from siglip_serve.engine.openvino.graph import build_head, build_patches, build_text, build_vision
from siglip_serve.engine.openvino.int8 import quantize
from siglip_serve.engine.passes import Arrays, Finish
from siglip_serve.engine.plan import Plan
from siglip_serve.engine.texts import embedded_places
from siglip_serve.engine.torch.normalization import Normalization
from siglip_serve.heatmaps.attribution import Explainer, Explanation
from siglip_serve.towers.clip import ClipVisionTower
from siglip_serve.towers.load import AnyTextTower, AnyVisionTower

__all__ = ["OpenVinoText", "OpenVinoVision"]

# More rows at once gain nothing: the caches of a CPU hold no more.
_VISION_ROWS = 8
_TEXT_ROWS = 32


class OpenVinoVision:
    """Run a SigLIP or CLIP vision tower: uint8 pixels -> outputs. One call at a time.

    Args:
        tower: on the CPU, float32. Its tensors are shared, not copied.
        image: the checkpoint's normalisation.
        plan: without `auto`. With int8 the blocks are quantised, and the pooling head keeps the fastest
            dtype that is close to float32. So does the last block of CLIP.

    Attributes:
        max_rows: most rows of one call.

    Raises:
        SettingsError: the dtype is int8, and there are no images to calibrate on.
    """

    def __init__(self, tower: AnyVisionTower, image: ImageConfig, plan: Plan) -> None:
        self.max_rows = plan.max_rows or _VISION_ROWS
        model = quantize(tower, image, plan) if plan.dtype == "int8" else build_vision(tower, image)
        # Heatmaps need values that the graph does not return, and are too rare for a graph of their own.
        self._torch = tower
        self._normalize = Normalization(image, torch.device("cpu"), torch.float32)
        # The head is compiled apart, so that it runs only when it is asked for, and so is the rest of CLIP.
        self._tower, self._head = Compiled(model, plan), Compiled(build_head(tower), plan)
        self._patches = Compiled(build_patches(tower), plan) if isinstance(tower, ClipVisionTower) else None

    def __call__(self, pixels: NDArray[np.uint8], /, wanted: Sequence[str]) -> Finish:
        """Compute the wanted outputs of pixels [n, S, S, 3]. See `Runner`.

        Raises:
            torch.OutOfMemoryError: there is not enough memory for these rows.
        """
        tokens = self._tower(pixels)
        outputs: Arrays = {}
        if "EMBEDDING" in wanted:
            outputs["EMBEDDING"] = self._head(tokens)
        if set(wanted) - {"EMBEDDING"}:
            patches = tokens if self._patches is None else self._patches(tokens)
            if "MEAN_EMBEDDING" in wanted:
                outputs["MEAN_EMBEDDING"] = patches.mean(axis=1, dtype=np.float32)
            if "PATCH_EMBEDDINGS" in wanted:
                outputs["PATCH_EMBEDDINGS"] = patches
        return lambda: outputs

    @torch.inference_mode()
    def explain(
        self, explainer: Explainer, pixels: NDArray[np.uint8], vectors: Tensor
    ) -> Explanation[Tensor]:
        """Explain pixels [1, S, S, 3] by vectors [P, E] with torch, in float32. See `VisionRunner`."""
        return explainer.explain(self._torch, self._normalize(pixels), vectors)


class OpenVinoText:
    """Run a SigLIP or CLIP text tower: token ids -> EMBEDDING. One call at a time.

    Texts are not quantised, since int8 is calibrated on images. Arguments as for `OpenVinoVision`.
    """

    def __init__(self, tower: AnyTextTower, plan: Plan) -> None:
        self.max_rows = plan.max_rows or _TEXT_ROWS
        self._config = tower.config
        self._tower = Compiled(build_text(tower), plan)

    def __call__(self, ids: NDArray[np.int64], /, wanted: Sequence[str]) -> Finish:  # noqa: ARG002 - one output
        """Compute EMBEDDING [n, P] of ids [n, T]. See `Runner`.

        Raises:
            torch.OutOfMemoryError: there is not enough memory for these rows.
        """
        outputs = {"EMBEDDING": self._tower(ids, embedded_places(self._config, ids))}
        return lambda: outputs
