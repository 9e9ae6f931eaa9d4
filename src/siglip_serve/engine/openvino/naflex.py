"""NaFlex towers on CPUs by OpenVINO: one graph for every number of patches, in float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from siglip_serve.checkpoint.model_config import NaflexImageConfig
from siglip_serve.engine.openvino.compiled import Compiled
from siglip_serve.engine.openvino.graph import PADDING, build_naflex, build_naflex_head
from siglip_serve.engine.passes import Finish
from siglip_serve.engine.patches import PatchRows
from siglip_serve.engine.plan import Plan
from siglip_serve.engine.torch.naflex import explain_alone, outputs_of_places
from siglip_serve.engine.torch.normalization import PatchNormalization
from siglip_serve.engine.torch.runners import VISION_ROWS
from siglip_serve.heatmaps.attribution import Explanation, SiglipExplainer
from siglip_serve.towers.naflex import NaflexVisionTower
from siglip_serve.towers.weights import parameters_of

__all__ = ["OpenVinoNaflex"]


class OpenVinoNaflex:
    """Run a NaFlex vision tower: uint8 patches -> outputs. One call at a time.

    Args:
        tower: on the CPU, float32. Its tensors are shared, not copied.
        image: the checkpoint's normalisation.
        plan: without `auto`, not int8.

    Attributes:
        max_rows: most rows of one call.
        grouped: see `NaflexRunner`.
    """

    grouped = True

    def __init__(self, tower: NaflexVisionTower, image: NaflexImageConfig, plan: Plan) -> None:
        self.max_rows = plan.max_rows or VISION_ROWS["cpu"]
        self._most = image.max_patches
        # Positions are too little work for the graph, and heatmaps need values that it does not return.
        self._torch = tower
        self._normalize = PatchNormalization(image, torch.device("cpu"), torch.float32)
        parameters = parameters_of(tower)
        self._tower = Compiled(build_naflex(parameters, tower.config, image), plan)
        self._head = Compiled(build_naflex_head(parameters, tower.config), plan)

    @torch.inference_mode()
    def __call__(self, rows: PatchRows, /, wanted: Sequence[str]) -> Finish:
        """Compute the wanted outputs of n images. See `Runner`. PATCH_EMBEDDINGS end with zeros.

        Raises:
            RuntimeError: out of memory for these rows.
        """
        grids = torch.from_numpy(rows.grids)
        positions = self._torch.embeddings.positions(grids, rows.patches.shape[1]).numpy()
        padding = np.where(rows.real, np.float32(0), PADDING)
        tokens = self._tower(rows.patches, positions, padding)
        outputs = outputs_of_places(torch.from_numpy(tokens), rows, self._most, wanted)
        arrays = {name: tensor.numpy() for name, tensor in outputs.items()}
        if "EMBEDDING" in wanted:
            arrays["EMBEDDING"] = self._head(tokens, padding)
        return lambda: arrays

    def explain(self, explainer: SiglipExplainer, rows: PatchRows, vectors: Tensor) -> Explanation[Tensor]:
        """Explain one image without padding by vectors [P, E] with torch, in float32. See `VisionRunner`."""
        return explain_alone(explainer, self._torch, self._normalize, rows, vectors)
