"""A Hugging Face directory or hub id becomes a `ModelConfig` and named tensors.

Nothing here imports torch at module level: the preprocessing and tokenizing models read only the
JSON files. Values that a `config.json` leaves out are the reference's own defaults, kept in
`siglip_defaults.json` (transformers' `SiglipVisionConfig`, `SiglipTextConfig`, `SiglipImageProcessor`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from siglip_serve.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = [
    "ImageConfig",
    "ModelConfig",
    "TextConfig",
    "VisionConfig",
    "fingerprint",
    "load_config",
    "load_tensors",
    "read_json",
    "resolve",
    "tensor_dims",
]

_T = TypeVar("_T")
_VISION_ONLY = "siglip_vision_model"
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt"]
# Of each weight file, for its fingerprint: the header, and blocks spread over the rest.
_SAMPLES, _SAMPLE_BYTES = 64, 16_384
_RESAMPLING: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class VisionConfig:
    """Shape of the vision tower; names as in `config.json`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    hidden_act: str

    @property
    def grid_size(self) -> int:
        """Patches along one side; pixels beyond the last whole patch are not seen."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class TextConfig:
    """Shape of the text tower; names as in `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    projection_size: int
    layer_norm_eps: float
    hidden_act: str


@dataclass(frozen=True)
class ImageConfig:
    """How the checkpoint wants its images: resized to `size` x `size`, then `(x * rescale - mean) / std`."""

    size: int
    resample: Literal["bilinear", "bicubic"]
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class ModelConfig:
    """All that the checkpoint's JSON files say about the model, and where they lie."""

    path: Path
    vision: VisionConfig
    image: ImageConfig
    _text: TextConfig | None

    @property
    def vision_only(self) -> bool:
        """There is no text tower."""
        return self._text is None

    @property
    def text(self) -> TextConfig:
        """Shape of the text tower.

        Raises:
            CheckpointError: there is none.
        """
        if self._text is None:
            raise CheckpointError(
                f"{self.path}: an image tower alone (model_type {_VISION_ONLY!r}), without a text tower; "
                "it serves --models embed_image,fit_teams,classify_teams, or as --teams-checkpoint"
            )
        return self._text


def resolve(checkpoint: str) -> Path:
    """The local directory of `checkpoint`: a directory, or a hub id, `id` or `id@revision`.

    A hub id is downloaded into the Hugging Face cache unless it is there already.

    Raises:
        CheckpointError: neither a directory with a `config.json` nor a hub id that can be fetched.
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
        return Path(snapshot_download(name, revision=revision, allow_patterns=_PATTERNS))
    except (HfHubHTTPError, OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"checkpoint {wanted!r}: no such directory, not in the local cache, "
            f"and the hub did not give it ({first_line})"
        ) from error


def load_config(path: Path) -> ModelConfig:
    """Read and check the JSON files of a checkpoint directory; no weights, no torch.

    Raises:
        CheckpointError: a file is missing or malformed, or describes a model that is not a
            fixed-resolution SigLIP.
    """
    defaults = json.loads(resources.files("siglip_serve").joinpath("siglip_defaults.json").read_text())
    config = read_json(path / "config.json")
    kind = config.get("model_type")
    if kind not in ("siglip", _VISION_ONLY):
        raise CheckpointError(
            f"{path / 'config.json'}: model_type is {kind!r}, expected 'siglip' (fixed-resolution SigLIP "
            f"and SigLIP 2 checkpoints) or {_VISION_ONLY!r} (their image towers alone)"
        )
    vision_only = kind == _VISION_ONLY
    vision = {
        **defaults["vision_config"],
        **(config if vision_only else config.get("vision_config") or {}),
    }
    _check_vision(path, vision)
    text = None
    if not vision_only:
        values = {**defaults["text_config"], **(config.get("text_config") or {})}
        if values.get("projection_size") is None:
            values["projection_size"] = values["hidden_size"]
        _check_text(path, values, vision)
        text = _pick(TextConfig, values, path)
    return ModelConfig(
        path=path,
        vision=_pick(VisionConfig, vision, path),
        image=_image_config(path, vision, defaults["image_processor"]),
        _text=text,
    )


def _check_blocks(path: Path, part: str, values: Mapping[str, Any]) -> None:
    if values["hidden_act"] != "gelu_pytorch_tanh":
        raise CheckpointError(
            f"{path}: {part}.hidden_act is {values['hidden_act']!r}, expected 'gelu_pytorch_tanh'"
        )
    if not values["num_attention_heads"] or values["hidden_size"] % values["num_attention_heads"]:
        raise CheckpointError(
            f"{path}: {part}.hidden_size {values['hidden_size']} does not divide into "
            f"{values['num_attention_heads']} heads"
        )


def _check_vision(path: Path, vision: Mapping[str, Any]) -> None:
    _check_blocks(path, "vision_config", vision)
    if not vision["vision_use_head"]:
        raise CheckpointError(f"{path}: vision_config.vision_use_head is false: there is no pooled embedding")
    if vision["num_channels"] != 3:
        raise CheckpointError(f"{path}: vision_config.num_channels is {vision['num_channels']}, expected 3")


def _check_text(path: Path, text: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    _check_blocks(path, "text_config", text)
    if text["projection_size"] != vision["hidden_size"]:
        raise CheckpointError(
            f"{path}: text_config.projection_size is {text['projection_size']}, the image embeddings "
            f"have {vision['hidden_size']}: they cannot be compared"
        )


def _pick(kind: type[_T], values: Mapping[str, Any], path: Path) -> _T:
    names = kind.__dataclass_fields__  # type: ignore[attr-defined]
    try:
        return kind(**{name: values[name] for name in names})
    except KeyError as error:
        raise CheckpointError(f"{path}: config.json lacks {error.args[0]!r}") from error


def _image_config(path: Path, vision: Mapping[str, Any], defaults: Mapping[str, Any]) -> ImageConfig:
    processor = read_json(path / "preprocessor_config.json", missing_ok=True)
    if not processor:
        processor = read_json(path / "processor_config.json", missing_ok=True).get("image_processor", {})
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if processor.get(step) is False:
            raise CheckpointError(f"{path}: the image processor sets {step} to false, which is not supported")
    side = vision["image_size"]
    size = processor.get("size") or {"height": side, "width": side}
    if size != {"height": side, "width": side}:
        raise CheckpointError(
            f"{path}: the image processor resizes to {size}, the vision tower takes a square of {side}"
        )
    values = {**defaults, **{key: value for key, value in processor.items() if value is not None}}
    if values["resample"] not in _RESAMPLING:
        raise CheckpointError(f"{path}: resample is {values['resample']}, expected one of {_RESAMPLING}")
    return ImageConfig(
        size=side,
        resample=_RESAMPLING[values["resample"]],
        rescale=float(values["rescale_factor"]),
        mean=tuple(values["image_mean"]),
        std=tuple(values["image_std"]),
    )


def tensor_dims(model: ModelConfig) -> dict[str, list[int]]:
    """Dimensions of the Triton tensors that follow from the checkpoint, without the rows."""
    size, width, tokens = model.image.size, model.vision.hidden_size, model.vision.grid_size**2
    dims = {
        "PIXEL_VALUES": [size, size, 3],
        "EMBEDDING": [width],
        "MEAN_EMBEDDING": [width],
        "PATCH_EMBEDDINGS": [tokens, width],
        "PROMPT_VECTORS": [-1, width],
        "PATCH_MAPS": [-1, tokens],
    }
    return dims if model.vision_only else dims | {"INPUT_IDS": [model.text.max_position_embeddings]}


def load_tensors(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix`, by their full names; the weights may be sharded.

    Raises:
        CheckpointError: there is no weight file, or one cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, torch.Tensor] = {}
    for file in _weight_files(path):
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - not a mapping
                    if name.startswith(prefix):
                        tensors[name] = weights.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error
    return tensors


def fingerprint(path: Path) -> str:
    """16 hexadecimal digits that tell a checkpoint's weights from others, from samples of its files.

    Raises:
        CheckpointError: there is no weight file.
    """
    found = hashlib.sha256()
    for file in _weight_files(path):
        size = file.stat().st_size
        found.update(f"{file.name} {size} ".encode())
        with file.open("rb") as weights:
            for part in range(_SAMPLES):
                weights.seek(part * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                found.update(weights.read(_SAMPLE_BYTES))
    return found.hexdigest()[:16]


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        files = [path / name for name in names]
    else:
        files = [path / "model.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise CheckpointError(f"{path}: no {', '.join(missing) or 'weight files'}")
    return files


def read_json(file: Path, missing_ok: bool = False) -> dict[str, Any]:
    """The JSON object in a checkpoint's file; empty where `missing_ok` and there is no file.

    Raises:
        CheckpointError: no such file, or it does not hold a JSON object.
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
