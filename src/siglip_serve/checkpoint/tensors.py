"""Open a checkpoint's tensors, whatever files they are in.

Safetensors files are mapped and read without torch, whose import costs a process 130 MB and more than a
second. Files of `torch.save` are read by torch's loader for tensors alone, which runs no code that a file may
contain.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siglip_serve.checkpoint.files import weight_files
from siglip_serve.checkpoint.names import plain_names
from siglip_serve.errors import CheckpointError

__all__ = ["StoredTensor", "Tensors"]

# Where training scripts keep the tensors in a file that holds more, such as the optimizer's state.
_CONTAINERS = ("state_dict", "model")
_UNREADABLE = (UnpicklingError, RuntimeError, OSError, EOFError)
_OTHER = re.compile(r"unsupported (?:GLOBAL|class|global) (\S+)", re.IGNORECASE)


# The dtypes of safetensors that numpy has. BF16 is the upper half of a float32.
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_HEADER = 8  # bytes of the length of a safetensors file's header, which comes first


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file has it.

    Attributes:
        name: in the file.
        file: its name, without the folder.
        shape: its dimensions.
        read: reads its values as float32. Where the file has float32, they stay in the mapped file.
    """

    name: str
    file: str
    shape: list[int]
    read: Callable[[], NDArray[np.float32]]


class Tensors(Mapping[str, StoredTensor]):
    """All tensors of a checkpoint by plain name.

    Args:
        path: the checkpoint's directory.

    Attributes:
        files: names of the weight files.
        maps: the mapped files, which stay mapped as long as values are used.

    Raises:
        CheckpointError: there is no weight file, one cannot be read, or two tensors have one plain name.
    """

    def __init__(self, path: Path) -> None:
        stored: list[StoredTensor] = []
        files = weight_files(path)
        self.files = [file.name for file in files]
        self.maps: list[mmap.mmap] = []
        for file in files:
            if file.suffix == ".safetensors":
                memory, tensors = _safetensors(file)
                self.maps.append(memory)
                stored += tensors
            else:
                stored += _saved(file)
        plain = plain_names([tensor.name for tensor in stored])
        self._tensors: dict[str, StoredTensor] = {}
        for tensor in stored:
            name = plain[tensor.name]
            other = self._tensors.setdefault(name, tensor)
            if other is not tensor:
                raise CheckpointError(
                    f"{path / tensor.file}: {tensor.name} and {other.name} of {other.file} are both {name}"
                )

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _safetensors(file: Path) -> tuple[mmap.mmap, list[StoredTensor]]:
    """Map a file and list its tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):  # checks the header
            pass
        with file.open("rb") as source:
            # Writable, as torch wants it. What is written stays in this process.
            memory = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_COPY)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error
    begin = _HEADER + int.from_bytes(memory[:_HEADER], "little")
    header = json.loads(memory[_HEADER:begin])
    header.pop("__metadata__", None)
    return memory, [
        StoredTensor(name, file.name, entry["shape"], _reader(file, memory, begin, name, entry))
        for name, entry in header.items()
    ]


def _reader(
    file: Path, memory: mmap.mmap, begin: int, name: str, entry: Mapping[str, Any]
) -> Callable[[], NDArray[np.float32]]:
    """Make the function that reads a tensor. Its offsets in `entry` count from `begin`."""

    def read() -> NDArray[np.float32]:
        dtype = entry["dtype"]
        if dtype not in _DTYPES:
            raise CheckpointError(f"{file}: {name} is {dtype}, expected one of {', '.join(_DTYPES)}")
        count = int(np.prod(entry["shape"]))
        values = np.frombuffer(memory, _DTYPES[dtype], count, begin + entry["data_offsets"][0])
        if dtype == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return np.require(values, np.float32, "A").reshape(entry["shape"])  # a file may align them to bytes

    return read


def _saved(file: Path) -> list[StoredTensor]:
    """Read a file of `torch.save`. Values stay in the file until they are used."""
    from torch import Tensor

    content = _load(file)
    for name in _CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{file}: expected a dictionary of tensors, got {type(content).__name__}")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor) or not isinstance(name, str):
            raise CheckpointError(f"{file}: {name} is a {type(tensor).__name__}, expected a tensor by name")

    def reader(tensor: Tensor) -> Callable[[], NDArray[np.float32]]:
        # A copy, since the file may be replaced while the server runs.
        return lambda: tensor.detach().clone().float().numpy()

    return [
        StoredTensor(name, file.name, list(tensor.shape), reader(tensor)) for name, tensor in content.items()
    ]


def _load(file: Path) -> Any:
    import torch

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
