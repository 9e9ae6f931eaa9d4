"""Open a checkpoint's tensors, whatever files they are in.

Safetensors files are read tensor by tensor. Files of `torch.save` are read by torch's loader for tensors
alone, which runs no code that a file may contain.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from siglip_serve.checkpoint.files import weight_files
from siglip_serve.checkpoint.names import plain_names
from siglip_serve.errors import CheckpointError

__all__ = ["StoredTensor", "Tensors"]

# Where training scripts keep the tensors in a file that holds more, such as the optimizer's state.
_CONTAINERS = ("state_dict", "model")
_UNREADABLE = (UnpicklingError, RuntimeError, OSError, EOFError)
_OTHER = re.compile(r"unsupported (?:GLOBAL|class|global) (\S+)", re.IGNORECASE)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file has it.

    Attributes:
        name: in the file.
        file: its name, without the folder.
        shape: its dimensions.
        read: reads its values.
    """

    name: str
    file: str
    shape: list[int]
    read: Callable[[], Tensor]


class Tensors(Mapping[str, StoredTensor]):
    """All tensors of a checkpoint by plain name. A context manager that keeps the files open.

    Args:
        path: the checkpoint's directory.

    Attributes:
        files: names of the weight files.

    Raises:
        CheckpointError: there is no weight file, one cannot be read, or two tensors have one plain name.
    """

    def __init__(self, path: Path) -> None:
        self._open = ExitStack()
        stored: list[StoredTensor] = []
        files = weight_files(path)
        self.files = [file.name for file in files]
        for file in files:
            stored += _safetensors(file, self._open) if file.suffix == ".safetensors" else _saved(file)
        plain = plain_names([tensor.name for tensor in stored])
        self._tensors: dict[str, StoredTensor] = {}
        for tensor in stored:
            name = plain[tensor.name]
            other = self._tensors.setdefault(name, tensor)
            if other is not tensor:
                raise CheckpointError(
                    f"{path / tensor.file}: {tensor.name} and {other.name} of {other.file} are both {name}"
                )

    def __enter__(self) -> Tensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _safetensors(file: Path, files: ExitStack) -> list[StoredTensor]:
    from safetensors import SafetensorError, safe_open

    def reader(weights: Any, name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            tensor: Tensor = weights.get_tensor(name)
            return tensor

        return read

    try:
        weights = files.enter_context(safe_open(file, framework="pt"))
        return [
            StoredTensor(name, file.name, list(weights.get_slice(name).get_shape()), reader(weights, name))
            for name in weights.keys()  # noqa: SIM118 - not a mapping
        ]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error


def _saved(file: Path) -> list[StoredTensor]:
    """Read a file of `torch.save`. Values stay in the file until they are used."""
    content = _load(file)
    for name in _CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{file}: expected a dictionary of tensors, got {type(content).__name__}")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor) or not isinstance(name, str):
            raise CheckpointError(f"{file}: {name} is a {type(tensor).__name__}, expected a tensor by name")
    # A copy, since the file may be replaced while the server runs.
    return [
        StoredTensor(name, file.name, list(tensor.shape), tensor.detach().clone)
        for name, tensor in content.items()
    ]


def _load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except _UNREADABLE as error:
        if "mmap can only be used" not in str(error):
            raise _refused(file, error) from error
    try:  # the format of torch before 1.6 cannot be mapped
        return torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise _refused(file, error) from error


def _refused(file: Path, error: Exception) -> CheckpointError:
    """Say what is wrong without torch's advice to load the file with its code."""
    if found := _OTHER.search(str(error)):
        return CheckpointError(
            f"{file}: holds a {found.group(1)}; only tensors are loaded, since anything else could run code"
        )
    first_line = str(error).partition("\n")[0]
    reason = "" if isinstance(error, UnpicklingError) or not first_line else f" ({first_line})"
    return CheckpointError(f"{file}: not a readable file of torch.save{reason}")
