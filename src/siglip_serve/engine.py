"""How a tower is run fast: device, dtype, rows a pass, packed CPU weights, memory that runs out.

The towers in `siglip.py` stay as they read; what makes them fast is done to them here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from siglip_serve.checkpoint import ImageConfig
from siglip_serve.config import fastest_dtype
from siglip_serve.errors import DeviceMemoryError, SettingsError
from siglip_serve.siglip import MLP, TextTower, VisionTower

__all__ = ["OUTPUTS", "Batch", "TextEngine", "VisionEngine", "choose_dtype"]

OUTPUTS = ("EMBEDDING", "MEAN_EMBEDDING", "PATCH_EMBEDDINGS")

_SECONDS_TO_ANSWER = 0.5

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Beyond these a pass gains nothing: a GPU is full, and a CPU's caches hold less.
_ROWS = {
    (VisionTower, "cuda"): 64,
    (VisionTower, "cpu"): 8,
    (TextTower, "cuda"): 256,
    (TextTower, "cpu"): 32,
}


@dataclass(frozen=True)
class Batch:
    """Outputs of N rows, some of which may have failed for want of memory.

    Attributes:
        outputs: float32 arrays [N, ...] by output name.
        failed: [N] bool.
    """

    outputs: dict[str, NDArray[np.float32]]
    failed: NDArray[np.bool_]

    def rows(self, start: int, end: int) -> dict[str, NDArray[np.float32]]:
        """The outputs of rows start to end.

        Raises:
            DeviceMemoryError: one of them did not fit into the device's memory.
        """
        if self.failed[start:end].any():
            raise DeviceMemoryError("the device has not enough free memory for even one row; try again later")
        return {name: array[start:end] for name, array in self.outputs.items()}


def choose_dtype(name: str, device: str) -> torch.dtype:
    """The torch dtype of a `dtype` setting; `auto` is bfloat16 where the device multiplies it fast.

    Raises:
        SettingsError: the device is a GPU that torch does not see.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SettingsError(f"device {device}: this torch ({torch.__version__}) sees no CUDA GPU")
    if name == "float16" and device == "cpu":
        raise SettingsError("dtype float16: not for CPUs; float32 and bfloat16 are")
    if name == "auto":
        gpu = device.startswith("cuda")
        name = fastest_dtype(torch.cuda.get_device_capability(device)[0] if gpu else None)
    return _DTYPES[name]


class _Engine:
    """What both towers share: placing, and passes that fit the device's memory."""

    def __init__(
        self, tower: VisionTower | TextTower, device: str, dtype: torch.dtype, max_rows: int
    ) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self.max_rows = max_rows or _ROWS[type(tower), self.device.type]
        tower.to(self.device, dtype)
        if self.device.type == "cpu":
            _pack(tower, self.max_rows * tower.context)

    def _in_passes(
        self, rows: NDArray[Any], run: Callable[[NDArray[Any]], dict[str, NDArray[np.float32]]]
    ) -> Batch:
        """`run` over all rows, at most `max_rows` at a time; a pass that runs out of memory is halved."""
        failed = np.zeros(len(rows), dtype=np.bool_)
        passes: list[tuple[int, dict[str, NDArray[np.float32]]]] = []
        start, size = 0, self.max_rows
        while start < len(rows):
            part = rows[start : start + size]
            try:
                passes.append((start, run(part)))
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    _end_if_lost(self.device)
                    raise
                torch.cuda.empty_cache()
                if len(part) > 1:
                    size = (len(part) + 1) // 2
                    continue
                failed[start] = True
            start += len(part)
        if not failed.any():
            names = passes[0][1]
            return Batch({name: np.concatenate([done[name] for _, done in passes]) for name in names}, failed)
        outputs: dict[str, NDArray[np.float32]] = {}
        for start, done in passes:
            for name, array in done.items():
                whole = outputs.setdefault(name, np.zeros((len(rows), *array.shape[1:]), dtype=np.float32))
                whole[start : start + len(array)] = array
        return Batch(outputs, failed)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "_STATUS_ALLOC_FAILED" in str(error)


