"""Find and read a checkpoint's files: its directory or hub id, its JSON objects, its tensors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siglip_serve.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["fingerprint", "load_tensors", "read_json", "resolve", "weight_files"]

_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt"]
_NOT_OURS = ["open_clip*"]  # a second copy of the weights in another layout
# A fingerprint covers this many blocks per weight file, evenly spread; the first contains the header.
_SAMPLES, _SAMPLE_BYTES = 64, 16_384


def resolve(checkpoint: str) -> Path:
    """Find the local directory of `checkpoint`, which is a directory, a hub id or `<hub id>@<revision>`.

    Files of a hub id are downloaded into the Hugging Face cache unless it has them.

    Raises:
        CheckpointError: `checkpoint` is neither a directory with a `config.json` nor a hub id that can be
            downloaded.
    """
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"checkpoint {checkpoint!r}: the directory has no config.json")
        return path.resolve()
    name, _, revision = checkpoint.partition("@")
    if checkpoint.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(
            f"checkpoint {checkpoint!r}: no such directory, and not a hub id of the form owner/name@revision"
        )
    return _download(name, revision or None)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = f"{name}@{revision}" if revision else name
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=_PATTERNS, ignore_patterns=_NOT_OURS)
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"checkpoint {wanted!r}: no such directory, not in the local cache, "
            f"and the download from the hub failed ({first_line})"
        ) from error


def read_json(file: Path, missing_ok: bool = False) -> dict[str, Any]:
    """Read the JSON object in a checkpoint's file; with `missing_ok`, a missing file reads as an empty one.

    Raises:
        CheckpointError: the file is missing or does not hold a JSON object.
    """
    if not file.is_file():
        if missing_ok:
            return {}
        raise CheckpointError(f"{file}: no such file")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def load_tensors(path: Path, *prefixes: str) -> dict[str, torch.Tensor]:
    """Load the tensors whose names begin with one of the prefixes, by full name. The weights may be sharded.

    Raises:
        CheckpointError: there is no weight file, or one cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - not a mapping
                    if name.startswith(prefixes):
                        tensors[name] = weights.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error
    return tensors


def fingerprint(path: Path) -> str:
    """Compute 16 hexadecimal digits that identify a checkpoint's weights, from samples of the weight files.

    Raises:
        CheckpointError: there is no weight file.
    """
    found = hashlib.sha256()
    for file in weight_files(path):
        size = file.stat().st_size
        found.update(f"{file.name} {size} ".encode())
        with file.open("rb") as weights:
            for part in range(_SAMPLES):
                weights.seek(part * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                found.update(weights.read(_SAMPLE_BYTES))
    return found.hexdigest()[:16]


def weight_files(path: Path) -> list[Path]:
    """List the safetensors files of a checkpoint.

    Raises:
        CheckpointError: there are none, or one is missing.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        files = [path / name for name in names]
    else:
        files = [path / "model.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise CheckpointError(
            f"{path}: no {', '.join(missing) or 'weight files'}; weights are read from safetensors files only"
        )
    return files
