"""Find a checkpoint's files: its directory or hub id, its JSON objects, its weight files.

Two programs write such directories. transformers writes `config.json` with `model.safetensors` or
`pytorch_model.bin`, possibly in shards. open_clip writes `open_clip_config.json` with
`open_clip_model.safetensors` or `open_clip_pytorch_model.bin`. Where a directory has both, the files of
transformers are read.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from siglip_serve.errors import CheckpointError

__all__ = [
    "fingerprint",
    "is_open_clip",
    "main_file",
    "public_name",
    "read_json",
    "resolve",
    "weight_files",
]

_CONFIG, _OPEN_CLIP = "config.json", "open_clip_config.json"
# Names of the weights, the preferred one first. A name that ends with `.index.json` lists shards.
_WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_SMALL = ["*.json", "*.model", "*.txt"]
_INDEX = ".index.json"
# A fingerprint covers this many blocks per weight file, evenly spread; the first contains the header.
_SAMPLES, _SAMPLE_BYTES = 64, 16_384


def resolve(checkpoint: str) -> Path:
    """Find the local directory of `checkpoint`, which is a directory, a hub id or `<hub id>@<revision>`.

    Files of a hub id are downloaded into the Hugging Face cache unless it has them.

    Raises:
        CheckpointError: `checkpoint` is neither a directory with one of the two configurations nor a hub id
            that can be downloaded.
    """
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        if not main_file(path).is_file():
            raise CheckpointError(
                f"checkpoint {checkpoint!r}: the directory has no {_CONFIG} or {_OPEN_CLIP}"
            )
        return path.resolve()
    name, _, revision = checkpoint.partition("@")
    if checkpoint.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(
            f"checkpoint {checkpoint!r}: no such directory, and not a hub id of the form owner/name@revision"
        )
    return _download(name, revision or None)


def public_name(checkpoint: str, path: Path) -> tuple[str, str]:
    """Name a checkpoint as users see it: its hub id and revision, or the name of its directory and `local`.

    Args:
        checkpoint: as given to `resolve`.
        path: as returned by `resolve`.
    """
    if path.parent.name == "snapshots":
        return checkpoint.partition("@")[0], path.name
    return path.name, "local"


def main_file(path: Path) -> Path:
    """Find the configuration that decides: `config.json` if it tells the model, else open_clip's.

    Raises:
        CheckpointError: there are both, and `config.json` is malformed.
    """
    config, other = path / _CONFIG, path / _OPEN_CLIP
    if not other.is_file():
        return config
    return config if "model_type" in read_json(config, missing_ok=True) else other


def is_open_clip(path: Path) -> bool:
    """Return True for a checkpoint directory that is read in open_clip's layout."""
    return main_file(path).name == _OPEN_CLIP


def _download(name: str, revision: str | None) -> Path:
    """Download the small files, then the preferred kind of weights that the repository has."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = f"{name}@{revision}" if revision else name
    patterns: list[str] = []
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=_SMALL))
        for patterns in _weight_patterns(path):
            path = Path(snapshot_download(name, revision=revision, allow_patterns=[*_SMALL, *patterns]))
            if any(file.is_file() for pattern in patterns for file in path.glob(pattern)):
                break
    except (HfHubHTTPError, OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"checkpoint {wanted!r}: no such directory, not in the local cache, "
            f"and the download from the hub failed ({first_line})"
        ) from error
    return path


def _weight_patterns(path: Path) -> list[list[str]]:
    if is_open_clip(path):
        return [[name] for name in _OPEN_CLIP_WEIGHTS]
    return [["model.safetensors", "model-*.safetensors"], ["pytorch_model.bin", "pytorch_model-*.bin"]]


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
    """List the weight files of a checkpoint: safetensors if it has them, else those that `torch.save` wrote.

    Raises:
        CheckpointError: there are none, or one is missing.
    """
    names = _OPEN_CLIP_WEIGHTS if is_open_clip(path) else _WEIGHTS
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        known = ", ".join(name for name in names if not name.endswith(_INDEX))
        raise CheckpointError(f"{path}: no weight file, expected one of {known}")
    if not found.name.endswith(_INDEX):
        return [found]
    shards = read_json(found).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(v, str) for v in shards.values()):
        raise CheckpointError(f"{found}: expected a weight_map from tensors to files")
    files = [path / name for name in sorted(set(shards.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{found}: no {', '.join(missing)}")
    return files
