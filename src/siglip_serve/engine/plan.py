"""Decide how a tower runs: device, dtype and backend. This is the one place where `auto` becomes a choice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from siglip_serve.checkpoint.model_config import Family
from siglip_serve.config import Backend, Dtype, Settings
from siglip_serve.errors import SettingsError
from siglip_serve.machine import gpu_capabilities, processor_flags

__all__ = ["Plan", "fastest_dtype"]

# The activation that the fused kernels compute within a product, and float8 alone, and all that they compute.
FUSED_ACTIVATION = "gelu_pytorch_tanh"
_FUSED_ACTIVATIONS = (FUSED_ACTIVATION, "gelu", "quick_gelu")

_FLOAT8_CAPABILITY = (8, 9)
_FUSED_CAPABILITY = (8, 0)
# siglip-tiny, of a quarter of this width, is slower in float8; base is a third faster
# (benchmarks/results/vision_waterfall.csv).
_FLOAT8_WIDTH = 512


@dataclass(frozen=True)
class Plan:
    """Options of a tower's run, as chosen by the operator or, once resolved, as they are used.

    Attributes:
        device: `cpu` or `cuda:<index>`.
        dtype: arithmetic of the tower. `auto` is the fastest that is close to float32.
        backend: `torch`, `openvino` (CPUs) or `fused` (GPUs). `auto` is the fastest that the device has.
        max_rows: rows in one pass. 0 leaves the choice to the runner.
        threads: CPU threads. 0 means all cores.
        cache: folder that keeps converted models between starts. Without one, nothing is kept.
        calibration: folder of images to calibrate int8 on.
        heatmap_blocks: last blocks of a SigLIP tower that heatmaps are rolled back through.
        heatmap_vectors: most vectors of one image for which blocks are rolled back. Each adds to the cost.
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

    @classmethod
    def of(cls, settings: Settings, device: str, threads: int) -> Plan:
        """Take the options of a device's towers from the settings.

        Args:
            threads: CPU threads, unless the settings give a number.
        """
        return cls(
            device=device,
            dtype=settings.dtype,
            backend=settings.backend,
            max_rows=settings.max_rows,
            threads=settings.threads or threads,
            cache=settings.cache_folder,
            calibration=settings.calibration_folder,
            heatmap_blocks=settings.heatmap_blocks,
            heatmap_vectors=settings.heatmap_prompts,
        )

    @property
    def wide_dtype(self) -> Dtype:
        """Arithmetic of the parts that never run in 8 bits: pooling, embeddings, text towers."""
        if self.dtype == "int8":
            return fastest_dtype(None)
        return "bfloat16" if self.dtype == "float8" else self.dtype

    def for_vision(self, family: Family, width: int, activation: str = FUSED_ACTIVATION) -> Plan:
        """Resolve the plan for a vision tower of `width`, its hidden size, with this `hidden_act`.

        float8 gains nothing on a tower narrower than 512, and its errors average out over fewer numbers, so
        such a tower gets bfloat16.

        Raises:
            SettingsError: the device or the family cannot run the plan.
        """
        plan = self._for_tower(family, activation).resolve()
        narrow = plan.dtype == "float8" and width < _FLOAT8_WIDTH
        return replace(plan, dtype="bfloat16") if narrow else plan

    def for_text(self, family: Family, activation: str = FUSED_ACTIVATION) -> Plan:
        """Resolve the plan for a text tower with this `hidden_act`. It never runs in 8 bits.

        Raises:
            SettingsError: the device or the family cannot run the plan.
        """
        # The text tower of NaFlex is SigLIP's.
        plan = self._for_tower("siglip" if family == "naflex" else family, activation).resolve()
        return replace(plan, dtype=plan.wide_dtype)

    def resolve(self) -> Plan:
        """Replace `auto` by the device's choice.

        Raises:
            SettingsError: the device cannot run the plan.
        """
        return self._resolve_gpu() if self.device.startswith("cuda") else self._resolve_cpu()

    def _for_tower(self, family: Family, activation: str) -> Plan:
        if family == "naflex" and self.dtype == "int8":
            raise SettingsError(
                "dtype int8: not for towers of NaFlex; float32, bfloat16, and on GPUs float16 and float8 are"
            )
        if family != "clip" and activation == FUSED_ACTIVATION:
            return self
        if self.dtype == "float8":
            kind = f"towers with {FUSED_ACTIVATION} only, this one has {activation}"
            if family == "clip":
                kind = "SigLIP's towers only"
            raise SettingsError(f"dtype float8: for {kind}; use bfloat16")
        if self.backend == "fused" and activation not in _FUSED_ACTIVATIONS:
            raise SettingsError(
                f"backend fused: for towers with {', '.join(_FUSED_ACTIVATIONS)} only, this one has "
                f"{activation}; backend torch runs it"
            )
        other = self.device.startswith("cuda") and activation not in _FUSED_ACTIVATIONS
        return replace(self, backend="torch") if other and self.backend == "auto" else self

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
            raise SettingsError(
                "dtype int8: needs the backend openvino and the extra int8 "
                "(`.venv/bin/pip install -e '.[int8]'` in the checkout)"
            )
        if backend == "openvino" and not find_spec("openvino"):
            raise SettingsError("backend openvino: the package openvino is not installed")
        return replace(self, dtype=dtype, backend=backend)

    def _resolve_gpu(self) -> Plan:
        capability = _capability(self.device)
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


def fastest_dtype(gpu_capability: int | None) -> Dtype:
    """Choose the fastest dtype that is close to float32, which is the meaning of `auto`.

    Args:
        gpu_capability: major compute capability of the GPU, or None for the CPU.

    Returns:
        bfloat16 where the device has instructions for it. Otherwise float16 on GPUs, float32 on CPUs.
    """
    if gpu_capability is not None:
        return "bfloat16" if gpu_capability >= 8 else "float16"
    return "float32" if {"avx512_bf16", "amx_bf16"}.isdisjoint(processor_flags()) else "bfloat16"


def _capability(device: str) -> tuple[int, int]:
    found, index = gpu_capabilities(), int(device.partition(":")[2] or 0)
    if index >= len(found):
        raise SettingsError(f"device {device}: the NVIDIA driver shows {len(found) or 'no'} GPUs")
    return found[index]