def _end_if_lost(device: torch.device) -> None:
    """End the process if the GPU's context is lost, once its last answers are out.

    After a fault inside a kernel every further call fails, and only a new process serves again; the
    launcher notices the death and loads the model again.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        threading.Timer(_SECONDS_TO_ANSWER, os._exit, [1]).start()


class VisionEngine(_Engine):
    """uint8 pixels -> float32 embeddings.

    Args:
        tower: on the CPU, float32; the engine takes it over.
        image: the checkpoint's normalisation, applied on the device.
        device: `cpu` or `cuda:<index>`.
        dtype: of weights and arithmetic.
        max_rows: rows in one pass; 0 leaves the choice to the engine.
    """

    def __init__(
        self, tower: VisionTower, image: ImageConfig, device: str, dtype: torch.dtype, max_rows: int = 0
    ) -> None:
        super().__init__(tower, device, dtype, max_rows)
        self.tower = tower
        # x * rescale, then (x - mean) / std, in the reference's order, so that float32 rounds alike.
        self._rescale = image.rescale
        self._mean = torch.tensor(image.mean, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(image.std, device=self.device).view(3, 1, 1)

    def __call__(self, pixels: NDArray[np.uint8], outputs: Iterable[str] = ("EMBEDDING",)) -> Batch:
        """Run the tower over all rows.

        Args:
            pixels: [N, S, S, 3] RGB, at least one row.
            outputs: which of `OUTPUTS` to compute. EMBEDDING [N, D] is the reference's
                `pooler_output`, MEAN_EMBEDDING [N, D] the mean over the patch tokens,
                PATCH_EMBEDDINGS [N, T, D] the reference's `last_hidden_state`; none is normalised.
        """
        wanted = [name for name in OUTPUTS if name in set(outputs)]
        return self._in_passes(pixels, lambda part: self._run(part, wanted))

    @torch.inference_mode()
    def _run(self, pixels: NDArray[np.uint8], wanted: list[str]) -> dict[str, NDArray[np.float32]]:
        x = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2)
        x = ((x * self._rescale - self._mean) / self._std).to(self.dtype)
        tokens = self.tower(x)
        compute: dict[str, Callable[[], Tensor]] = {
            "EMBEDDING": lambda: self.tower.head(tokens),
            "MEAN_EMBEDDING": lambda: tokens.mean(dim=1, dtype=torch.float32),
            "PATCH_EMBEDDINGS": lambda: tokens,
        }
        return {name: compute[name]().float().cpu().numpy() for name in wanted}


class TextEngine(_Engine):
    """Token ids -> float32 embeddings; arguments as for `VisionEngine`."""

    def __init__(self, tower: TextTower, device: str, dtype: torch.dtype, max_rows: int = 0) -> None:
        super().__init__(tower, device, dtype, max_rows)
        self.tower = tower

    def __call__(self, ids: NDArray[np.int64]) -> Batch:
        """EMBEDDING [N, P], the reference's `pooler_output`, of ids [N, T]; at least one row."""
        return self._in_passes(ids, self._run)

    @torch.inference_mode()
    def _run(self, ids: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
        tokens = self.tower(torch.from_numpy(ids).to(self.device))
        return {"EMBEDDING": self.tower.pool(tokens).float().cpu().numpy()}


class _PackedLinear(nn.Module):
    """A linear layer whose weight lies as oneDNN's kernels read it; a GELU can be fused behind it."""

    def __init__(self, linear: nn.Linear, rows: int, gelu: bool = False) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = linear.bias.detach()
        self.activation: tuple[str, list[float], str] = ("gelu", [], "tanh") if gelu else ("none", [], "")

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.activation)


class _PackedMLP(nn.Sequential):
    def __init__(self, mlp: MLP, rows: int) -> None:
        super().__init__(_PackedLinear(mlp.fc1, rows, gelu=True), _PackedLinear(mlp.fc2, rows))


def _pack(module: nn.Module, rows: int) -> None:
    """Replace the linear layers below `module`; without oneDNN they stay as they are."""
    if not torch.backends.mkldnn.is_available():
        return
    bfloat16 = any(parameter.dtype == torch.bfloat16 for parameter in module.parameters())
    if bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    for name, child in module.named_children():
        if isinstance(child, MLP):
            setattr(module, name, _PackedMLP(child, rows))
        elif isinstance(child, nn.Linear):
            setattr(module, name, _PackedLinear(child, rows))
        else:
            _pack(child, rows)
