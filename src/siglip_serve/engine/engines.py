"""The engines: a runner for the device and the dtype, and passes that fit its memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from siglip_serve.checkpoint.config import ImageConfig
from siglip_serve.engine.passes import (
    OUTPUTS,
    Batch,
    Runner,
    VisionRunner,
    in_passes,
    out_of_memory_refused,
)
from siglip_serve.engine.plan import Plan
from siglip_serve.engine.torch.runners import PlainText, PlainVision
from siglip_serve.errors import SettingsError
from siglip_serve.heatmaps.attribution import explainer_of
from siglip_serve.towers.clip import ClipTextTower, ClipVisionTower
from siglip_serve.towers.load import AnyTextTower, AnyVisionTower

__all__ = ["Explained", "TextEngine", "VisionEngine"]

_TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class VisionEngine:
    """uint8 pixels -> float32 embeddings.

    Args:
        tower: on the CPU, float32; the engine takes it over.
        image: the checkpoint's normalisation, applied on the device.
        plan: how to run it.

    Attributes:
        plan: without `auto`.
        runner: what runs a pass.

    Raises:
        SettingsError: this device cannot run that.
    """

    def __init__(self, tower: AnyVisionTower, image: ImageConfig, plan: Plan) -> None:
        self.plan = _vision_plan(plan, tower)
        # Before the runner takes the tower over and packs its weights.
        self._explainer = explainer_of(tower, self.plan.heatmap_blocks, self.plan.heatmap_vectors)
        runner = _vision_runner(tower, image, self.plan)
        self.runner: Runner = runner
        self._explain = runner.explain

    @property
    def staging(self) -> NDArray[np.uint8] | None:
        """Memory [rows, S, S, 3] in which pixels reach the device fastest, if there is such."""
        return getattr(self.runner, "staging", None)

    def __call__(self, pixels: NDArray[np.uint8], outputs: Iterable[str] = ("EMBEDDING",)) -> Batch:
        """Run the tower over all rows.

        Args:
            pixels: [N, S, S, 3] RGB, at least one row.
            outputs: which of `OUTPUTS` to compute. EMBEDDING [N, E] is the reference's `pooler_output`, of
                CLIP with the projection; PATCH_EMBEDDINGS [N, T, D] is its `last_hidden_state`, of CLIP
                without the class token; MEAN_EMBEDDING [N, D] the mean over these. None is normalised.
        """
        wanted = [name for name in OUTPUTS if name in set(outputs)]
        return in_passes(pixels, self.runner.max_rows, lambda part: self.runner(part, wanted))

    def explain(self, pixels: NDArray[np.uint8], vectors: NDArray[np.float32]) -> Explained:
        """What places of an image speak for vectors.

        Args:
            pixels: [1, S, S, 3] RGB.
            vectors: [P, E], in the space of the embeddings.

        Raises:
            DeviceMemoryError: there is no memory for so many vectors.
        """
        with out_of_memory_refused(f"{len(vectors)} prompts"):
            found = self._explain(self._explainer, pixels, torch.from_numpy(vectors))
            maps, unattributed, embedding = found.maps, found.unattributed, found.embedding
            return Explained(*(part[0].cpu().numpy() for part in (maps, unattributed, embedding)))


@dataclass(frozen=True)
class Explained:
    """Of one image, float32: what its places add to each vector's score, and what has no place.

    Attributes:
        maps: [P, T]; with `unattributed` its sums are the scores, <vector, embedding> / |embedding|.
        unattributed: [P].
        embedding: [E], not normalised.
    """

    maps: NDArray[np.float32]
    unattributed: NDArray[np.float32]
    embedding: NDArray[np.float32]


class TextEngine:
    """Token ids -> float32 embeddings; arguments as for `VisionEngine`."""

    def __init__(self, tower: AnyTextTower, plan: Plan) -> None:
        self.plan = _text_plan(plan, tower)
        self.runner = _text_runner(tower, self.plan)

    def __call__(self, ids: NDArray[np.int64]) -> Batch:
        """EMBEDDING [N, E], the reference's `pooler_output`, of CLIP with the projection, of ids [N, T].

        There is at least one row.
        """
        return in_passes(ids, self.runner.max_rows, lambda part: self.runner(part, ["EMBEDDING"]))


def _vision_runner(tower: AnyVisionTower, image: ImageConfig, plan: Plan) -> VisionRunner:
    if isinstance(tower, ClipVisionTower) or plan.backend == "torch":
        return PlainVision(tower, image, torch.device(plan.device), _dtype(plan), plan.max_rows)
    if plan.backend == "fused":
        from siglip_serve.engine.fused.blocks import Levers
        from siglip_serve.engine.fused.runners import FusedVision

        levers = Levers(float8=plan.dtype == "float8")
        device, blocks = torch.device(plan.device), min(plan.heatmap_blocks, len(tower.encoder.layers))
        return FusedVision(tower, image, device, _dtype(plan), levers, plan.max_rows, blocks)
    from siglip_serve.engine.openvino.runners import OpenVinoVision

    return OpenVinoVision(tower, image, plan)


def _text_runner(tower: AnyTextTower, plan: Plan) -> Runner:
    if isinstance(tower, ClipTextTower) or plan.backend == "torch":
        return PlainText(tower, torch.device(plan.device), _dtype(plan), plan.max_rows)
    if plan.backend == "fused":
        from siglip_serve.engine.fused.runners import FusedText

        return FusedText(tower, torch.device(plan.device), _dtype(plan), plan.max_rows)
    from siglip_serve.engine.openvino.runners import OpenVinoText

    return OpenVinoText(tower, plan)


def _dtype(plan: Plan) -> torch.dtype:
    return _TORCH[plan.wide_dtype]


def _vision_plan(plan: Plan, tower: AnyVisionTower) -> Plan:
    width = tower.config.hidden_size
    resolved = plan.for_vision("clip" if isinstance(tower, ClipVisionTower) else "siglip", width)
    if plan.dtype not in ("auto", resolved.dtype):
        print(
            f"siglip-serve: {resolved.dtype}, since a tower of width {width} gains nothing in {plan.dtype}",
            flush=True,
        )
    return _use_device(resolved)


def _text_plan(plan: Plan, tower: AnyTextTower) -> Plan:
    return _use_device(plan.for_text("clip" if isinstance(tower, ClipTextTower) else "siglip"))


def _use_device(plan: Plan) -> Plan:
    """Make the plan's GPU the current one, since streams, graphs and kernels belong to it."""
    if plan.device != "cpu":
        if not torch.cuda.is_available():
            raise SettingsError(f"device {plan.device}: this torch ({torch.__version__}) sees no CUDA GPU")
        torch.cuda.set_device(plan.device)
    return plan
