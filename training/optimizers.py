"""Updates of weights from gradients: AdamW and Muon, the learning rate over time, and a moving average.

Muon takes the matrices of the residual blocks: momentum made orthogonal.
It is Keller Jordan's method (2024), with the scaling of Moonshot AI's "Muon is scalable" (2025) that gives
its updates the size of AdamW's, so that one learning rate serves both.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

__all__ = ["MovingAverage", "Muon", "optimizers", "orthogonal", "set_rate"]

_Model = TypeVar("_Model", bound=nn.Module)

_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring all singular values of [n, rows, columns] near 1 by a Newton-Schulz iteration."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    first, third, fifth = _QUINTIC
    for _ in range(steps):
        gram = x @ x.mT
        x = first * x + (third * gram + fifth * gram @ gram) @ x
    return x if wide else x.mT


class Muon(Optimizer):
    """Momentum, made orthogonal, for matrices. Matrices of one shape are taken together."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)
        return loss

    def _update(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        buffers = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        looking_ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])
        stack = torch.stack(list(looking_ahead))
        half = torch.bfloat16 if stack.is_cuda else stack.dtype
        update = orthogonal(stack.to(half)).to(stack.dtype)
        size = 0.2 * max(stack.shape[1:]) ** 0.5
        torch._foreach_mul_(list(parameters), 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(list(parameters), list(update.unbind(0)), alpha=-group["lr"] * size)


def optimizers(modules: Sequence[nn.Module], lr: float, weight_decay: float, muon: bool) -> list[Optimizer]:
    """The optimizers of all parameters of `modules`.

    Args:
        modules: those that are trained.
        lr: learning rate of all.
        weight_decay: of matrices; embeddings, biases and gains have none.
        muon: use Muon for the matrices of the residual blocks.
    """
    blocks, matrices, others = [], [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.ndim < 2 or "embedding" in name or "probe" in name:
                others.append(parameter)
            elif muon and "encoder.layers" in name:
                blocks.append(parameter)
            else:
                matrices.append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    adam = AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=others[0].is_cuda)
    return [adam, Muon(blocks, lr, weight_decay)] if blocks else [adam]


def set_rate(optimizers: Iterable[Optimizer], most: float, progress: float) -> None:
    """Set the learning rate at a progress of 0..1: up to `most` in the first 3%, then a cosine to nothing."""
    warm_up = 0.03
    rate = progress / warm_up
    if progress >= warm_up:
        rate = 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = most * rate


class MovingAverage(Generic[_Model]):
    """Moving average of a model's parameters, itself a `model`."""

    def __init__(self, live: _Model, decay: float) -> None:
        self.model = copy.deepcopy(live)
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self, live: _Model) -> None:
        """Take in the live model's parameters. Early on the average forgets faster."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.model.parameters()), list(live.parameters()), 1 - decay)

    def save(self, path: Path, prefix: str = "") -> None:
        """Write the parameters whose names begin with `prefix`, in float32."""
        values = self.model.state_dict().items()
        save_file(
            {name: value.float().cpu().contiguous() for name, value in values if name.startswith(prefix)},
            path,
        )
