"""The engines: a runner for the device and the dtype, and passes that fit its memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from siglip_serve.checkpoint import ImageConfig
from siglip_serve.clip import ClipTextTower, ClipVisionTower
from siglip_serve.config import Backend, Dtype, fastest_dtype, tower_dtype
from siglip_serve.engine.passes import (
    OUTPUTS,
    Batch,
    Runner,
    VisionRunner,
    in_passes,
    out_of_memory_refused,
)
from siglip_serve.engine.plain import PlainText, PlainVision
from siglip_serve.errors import SettingsError
from siglip_serve.heatmap import explainer_of
from siglip_serve.siglip import VisionTower
from siglip_serve.towers import AnyTextTower, AnyVisionTower

__all__ = ["Explained", "Plan", "TextEngine", "VisionEngine"]

_TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FLOAT8_CAPABILITY = (8, 9)
_FUSED_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Plan:
    """How a tower is to be run.

    Attributes:
        device: `cpu` or `cuda:<index>`.
        dtype: arithmetic of the tower; `auto`: the fastest that is close to float32. A text tower runs in
            16 bits where this is float8 or int8.
        backend: `torch`, `openvino` (CPUs), `fused` (GPUs); `auto`: the fastest that the device has. CLIP's
            towers run on `torch` alone, and not in 8 bits.
        max_rows: rows in one pass; 0 leaves the choice to the runner.
        threads: CPU threads; 0: all cores.
        cache: where converted models are kept between starts; None: nowhere.
        calibration: folder of images to calibrate int8 on.
        heatmap_blocks: of a SigLIP tower's last ones, how many heatmaps are rolled back through.
        heatmap_vectors: beyond so many vectors none is rolled back: the cost would grow with each.
    """

    device: str = "cpu"
    dtype: Dtype = "auto"
    backend: Backend = "auto"
    max_rows: int = 0
    threads: int = 0
    cache: Path | None = None
    calibration: Path | None = None
    heatmap_blocks: int = 2
    heatmap_vectors: int = 32

    def for_clip(self) -> Plan:
        """The same for a tower of CLIP.

        Raises:
            SettingsError: these towers do not run so.
        """
        if self.backend not in ("auto", "torch"):
            raise SettingsError(f"backend {self.backend}: runs SigLIP's towers only; torch runs CLIP's")
        if self.dtype in ("float8", "int8"):
            raise SettingsError(
                f"dtype {self.dtype}: for SigLIP's towers only; float32, bfloat16 and float16 are for CLIP's"
            )
        return replace(self, backend="torch")

    def resolve(self) -> Plan:
        """The same without `auto`.

        Raises:
            SettingsError: this device cannot run that.
        """
        return self._resolve_gpu() if self.device.startswith("cuda") else self._resolve_cpu()

    def _resolve_cpu(self) -> Plan:
        dtype = fastest_dtype(None) if self.dtype == "auto" else self.dtype
        if dtype in ("float16", "float8"):
            raise SettingsError(f"dtype {dtype}: not for CPUs; float32, bfloat16 and int8 are")
        if self.backend == "fused":
            raise SettingsError("backend fused: not for CPUs; torch and openvino are")
        backend = self.backend
        if backend == "auto":
            # In float32 too: as exact as torch with packed weights, and faster (results/cpu_engine.csv).
            backend = "openvino" if find_spec("openvino") else "torch"
        if dtype == "int8" and backend != "openvino":
            raise SettingsError("dtype int8: needs the backend openvino (pip install 'siglip-serve[int8]')")
        if backend == "openvino" and not find_spec("openvino"):
            raise SettingsError("backend openvino: the package openvino is not installed")
        return replace(self, dtype=dtype, backend=backend)

    def _resolve_gpu(self) -> Plan:
        if not torch.cuda.is_available():
            raise SettingsError(f"device {self.device}: this torch ({torch.__version__}) sees no CUDA GPU")
        capability = torch.cuda.get_device_capability(self.device)
        dtype = fastest_dtype(capability[0]) if self.dtype == "auto" else self.dtype
        if dtype == "int8":
            raise SettingsError("dtype int8: not for GPUs; float32, bfloat16, float16 and float8 are")
        if self.backend == "openvino":
            raise SettingsError("backend openvino: not for GPUs; torch and fused are")
        if dtype == "float8" and capability < _FLOAT8_CAPABILITY:
            raise SettingsError(
                "dtype float8: needs a GPU of compute capability 8.9 or newer "
                f"(this one has {capability[0]}.{capability[1]}); bfloat16 and float16 do without"
            )
        fusible = dtype != "float32" and capability >= _FUSED_CAPABILITY and find_spec("triton") is not None
        if not fusible and (self.backend == "fused" or dtype == "float8"):
            raise SettingsError(
                f"backend {self.backend} with dtype {dtype}: needs 16 or 8 bits, a GPU of compute capability "
                f"8.0 or newer (this one has {capability[0]}.{capability[1]}) and the package triton"
            )
        backend = self.backend
        if backend == "auto":
            backend = "fused" if fusible else "torch"
        if dtype == "float8" and backend != "fused":
            raise SettingsError("dtype float8: needs the backend fused")
        return replace(self, dtype=dtype, backend=backend)


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
        self.plan = _prepare(plan, tower)
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
        self.plan = _prepare(plan, tower)
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
        from siglip_serve.engine.blocks import Levers
        from siglip_serve.engine.fused import FusedVision

        levers = Levers(float8=plan.dtype == "float8")
        device, blocks = torch.device(plan.device), min(plan.heatmap_blocks, len(tower.encoder.layers))
        return FusedVision(tower, image, device, _dtype(plan), levers, plan.max_rows, blocks)
    from siglip_serve.engine.openvino import OpenVinoVision

    return OpenVinoVision(tower, image, plan)


def _text_runner(tower: AnyTextTower, plan: Plan) -> Runner:
    if isinstance(tower, ClipTextTower) or plan.backend == "torch":
        return PlainText(tower, torch.device(plan.device), _dtype(plan), plan.max_rows)
    if plan.backend == "fused":
        from siglip_serve.engine.fused import FusedText

        return FusedText(tower, torch.device(plan.device), _dtype(plan), plan.max_rows)
    from siglip_serve.engine.openvino import OpenVinoText

    return OpenVinoText(tower, plan)


def _dtype(plan: Plan) -> torch.dtype:
    """Of what is not in 8 bits."""
    return _TORCH.get(plan.dtype, torch.bfloat16)


def _prepare(plan: Plan, tower: AnyVisionTower | AnyTextTower) -> Plan:
    """The plan without `auto`, with its GPU as the current one: streams, graphs and kernels are its."""
    plan = (plan.for_clip() if isinstance(tower, ClipVisionTower | ClipTextTower) else plan).resolve()
    if plan.device != "cpu":
        torch.cuda.set_device(plan.device)
    if isinstance(tower, VisionTower):
        width = tower.config.hidden_size
        dtype = tower_dtype(plan.dtype, width)
        if dtype != plan.dtype:
            why = f"a tower of width {width} gains nothing in {plan.dtype}"
            print(f"siglip-serve: {dtype}, since {why}", flush=True)
            plan = replace(plan, dtype=dtype)
    return plan
