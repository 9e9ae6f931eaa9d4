"""How a tower is run fast: device, dtype, rows a pass, packed CPU weights, memory that runs out.

The towers in `siglip.py` stay as they read; what makes them fast is done to them here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from siglip_serve.checkpoint import ImageConfig
from siglip_serve.config import fastest_dtype
from siglip_serve.errors import DeviceMemoryError, SettingsError
from siglip_serve.siglip import MLP, VisionTower

__all__ = ["OUTPUTS", "Batch", "VisionEngine", "choose_dtype"]

OUTPUTS = ("EMBEDDING", "MEAN_EMBEDDING", "PATCH_EMBEDDINGS")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Beyond these a pass gains nothing: a GPU is full, and a CPU's caches hold less.
_ROWS = {"cuda": 64, "cpu": 8}


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
    if name == "auto":
        gpu = device.startswith("cuda")
        name = fastest_dtype(torch.cuda.get_device_capability(device)[0] if gpu else None)
    return _DTYPES[name]


class VisionEngine:
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
        self.device = torch.device(device)
        self.dtype = dtype
        self.max_rows = max_rows or _ROWS[self.device.type]
        self.tower = tower.to(self.device, dtype)
        if self.device.type == "cpu":
            _pack(self.tower, self.max_rows * tower.config.grid_size**2)
        # x * rescale, then (x - mean) / std, in the reference's order, so that float32 rounds alike.
        self._rescale = image.rescale
        self._mean = torch.tensor(image.mean, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(image.std, device=self.device).view(3, 1, 1)

    def __call__(self, pixels: NDArray[np.uint8], outputs: Iterable[str] = ("EMBEDDING",)) -> Batch:
        """Run the tower over all rows, in passes of at most `max_rows`.

        A pass that runs out of device memory is halved and tried again, down to one row.

        Args:
            pixels: [N, S, S, 3] RGB.
            outputs: which of `OUTPUTS` to compute. EMBEDDING [N, D] is the reference's
                `pooler_output`, MEAN_EMBEDDING [N, D] the mean over the patch tokens,
                PATCH_EMBEDDINGS [N, T, D] the reference's `last_hidden_state`; none is normalised.
        """
        wanted = [name for name in OUTPUTS if name in set(outputs)]
        failed = np.zeros(len(pixels), dtype=np.bool_)
        passes: list[dict[str, NDArray[np.float32]]] = []
        start, rows = 0, self.max_rows
        while start < len(pixels):
            part = pixels[start : start + rows]
            try:
                passes.append(self._run(part, wanted))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                if len(part) > 1:
                    rows = (len(part) + 1) // 2
                    continue
                failed[start] = True
                passes.append(self._nothing(wanted))
            start += len(part)
        return Batch({name: np.concatenate([p[name] for p in passes]) for name in wanted}, failed)

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

    def _nothing(self, wanted: list[str]) -> dict[str, NDArray[np.float32]]:
        config = self.tower.config
        shapes = {"PATCH_EMBEDDINGS": (1, config.grid_size**2, config.hidden_size)}
        return {
            name: np.full(shapes.get(name, (1, config.hidden_size)), np.nan, dtype=np.float32)
            for name in wanted
        }


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
    for name, child in module.named_children():
        if isinstance(child, MLP):
            setattr(module, name, _PackedMLP(child, rows))
        elif isinstance(child, nn.Linear):
            setattr(module, name, _PackedLinear(child, rows))
        else:
            _pack(child, rows)
