"""Load a checkpoint's tensors as a tower's parameters, all of them and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from siglip_serve.checkpoint.files import main_file
from siglip_serve.checkpoint.tensors import Tensors
from siglip_serve.errors import CheckpointError
from siglip_serve.towers.layouts import Layout, Side, find_layout

__all__ = ["load_strictly", "without_values"]

_SHOWN = 20
# Old versions of the reference saved position ids as a buffer.
_NO_INFORMATION = "position_ids"


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
    with Tensors(path) as tensors:
        layout = find_layout(tensors, side)
        made_of = {
            name: layout.parts(name, list(parameter.shape)) for name, parameter in tower.state_dict().items()
        }
        expected = {part.name: part.shape for parts in made_of.values() for part in parts}
        _check(path, tensors, expected, layout)
        state = {}
        for name, parameter in tower.state_dict().items():
            parts = [tensors[part.name].read().float() for part in made_of[name]]
            parts = [
                values.mT if part.transposed else values
                for values, part in zip(parts, made_of[name], strict=True)
            ]
            joined = parts[0] if len(parts) == 1 else torch.cat(parts)
            state[name] = joined.reshape(parameter.shape).contiguous()
    tower.load_state_dict(state, assign=True)
    tower.eval().requires_grad_(False)


def _check(path: Path, tensors: Tensors, expected: Mapping[str, list[int]], layout: Layout) -> None:
    sharded = len(tensors.files) > 1
    where = {name: f" in {tensor.file}" if sharded else "" for name, tensor in tensors.items()}
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in tensors]
    problems += [
        f"unexpected: {tensor.name}{where[name]}"
        for name, tensor in tensors.items()
        if name not in expected and not layout.foreign(name) and not name.endswith(_NO_INFORMATION)
    ]
    problems += [
        f"mis-shaped: {tensors[name].name}{where[name]} is {tensors[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        shown = "\n  ".join(problems[:_SHOWN])
        more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        files = path / tensors.files[0] if not sharded else path
        raise CheckpointError(
            f"{files}: the weights are not those of its {main_file(path).name}:\n  {shown}{more}"
        )
