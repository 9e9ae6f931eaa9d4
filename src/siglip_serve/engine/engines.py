"""Engines: a runner for the device and the dtype, and passes that fit its memory.

OpenVINO's towers do without torch, unless heatmaps are asked for: its import costs a process 130 MB.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from siglip_serve.checkpoint.model_config import (
    ClipTextConfig,
    ClipVisionConfig,
    Family,
    ImageConfig,
    ModelConfig,
    NaflexImageConfig,
)
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
from siglip_serve.engine.texts import embedded_places, round_up, shorten
from siglip_serve.errors import SettingsError
from siglip_serve.machine import available_cores
from siglip_serve.towers.stored import StoredText, StoredVision

if TYPE_CHECKING:
    import torch

    from siglip_serve.heatmaps.attribution import Explainer, Explanation
    from siglip_serve.towers.load import AnyTextTower, AnyVisionTower
    from siglip_serve.towers.naflex import NaflexVisionTower

__all__ = ["NaflexEngine", "TextEngine", "VisionEngine", "open_text", "open_vision"]

# Largest share of padding in a pass of texts. They are short, so that a further pass may cost more.
_TEXT_PADDING = 0.3


class VisionEngine:
    """Run a vision tower: uint8 pixels -> float32 outputs.

    Args:
        tower: on the CPU, float32. The engine takes it over. One that is not in torch is for OpenVINO.
        image: the checkpoint's normalisation, applied on the device.
        plan: how to run the tower.

    Attributes:
        plan: the plan without `auto`.
        runner: runs one pass.

    Raises:
        SettingsError: the device, or the tower's family, cannot run the plan.
    """

    def __init__(self, tower: AnyVisionTower | StoredVision, image: ImageConfig, plan: Plan) -> None:
        self.plan = _vision_plan(plan, tower)
        runner: VisionRunner
        if self.plan.backend == "openvino":
            from siglip_serve.engine.openvino.runners import OpenVinoVision

            self._stored = _stored_vision(tower)
            runner = OpenVinoVision(self._stored, image, self.plan)
        else:
            in_torch = cast("AnyVisionTower", tower)
            self._explainer = self._explain_by(in_torch)  # before the runner packs the weights of the tower
            runner = _vision_runner(in_torch, image, self.plan)
        self.runner: Runner = runner
        self._explain = runner.explain

    def prepare_heatmaps(self) -> None:
        """Do now what `explain` would do when it is first called, which takes seconds on a CPU."""
        _ = self._explainer

    @cached_property
    def _explainer(self) -> Explainer:
        _prepare_torch(self.plan)
        return self._explain_by(self._stored.tower)

    def _explain_by(self, tower: AnyVisionTower) -> Explainer:
        from siglip_serve.heatmaps.attribution import explainer_of

        return explainer_of(tower, self.plan.heatmap_blocks, self.plan.heatmap_vectors)

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
        import torch

        from siglip_serve.heatmaps.attribution import on_host

        with out_of_memory_refused(f"{len(vectors)} prompts"):
            return on_host(self._explain(self._explainer, pixels, torch.from_numpy(vectors)))


class NaflexEngine:
    """Run a NaFlex vision tower: uint8 patches -> float32 outputs. Arguments as for `VisionEngine`."""

    def __init__(self, tower: NaflexVisionTower, image: NaflexImageConfig, plan: Plan) -> None:
        from siglip_serve.heatmaps.attribution import SiglipExplainer

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
        import torch

        from siglip_serve.heatmaps.attribution import Explanation, on_host

        alone = rows.take(np.zeros(1, dtype=np.intp))
        with out_of_memory_refused(f"{len(vectors)} prompts"):
            found = on_host(self.runner.explain(self._explainer, alone, torch.from_numpy(vectors)))
            maps = np.zeros((len(vectors), self._most), dtype=np.float32)
            maps[:, : int(alone.counts[0])] = found.maps
            return Explanation(maps, found.unattributed, found.embedding)


class TextEngine:
    """Run a text tower: token ids -> float32 embeddings. Arguments and errors as for `VisionEngine`."""

    def __init__(self, tower: AnyTextTower | StoredText, plan: Plan) -> None:
        self.plan = _text_plan(plan, tower)
        self._config = tower.config
        self.runner = _text_runner(tower, self.plan)
        self._lengths: list[int] | None = getattr(self.runner, "lengths", None)

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
        counts = round_up(places + 1, self._lengths) if self._lengths else places + 1
        groups = group_rows(counts, self.runner.max_rows, _TEXT_PADDING)
        return in_groups(groups, lambda group: self._run(ids[group]), len(ids))

    def _run(self, ids: NDArray[np.int64]) -> Batch:
        ids = shorten(self._config, ids, self._lengths)
        return in_passes(ids, self.runner.max_rows, lambda some: self.runner(some, ["EMBEDDING"]))


def open_vision(config: ModelConfig, plan: Plan) -> VisionEngine | NaflexEngine:
    """Load the vision tower of a checkpoint, and give torch the threads of the plan.

    Raises:
        CheckpointError: the weights do not belong to the configuration.
        SettingsError: the device, or the tower's family, cannot run the plan.
    """
    shape, image = config.vision, config.image
    if isinstance(image, NaflexImageConfig):
        from siglip_serve.towers import naflex

        _prepare_torch(plan)
        return NaflexEngine(naflex.load_vision(config.path), image, plan)
    if plan.for_vision(config.family, shape.hidden_size, shape.hidden_act).backend == "openvino":
        return VisionEngine(StoredVision.open(config), image, plan)
    from siglip_serve.towers.load import load_vision

    _prepare_torch(plan)
    return VisionEngine(load_vision(config.path), image, plan)


def open_text(config: ModelConfig, plan: Plan) -> TextEngine:
    """Load the text tower of a checkpoint. See `open_vision`."""
    if plan.for_text(config.family, config.text.hidden_act).backend == "openvino":
        return TextEngine(StoredText.open(config), plan)
    from siglip_serve.towers.load import load_text

    _prepare_torch(plan)
    return TextEngine(load_text(config.path), plan)


def _prepare_torch(plan: Plan) -> None:
    import torch

    torch.set_num_threads(plan.threads or available_cores())
    torch.backends.cudnn.allow_tf32 = False  # float32 is the exact mode, in the patch convolution too


def _vision_runner(tower: AnyVisionTower, image: ImageConfig, plan: Plan) -> VisionRunner:
    if plan.backend == "torch":
        import torch

        from siglip_serve.engine.torch.runners import TorchVision

        return TorchVision(tower, image, torch.device(plan.device), _dtype(plan), plan.max_rows)
    from siglip_serve.engine.fused.runners import FusedVision

    return FusedVision(tower, image, *_fused_options(plan, len(tower.encoder.layers)))


def _naflex_runner(tower: NaflexVisionTower, image: NaflexImageConfig, plan: Plan) -> NaflexRunner:
    if plan.backend == "torch":
        import torch

        from siglip_serve.engine.torch.naflex import TorchNaflex

        return TorchNaflex(tower, image, torch.device(plan.device), _dtype(plan), plan.max_rows)
    if plan.backend == "fused":
        from siglip_serve.engine.fused.naflex import FusedNaflex

        return FusedNaflex(tower, image, *_fused_options(plan, len(tower.encoder.layers)))
    from siglip_serve.engine.openvino.naflex import OpenVinoNaflex

    return OpenVinoNaflex(tower, image, plan)


def _fused_options(plan: Plan, layers: int) -> tuple[torch.device, torch.dtype, bool, int, int]:
    """Return the arguments of a fused runner behind its tower and image."""
    import torch

    blocks = min(plan.heatmap_blocks, layers)
    return torch.device(plan.device), _dtype(plan), plan.dtype == "float8", plan.max_rows, blocks


def _text_runner(tower: AnyTextTower | StoredText, plan: Plan) -> Runner:
    if plan.backend == "openvino":
        from siglip_serve.engine.openvino.runners import OpenVinoText

        return OpenVinoText(_stored_text(tower), plan)
    import torch

    device, in_torch = torch.device(plan.device), cast("AnyTextTower", tower)
    if plan.backend == "torch":
        from siglip_serve.engine.torch.runners import TorchText

        return TorchText(in_torch, device, _dtype(plan), plan.max_rows)
    from siglip_serve.engine.fused.runners import FusedText

    return FusedText(in_torch, device, _dtype(plan), plan.max_rows)


def _stored_vision(tower: AnyVisionTower | StoredVision) -> StoredVision:
    if isinstance(tower, StoredVision):
        return tower
    from siglip_serve.towers.weights import parameters_of

    return StoredVision(parameters_of(tower), tower.config)


def _stored_text(tower: AnyTextTower | StoredText) -> StoredText:
    if isinstance(tower, StoredText):
        return tower
    from siglip_serve.towers.weights import parameters_of

    return StoredText(parameters_of(tower), tower.config)


def _dtype(plan: Plan) -> torch.dtype:
    import torch

    return cast("torch.dtype", getattr(torch, plan.wide_dtype))


def _vision_plan(plan: Plan, tower: AnyVisionTower | StoredVision) -> Plan:
    config = tower.config
    family: Family = "clip" if isinstance(config, ClipVisionConfig) else "siglip"
    resolved = plan.for_vision(family, config.hidden_size, config.hidden_act)
    if plan.dtype not in ("auto", resolved.dtype):
        print(
            f"siglip-serve: {resolved.dtype}, since a tower of width {config.hidden_size} gains nothing in "
            f"{plan.dtype}",
            flush=True,
        )
    return _use_device(resolved)


def _text_plan(plan: Plan, tower: AnyTextTower | StoredText) -> Plan:
    family: Family = "clip" if isinstance(tower.config, ClipTextConfig) else "siglip"
    return _use_device(plan.for_text(family, tower.config.hidden_act))


def _use_device(plan: Plan) -> Plan:
    """Make the plan's GPU the current one, since streams, graphs and kernels belong to it."""
    if plan.device != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise SettingsError(f"device {plan.device}: this torch ({torch.__version__}) sees no CUDA GPU")
        torch.cuda.set_device(plan.device)
    return plan
