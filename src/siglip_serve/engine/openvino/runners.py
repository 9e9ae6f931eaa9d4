"""Towers on CPUs by OpenVINO, in float32, bfloat16 and int8.

Only the int8 model is kept on disk, since it takes minutes to make (`int8.py`). In the other dtypes graph and
kernels of a base-sized tower are ready in about half a second. Reading a compiled copy would take as long,
even before it is checked against the weights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from siglip_serve.checkpoint.model_config import ClipVisionConfig, ImageConfig
from siglip_serve.engine.openvino.compiled import Compiled
from siglip_serve.engine.openvino.graph import build_head, build_patches, build_text, build_vision
from siglip_serve.engine.openvino.int8 import quantize
from siglip_serve.engine.passes import OUTPUTS, Arrays, Finish
from siglip_serve.engine.plan import Plan
from siglip_serve.engine.texts import embedded_places
from siglip_serve.towers.parameters import Parameters
from siglip_serve.towers.stored import StoredText, StoredVision

if TYPE_CHECKING:
    from torch import Tensor

    from siglip_serve.heatmaps.attribution import Explainer, Explanation

__all__ = ["OpenVinoText", "OpenVinoVision"]

# More rows at once gain nothing: the caches of a CPU hold no more.
_VISION_ROWS = 8
_TEXT_ROWS = 32


class OpenVinoVision:
    """Run a SigLIP or CLIP vision tower: uint8 pixels -> outputs. One call at a time.

    Compiled kernels have weights of their own. Those of the checkpoint leave memory, and are read again for
    the first heatmap, which torch computes.

    Args:
        tower: its parameters are shared, not copied.
        image: the checkpoint's normalisation.
        plan: without `auto`. With int8 the blocks are quantised, and the pooling head keeps the fastest
            dtype that is close to float32. So does the last block of CLIP.

    Attributes:
        max_rows: most rows of one call.

    Raises:
        SettingsError: the dtype is int8, and there are no images to calibrate on.
    """

    def __init__(self, tower: StoredVision, image: ImageConfig, plan: Plan) -> None:
        self.max_rows = plan.max_rows or _VISION_ROWS
        parameters, config = tower.parameters, tower.config
        if plan.dtype == "int8":
            model = quantize(parameters, config, image, plan)
        else:
            model = build_vision(parameters, config, image)
        self._stored, self._image = tower, image
        # The head is compiled apart, so that it runs only when it is asked for, and so is the rest of CLIP.
        self._tower = Compiled(model, plan)
        self._head = Compiled(build_head(parameters, config), plan)
        self._patches = None
        if isinstance(config, ClipVisionConfig):
            self._patches = Compiled(build_patches(parameters, config), plan)
        del model
        size = config.image_size
        self(np.zeros((1, size, size, 3), np.uint8), OUTPUTS)  # the first pass lays out the weights
        _leave_memory(parameters)

    def __call__(self, pixels: NDArray[np.uint8], /, wanted: Sequence[str]) -> Finish:
        """Compute the wanted outputs of pixels [n, S, S, 3]. See `Runner`.

        Raises:
            RuntimeError: out of memory for these rows.
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

    def explain(
        self, explainer: Explainer, pixels: NDArray[np.uint8], vectors: Tensor
    ) -> Explanation[Tensor]:
        """Explain pixels [1, S, S, 3] by vectors [P, E] with torch, in float32. See `VisionRunner`."""
        import torch

        from siglip_serve.engine.torch.normalization import Normalization

        # Heatmaps need values that the graph does not return, and are too rare for a graph of their own.
        normalize = Normalization(self._image, torch.device("cpu"), torch.float32)
        with torch.inference_mode():
            return explainer.explain(self._stored.tower, normalize(pixels), vectors)


class OpenVinoText:
    """Run a SigLIP or CLIP text tower: token ids -> EMBEDDING. One call at a time.

    Texts are not quantised, since int8 is calibrated on images. Arguments as for `OpenVinoVision`.
    """

    def __init__(self, tower: StoredText, plan: Plan) -> None:
        self.max_rows = plan.max_rows or _TEXT_ROWS
        self._config = tower.config
        self._tower = Compiled(build_text(tower.parameters, tower.config), plan)
        self(np.zeros((1, tower.config.max_position_embeddings), np.int64), ["EMBEDDING"])
        _leave_memory(tower.parameters)

    def __call__(self, ids: NDArray[np.int64], /, wanted: Sequence[str]) -> Finish:  # noqa: ARG002 - one output
        """Compute EMBEDDING [n, P] of ids [n, T]. See `Runner`.

        Raises:
            RuntimeError: out of memory for these rows.
        """
        outputs = {"EMBEDDING": self._tower(ids, embedded_places(self._config, ids))}
        return lambda: outputs


def _leave_memory(parameters: Parameters) -> None:
    """Give the system the memory of the checkpoint, and what glibc keeps after the compiler's copies."""
    parameters.leave_memory()
    ctypes.CDLL(None).malloc_trim(0)
