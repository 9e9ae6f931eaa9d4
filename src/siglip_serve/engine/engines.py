"""Engines: a runner for the device and the dtype, and passes that fit its memory."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from siglip_serve.checkpoint.model_config import Family, ImageConfig, ModelConfig, NaflexImageConfig
from siglip_serve.engine.groups import group_rows, in_groups
from siglip_serve.engine.passes import (
    OUTPUTS,
    Batch,
    NaflexRunner,
    Runner,
    VisionRunner,
    in_passes,
    out_of_memory_refused,
)
from siglip_serve.engine.patches import PatchRows
from siglip_serve.engine.plan import Plan
from siglip_serve.engine.texts import embedded_places, shorten
from siglip_serve.engine.torch.naflex import TorchNaflex
from siglip_serve.engine.torch.runners import TorchText, TorchVision
from siglip_serve.errors import SettingsError
from siglip_serve.heatmaps.attribution import Explanation, SiglipExplainer, explainer_of
from siglip_serve.machine import available_cores
from siglip_serve.towers import naflex
from siglip_serve.towers.clip import ClipTextTower, ClipVisionTower
from siglip_serve.towers.load import AnyTextTower, AnyVisionTower, load_text, load_vision
from siglip_serve.towers.naflex import NaflexVisionTower
from siglip_serve.towers.siglip import TextTower, VisionTower

__all__ = ["NaflexEngine", "TextEngine", "VisionEngine", "open_text", "open_vision"]

# Largest share of padding in a pass of texts. They are short, so that a further pass may cost more.
_TEXT_PADDING = 0.3
_TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class VisionEngine:
    """Run a vision tower: uint8 pixels -> float32 outputs.

    Args:
        tower: on the CPU, float32. The engine takes it over.
        image: the checkpoint's normalisation, applied on the device.
        plan: how to run the tower.

    Attributes:
        plan: the plan without `auto`.
        runner: runs one pass.

    Raises:
        SettingsError: the device, or the tower's family, cannot run the plan.
    """

    def __init__(self, tower: AnyVisionTower, image: ImageConfig, plan: Plan) -> None:
        self.plan = _vision_plan(plan, tower)
        # Made before the runner packs the weights of the tower.
        self._explainer = explainer_of(tower, self.plan.heatmap_blocks, self.plan.heatmap_vectors)
        runner = _vision_runner(tower, image, self.plan)
        self.runner: Runner = runner
        self._explain = runner.explain

    @property
    def staging(self) -> NDArray[np.uint8] | None:
        """uint8 memory [rows, S, S, 3] from which pixels reach the device fastest, or None."""
        return getattr(self.runner, "staging", None)

    def __call__(self, pixels: NDArray[np.uint8], outputs: Iterable[str] = ("EMBEDDING",)) -> Batch:
        """Run the tower over all rows.

        Args:
            pixels: [N, S, S, 3] uint8 RGB, at least one row.
            outputs: which of `OUTPUTS` to compute. Other names are ignored.

        Returns:
            Float32 outputs, not normalised. EMBEDDING [N, E] is the reference's `pooler_output`, for CLIP
            with its projection. PATCH_EMBEDDINGS [N, T, D] is the reference's `last_hidden_state`, for CLIP
            without the class token. MEAN_EMBEDDING [N, D] is the mean of these.
        """
        wanted = [name for name in OUTPUTS if name in set(outputs)]
        return in_passes(pixels, self.runner.max_rows, lambda part: self.runner(part, wanted))

    def explain(
        self, pixels: NDArray[np.uint8], vectors: NDArray[np.float32]
    ) -> Explanation[NDArray[np.float32]]:
        """Explain the embedding of one image: how much its places add to the score of each vector.

        Args:
            pixels: [1, S, S, 3] uint8 RGB.
            vectors: [P, E] float32, in the space of the embeddings.

        Returns:
            Float32 arrays of this image: maps [P, T], unattributed [P], embedding [E].

        Raises:
            DeviceMemoryError: the device has not enough memory for P vectors.
        """
        with out_of_memory_refused(f"{len(vectors)} prompts"):
            found = self._explain(self._explainer, pixels, torch.from_numpy(vectors))
            maps, unattributed, embedding = found.maps, found.unattributed, found.embedding
            return Explanation(*(part[0].cpu().numpy() for part in (maps, unattributed, embedding)))


class NaflexEngine:
    """Run a NaFlex vision tower: uint8 patches -> float32 outputs. Arguments as for `VisionEngine`."""

    def __init__(self, tower: NaflexVisionTower, image: NaflexImageConfig, plan: Plan) -> None:
        self.plan = _use_device(plan.for_vision("naflex", tower.config.hidden_size, tower.config.hidden_act))
        self._most = image.max_patches
        # Made before the runner packs the weights of the tower.
        self._explainer = SiglipExplainer(tower, self.plan.heatmap_blocks, self.plan.heatmap_vectors)
        self.runner = _naflex_runner(tower, image, self.plan)

    def __call__(self, rows: PatchRows, outputs: Iterable[str] = ("EMBEDDING",)) -> Batch:
        """Run the tower over all rows. Where padding costs much, images of a pass have about as many patches.

        Args:
            rows: N images, at least one.
            outputs: which of `OUTPUTS` to compute. Other names are ignored.

        Returns:
            Outputs as of `VisionEngine`, but PATCH_EMBEDDINGS [N, T, D] has as many rows as an image can have
            patches. Those after the image's own are zeros.
        """
        wanted = [name for name in OUTPUTS if name in set(outputs)]
        if not self.runner.grouped:
            return in_passes(rows, self.runner.max_rows, lambda some: self.runner(some, wanted))

        def compute(group: NDArray[np.intp]) -> Batch:
            return in_passes(rows.take(group), len(group), lambda some: self.runner(some, wanted))

        return in_groups(group_rows(rows.counts, self.runner.max_rows), compute, len(rows))

    def explain(self, rows: PatchRows, vectors: NDArray[np.float32]) -> Explanation[NDArray[np.float32]]:
        """Explain the embedding of one image. See `VisionEngine`; maps [P, T] end with zeros."""
        alone = rows.take(np.zeros(1, dtype=np.intp))
        with out_of_memory_refused(f"{len(vectors)} prompts"):
            found = self.runner.explain(self._explainer, alone, torch.from_numpy(vectors))
            maps = np.zeros((len(vectors), self._most), dtype=np.float32)
            maps[:, : int(alone.counts[0])] = found.maps[0].cpu().numpy()
            return Explanation(maps, found.unattributed[0].cpu().numpy(), found.embedding[0].cpu().numpy())


class TextEngine:
    """Run a text tower: token ids -> float32 embeddings. Arguments and errors as for `VisionEngine`."""

    def __init__(self, tower: AnyTextTower, plan: Plan) -> None:
        self.plan = _text_plan(plan, tower)
        self._config = tower.config
        self.runner = _text_runner(tower, self.plan)

    def __call__(self, ids: NDArray[np.int64]) -> Batch:
        """Run the tower over all rows. Where length matters, texts of a pass are about as long.

        Args:
            ids: [N, T] int64, at least one row, padded to the context length.

        Returns:
            EMBEDDING [N, E] float32, not normalised: the reference's `pooler_output`, for CLIP with its
            projection.
        """
        places = embedded_places(self._config, ids)
        if places.min() == places.max():
            return self._run(ids)
        groups = group_rows(places + 1, self.runner.max_rows, _TEXT_PADDING)
        return in_groups(groups, lambda group: self._run(ids[group]), len(ids))

    def _run(self, ids: NDArray[np.int64]) -> Batch:
        ids = shorten(self._config, ids)
        return in_passes(ids, self.runner.max_rows, lambda some: self.runner(some, ["EMBEDDING"]))


def open_vision(config: ModelConfig, plan: Plan) -> VisionEngine | NaflexEngine:
    """Load the vision tower of a checkpoint, and give torch the threads of the plan.

    Raises:
        CheckpointError: the weights do not belong to the configuration.
        SettingsError: the device, or the tower's family, cannot run the plan.
    """
    _prepare_torch(plan)
    if isinstance(config.image, NaflexImageConfig):
        return NaflexEngine(naflex.load_vision(config.path), config.image, plan)
    return VisionEngine(load_vision(config.path), config.image, plan)


def open_text(config: ModelConfig, plan: Plan) -> TextEngine:
    """Load the text tower of a checkpoint. See `open_vision`."""
    _prepare_torch(plan)
    return TextEngine(load_text(config.path), plan)


def _prepare_torch(plan: Plan) -> None:
    torch.set_num_threads(plan.threads or available_cores())
    torch.backends.cudnn.allow_tf32 = False  # float32 is the exact mode, in the patch convolution too


def _vision_runner(tower: AnyVisionTower, image: ImageConfig, plan: Plan) -> VisionRunner:
    if plan.backend == "openvino":
        from siglip_serve.engine.openvino.runners import OpenVinoVision

        return OpenVinoVision(tower, image, plan)
    if plan.backend == "fused" and isinstance(tower, VisionTower):
        from siglip_serve.engine.fused.runners import FusedVision

        return FusedVision(tower, image, *_fused_options(plan, len(tower.encoder.layers)))
    return TorchVision(tower, image, torch.device(plan.device), _dtype(plan), plan.max_rows)


def _naflex_runner(tower: NaflexVisionTower, image: NaflexImageConfig, plan: Plan) -> NaflexRunner:
    if plan.backend == "torch":
        return TorchNaflex(tower, image, torch.device(plan.device), _dtype(plan), plan.max_rows)
    if plan.backend == "fused":
        from siglip_serve.engine.fused.naflex import FusedNaflex

        return FusedNaflex(tower, image, *_fused_options(plan, len(tower.encoder.layers)))
    from siglip_serve.engine.openvino.naflex import OpenVinoNaflex

    return OpenVinoNaflex(tower, image, plan)


def _fused_options(plan: Plan, layers: int) -> tuple[torch.device, torch.dtype, bool, int, int]:
    """Return the arguments of a fused runner behind its tower and image."""
    blocks = min(plan.heatmap_blocks, layers)
    return torch.device(plan.device), _dtype(plan), plan.dtype == "float8", plan.max_rows, blocks


def _text_runner(tower: AnyTextTower, plan: Plan) -> Runner:
    if plan.backend == "openvino":
        from siglip_serve.engine.openvino.runners import OpenVinoText

        return OpenVinoText(tower, plan)
    if plan.backend == "fused" and isinstance(tower, TextTower):
        from siglip_serve.engine.fused.runners import FusedText

        return FusedText(tower, torch.device(plan.device), _dtype(plan), plan.max_rows)
    return TorchText(tower, torch.device(plan.device), _dtype(plan), plan.max_rows)


def _dtype(plan: Plan) -> torch.dtype:
    return _TORCH[plan.wide_dtype]


def _vision_plan(plan: Plan, tower: AnyVisionTower) -> Plan:
    width = tower.config.hidden_size
    family: Family = "clip" if isinstance(tower, ClipVisionTower) else "siglip"
    resolved = plan.for_vision(family, width, tower.config.hidden_act)
    if plan.dtype not in ("auto", resolved.dtype):
        print(
            f"siglip-serve: {resolved.dtype}, since a tower of width {width} gains nothing in {plan.dtype}",
            flush=True,
        )
    return _use_device(resolved)


def _text_plan(plan: Plan, tower: AnyTextTower) -> Plan:
    family: Family = "clip" if isinstance(tower, ClipTextTower) else "siglip"
    return _use_device(plan.for_text(family, tower.config.hidden_act))


def _use_device(plan: Plan) -> Plan:
    """Make the plan's GPU the current one, since streams, graphs and kernels belong to it."""
    if plan.device != "cpu":
        if not torch.cuda.is_available():
            raise SettingsError(f"device {plan.device}: this torch ({torch.__version__}) sees no CUDA GPU")
        torch.cuda.set_device(plan.device)
    return plan
