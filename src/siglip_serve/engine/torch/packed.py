"""Linear layers on CPUs whose weights lie in memory as oneDNN's kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from siglip_serve.towers.siglip import ACTIVATIONS, MLP

__all__ = ["pack_linear_layers"]

_Fused = tuple[str, list[float], str]
_NOTHING: _Fused = ("none", [], "")
# oneDNN's names for activations that it computes with the product before them.
_FUSED: dict[str, _Fused] = {"gelu_pytorch_tanh": ("gelu", [], "tanh"), "gelu": ("gelu", [], "none")}


def pack_linear_layers(module: nn.Module, rows: int) -> None:
    """Replace the linear layers below `module`. Without oneDNN for their dtype they stay as they are.

    Args:
        module: a tower on the CPU, float32 or bfloat16.
        rows: the number of tokens that one product usually takes, for which the weights are laid out.
    """
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
            pack_linear_layers(child, rows)


class _PackedLinear(nn.Module):
    """A linear layer with a packed weight, and an activation that is fused behind it."""

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
