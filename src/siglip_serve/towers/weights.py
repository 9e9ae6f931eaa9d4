"""Load a checkpoint's tensors as the parameters of a tower in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from siglip_serve.towers.layouts import Side
from siglip_serve.towers.parameters import Parameters, read_parameters

__all__ = ["fill", "load_strictly", "parameters_of", "without_values"]


@contextmanager
def without_values() -> Iterator[None]:
    """Make modules on the meta device, without initial values.

    torch would import its compiler for the initial values of an embedding there, which takes a second.
    """
    with torch.device("meta"), _NoValues():
        yield


class _NoValues(TorchFunctionMode):
    """Leaves out every function of `torch.nn.init`."""

    def __torch_function__(
        self, func: Callable[..., Any], _: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def load_strictly(tower: nn.Module, path: Path, side: Side) -> None:
    """Load a tower's weights in float32, on the CPU, and set it to evaluation mode, without gradients.

    Args:
        tower: made on the meta device.
        path: the checkpoint's directory.
        side: which tower of the checkpoint it is.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape. The first 20 are listed.
    """
    shapes = {name: list(parameter.shape) for name, parameter in tower.state_dict().items()}
    fill(tower, read_parameters(path, side, shapes))


def fill(tower: nn.Module, parameters: Parameters) -> None:
    """Give a tower that was made on the meta device its parameters, whose memory it shares where it can."""
    tower.load_state_dict(
        {name: torch.from_numpy(values) for name, values in parameters.items()}, assign=True
    )
    tower.eval().requires_grad_(False)


def parameters_of(tower: nn.Module) -> Parameters:
    """Give the parameters of a tower that is on the CPU in float32. They are shared, not copied."""
    return Parameters({name: [tensor.detach().numpy()] for name, tensor in tower.state_dict().items()})
