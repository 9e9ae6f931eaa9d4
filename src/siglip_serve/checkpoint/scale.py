"""Scale and bias that turn cosines into scores.

They are two numbers. They are read from safetensors files without torch, whose import takes a process more
than a second.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.files import weight_files
from siglip_serve.checkpoint.names import plain_names
from siglip_serve.errors import CheckpointError

__all__ = ["load_scale"]

_PREFIX = "logit_"
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def load_scale(path: Path) -> tuple[float, float | None]:
    """Load `(logit_scale, logit_bias)`.

    The probability of a pair is sigmoid(exp(scale) * cosine + bias) for SigLIP. CLIP has no bias, so the
    second is None: its probabilities are the softmax over labels of exp(scale) * cosine.

    Raises:
        CheckpointError: the checkpoint has not exactly one value of each that its family has, or lacks a
            tower.
    """
    config = load_config(path)
    _ = config.text, config.vision
    files = weight_files(path)
    read = _safetensors if files[0].suffix == ".safetensors" else _saved
    tensors = read(path, files)
    names = ["logit_scale"] if config.family == "clip" else ["logit_bias", "logit_scale"]
    if sorted(tensors) != names or any(tensor.size != 1 for tensor in tensors.values()):
        shapes = {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}
        expected = "one logit_scale and " + (
            "no other logit tensor" if config.family == "clip" else "one logit_bias"
        )
        raise CheckpointError(f"{path}: expected {expected}, got {shapes}")
    values = {name: float(tensor.item()) for name, tensor in tensors.items()}
    return values["logit_scale"], values.get("logit_bias")


def _safetensors(_: Path, files: Sequence[Path]) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = {}
    for file in files:
        try:
            tensors |= _read(file)
        except (ValueError, KeyError, OSError, MemoryError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error
    return tensors


def _saved(path: Path, _: Sequence[Path]) -> dict[str, NDArray[Any]]:
    """Read the values by torch, which alone understands its files."""
    from siglip_serve.checkpoint.tensors import Tensors

    return {name: tensor.read() for name, tensor in Tensors(path).items() if name.startswith(_PREFIX)}


def _read(file: Path) -> dict[str, NDArray[Any]]:
    """Read the tensors of a safetensors file whose plain names begin with `logit_`."""
    tensors: dict[str, NDArray[Any]] = {}
    with file.open("rb") as weights:
        length = int.from_bytes(weights.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError("incomplete header")
        header = json.loads(weights.read(length))
        header.pop("__metadata__", None)
        plain = plain_names(header)
        for stored, entry in header.items():
            name = plain[stored]
            if name.startswith(_PREFIX):
                begin, end = entry["data_offsets"]
                weights.seek(8 + length + begin)
                values = np.frombuffer(weights.read(end - begin), _DTYPES[entry["dtype"]])
                if entry["dtype"] == "BF16":  # the upper half of a float32
                    values = (values.astype(np.uint32) << 16).view(np.float32)
                tensors[name] = values.reshape(entry["shape"])
    return tensors
