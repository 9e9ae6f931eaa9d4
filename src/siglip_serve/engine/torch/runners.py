"""Towers as torch runs them, operation by operation; on CPUs with weights packed for oneDNN."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from siglip_serve.checkpoint.config import ImageConfig
from siglip_serve.engine.passes import Arrays, Finish
from siglip_serve.heatmaps.attribution import Explainer, Explanation
from siglip_serve.towers.load import AnyTextTower, AnyVisionTower
from siglip_serve.towers.siglip import ACTIVATIONS, MLP

__all__ = ["Normalization", "PlainText", "PlainVision"]

# A GPU is full with so many rows, and a CPU's caches hold no more.
_VISION_ROWS = {"cuda": 64, "cpu": 8}
_TEXT_ROWS = {"cuda": 256, "cpu": 32}


class PlainVision:
    """uint8 pixels -> outputs; takes the tower over."""

    def __init__(
        self,
        tower: AnyVisionTower,
        image: ImageConfig,
        device: torch.device,
        dtype: torch.dtype,
        max_rows: int = 0,
    ) -> None:
        self.max_rows = max_rows or _VISION_ROWS[device.type]
        self.tower = tower
        _place(tower, device, dtype, self.max_rows * tower.context)
        self._normalize = Normalization(image, device, dtype)

    @torch.inference_mode()
    def __call__(self, pixels: NDArray[np.uint8], /, wanted: Sequence[str]) -> Finish:
        """The wanted outputs of pixels [n, S, S, 3]."""
        tokens = self.tower(self._normalize(pixels))
        compute: dict[str, Callable[[], Tensor]] = {
            "EMBEDDING": lambda: self.tower.head(tokens),
            "MEAN_EMBEDDING": lambda: self.tower.patches(tokens).mean(dim=1, dtype=torch.float32),
            "PATCH_EMBEDDINGS": lambda: self.tower.patches(tokens).contiguous(),
        }
        return _done({name: compute[name]().float().cpu().numpy() for name in wanted})

    @torch.inference_mode()
    def explain(self, explainer: Explainer, pixels: NDArray[np.uint8], vectors: Tensor) -> Explanation:
        """As `VisionRunner`."""
        x = self._normalize(pixels)
        return explainer.explain(self.tower, x, vectors.to(x.device))


class Normalization:
    """uint8 pixels [n, S, S, 3] -> what a tower takes, [n, 3, S, S], on its device."""

    def __init__(self, image: ImageConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        # x * rescale, then (x - mean) / std, in the reference's order, so that float32 rounds alike.
        self._rescale = image.rescale
        self._mean = torch.tensor(image.mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(image.std, device=device).view(3, 1, 1)

    def __call__(self, pixels: NDArray[np.uint8]) -> Tensor:
        x = torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2)
        return ((x * self._rescale - self._mean) / self._std).to(self._dtype)


class PlainText:
    """Token ids -> EMBEDDING; takes the tower over."""

    def __init__(
        self, tower: AnyTextTower, device: torch.device, dtype: torch.dtype, max_rows: int = 0
    ) -> None:
        self.max_rows = max_rows or _TEXT_ROWS[device.type]
        self.tower, self.device = tower, device
        _place(tower, device, dtype, self.max_rows * tower.context)

    @torch.inference_mode()
    def __call__(self, ids: NDArray[np.int64], /, wanted: Sequence[str]) -> Finish:  # noqa: ARG002 - one output
        """EMBEDDING [n, P] of ids [n, T]."""
        on_device = torch.from_numpy(ids).to(self.device)
        tokens = self.tower(on_device)
        return _done({"EMBEDDING": self.tower.pool(tokens, on_device).float().cpu().numpy()})


def _done(outputs: Arrays) -> Finish:
    return lambda: outputs


def _place(tower: nn.Module, device: torch.device, dtype: torch.dtype, tokens: int) -> None:
    tower.to(device, dtype)
    if device.type == "cpu":
        _pack(tower, tokens)


_Fused = tuple[str, list[float], str]
_NOTHING: _Fused = ("none", [], "")
# oneDNN's names for activations that it computes with the product before them.
_FUSED: dict[str, _Fused] = {"gelu_pytorch_tanh": ("gelu", [], "tanh"), "gelu": ("gelu", [], "none")}


class _PackedLinear(nn.Module):
    """A linear layer whose weight lies as oneDNN's kernels read it; an activation can be fused behind it."""

    def __init__(self, linear: nn.Linear, rows: int, activation: _Fused = _NOTHING) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.activation)


class _PackedMLP(nn.Module):
    def __init__(self, mlp: MLP, rows: int) -> None:
        super().__init__()
        fused = _FUSED.get(mlp.activation)
        self.fc1 = _PackedLinear(mlp.fc1, rows, fused or _NOTHING)
        self.fc2 = _PackedLinear(mlp.fc2, rows)
        self.activation = nn.Identity() if fused else ACTIVATIONS[mlp.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


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
