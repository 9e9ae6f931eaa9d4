"""Load a checkpoint's tensors as a tower's parameters, all of them and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from siglip_serve.checkpoint.files import load_tensors
from siglip_serve.errors import CheckpointError

__all__ = ["load_strictly", "without_values"]

_SHOWN = 20


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


def load_strictly(tower: nn.Module, path: Path, prefixes: Mapping[str, str]) -> None:
    """Load a tower's weights in float32, on the CPU, and set it to evaluation mode, without gradients.

    Args:
        tower: made on the meta device.
        path: the checkpoint's directory.
        prefixes: prefix of names in the checkpoint -> prefix in the tower.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape. The first 20 are listed.
    """
    # Old versions of the reference saved position ids as a buffer. They hold no information.
    tensors = {
        name: tensor.float()
        for name, tensor in load_tensors(path, *prefixes).items()
        if not name.endswith(".position_ids")
    }
    outward = {ours: theirs for theirs, ours in prefixes.items()}
    expected = {_rename(name, outward): shape for name, shape in _reference_shapes(tower).items()}
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in tensors]
    problems += [f"unexpected: {name}" for name in tensors if name not in expected]
    problems += [
        f"mis-shaped: {name} is {list(tensor.shape)}, expected {expected[name]}"
        for name, tensor in tensors.items()
        if name in expected and list(tensor.shape) != expected[name]
    ]
    if problems:
        shown = "\n  ".join(problems[:_SHOWN])
        more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(f"{path}: the weights are not those of its config.json:\n  {shown}{more}")
    tower.load_state_dict({_rename(name, prefixes): tensors[name] for name in tensors}, assign=True)
    tower.eval().requires_grad_(False)


def _rename(name: str, prefixes: Mapping[str, str]) -> str:
    """Replace the longest prefix that `name` begins with."""
    prefix = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len)
    return prefixes[prefix] + name.removeprefix(prefix)


def _reference_shapes(tower: nn.Module) -> dict[str, list[int]]:
    """Map names to shapes as the reference stores them: one tensor each for query, key and value."""
    shapes = {}
    for name, tensor in tower.state_dict().items():
        shape = list(tensor.shape)
        if ".qkv_proj." in name:
            for part in "qkv":
                shapes[name.replace("qkv_proj", f"{part}_proj")] = [shape[0] // 3, *shape[1:]]
        else:
            shapes[name] = shape
    return shapes
