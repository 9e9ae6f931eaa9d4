"""Read and check a checkpoint's JSON files into a `ModelConfig`.

There are three families: fixed-resolution SigLIP and SigLIP 2, SigLIP 2 NaFlex, and CLIP. Values that a
`config.json` leaves out have the defaults of the reference, transformers. `siglip_defaults.json` holds those
of `SiglipVisionConfig`, `SiglipTextConfig` and `SiglipImageProcessor`, `clip_defaults.json` those of the CLIP
classes. The towers of NaFlex have the defaults of SigLIP's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from siglip_serve.checkpoint.files import read_json
from siglip_serve.checkpoint.naflex import check_most_patches, naflex_patches, square_config
from siglip_serve.errors import CheckpointError

__all__ = [
    "ClipTextConfig",
    "ClipVisionConfig",
    "Family",
    "ImageConfig",
    "ModelConfig",
    "NaflexImageConfig",
    "NaflexVisionConfig",
    "TextConfig",
    "VisionConfig",
    "limit_patches",
    "load_config",
    "tensor_dims",
]

_T = TypeVar("_T")
Family = Literal["siglip", "naflex", "clip"]
_VISION_ONLY = "siglip_vision_model"
_RESAMPLING: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
_ACTIVATIONS: Mapping[Family, tuple[str, ...]] = {
    "siglip": ("gelu_pytorch_tanh",),
    "clip": ("quick_gelu", "gelu", "gelu_pytorch_tanh"),
}
_TYPES = {int: "a whole number", float: "a number", str: "a text"}
_CLIP_PROCESSOR = "CLIP"  # prefix of the names of CLIP's image processors in every version of the reference
_NOTE = "siglip_serve_note"


@dataclass(frozen=True)
class VisionConfig:
    """Shape of the vision tower, with the names of `config.json`."""

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
        """Patches along one side. Pixels beyond the last whole patch are ignored."""
        return self.image_size // self.patch_size

    @property
    def embedding_size(self) -> int:
        """Width of the image embeddings."""
        return self.hidden_size


@dataclass(frozen=True)
class ClipVisionConfig(VisionConfig):
    """Shape of CLIP's vision tower, which projects its embeddings to another width."""

    projection_size: int

    @property
    def embedding_size(self) -> int:
        """Width of the image embeddings."""
        return self.projection_size


@dataclass(frozen=True)
class NaflexVisionConfig(VisionConfig):
    """Shape of a NaFlex vision tower. `image_size` is that of the square on which positions were learned."""


_Vision = TypeVar("_Vision", bound=VisionConfig)


@dataclass(frozen=True)
class TextConfig:
    """Shape of the text tower, with the names of `config.json`."""

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
class ClipTextConfig(TextConfig):
    """Shape of CLIP's text tower, and the token whose output is the embedding."""

    eos_token_id: int


@dataclass(frozen=True)
class ImageConfig:
    """Preprocessing of the checkpoint's images: fit to `size` x `size`, then `(x * rescale - mean) / std`.

    Attributes:
        size: side of the square that the tower takes, in pixels.
        resample: filter of the resize.
        rescale: factor from 8-bit values to the range of `mean` and `std`, usually 1 / 255.
        mean: per channel, red, green, blue.
        std: per channel, red, green, blue.
        shortest_edge: length of the shortest side, in pixels, before the central square is cut out; None: the
            image is stretched to the square.
    """

    size: int
    resample: Literal["bilinear", "bicubic"]
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shortest_edge: int | None = None


@dataclass(frozen=True, kw_only=True)
class NaflexImageConfig(ImageConfig):
    """Preprocessing of NaFlex images: resized to whole patches at their own aspect ratio, then cut.

    Attributes:
        patch_size: side of a patch, in pixels.
        max_patches: most patches of one image.
    """

    patch_size: int
    max_patches: int


@dataclass(frozen=True)
class ModelConfig:
    """Contents of a checkpoint's JSON files.

    Attributes:
        path: directory of the checkpoint.
        family: architecture of the towers.
        vision: shape of the vision tower.
        image: preprocessing of the images.
        note: limits of the checkpoint for its users, a clause that follows its name; empty: none. It is the
            value of `siglip_serve_note` in `config.json`.
    """

    path: Path
    family: Family
    vision: VisionConfig
    image: ImageConfig
    _text: TextConfig | None
    note: str = ""

    @property
    def vision_only(self) -> bool:
        """True for a checkpoint without a text tower."""
        return self._text is None

    @property
    def text(self) -> TextConfig:
        """Shape of the text tower.

        Raises:
            CheckpointError: the checkpoint has no text tower.
        """
        if self._text is None:
            raise CheckpointError(
                f"{self.path}: an image tower alone (model_type {_VISION_ONLY!r}), without a text tower; "
                "it serves --models embed_image,fit_teams,classify_teams, or as --teams-checkpoint"
            )
        return self._text


def load_config(path: Path) -> ModelConfig:
    """Read and check the JSON files of a checkpoint directory, without its weights and without torch.

    Raises:
        CheckpointError: a file is missing or malformed, or describes a model that is neither a SigLIP nor a
            CLIP.
    """
    file = path / "config.json"
    config = read_json(file)
    kind = config.get("model_type")
    if kind == "clip":
        model = _clip(path, config)
    elif kind in ("siglip", _VISION_ONLY):
        model = _siglip(path, config, vision_only=kind == _VISION_ONLY)
    elif kind == "siglip2":
        model = _naflex(path, config)
    else:
        raise CheckpointError(
            f"{file}: model_type is {kind!r}, expected 'siglip' (fixed-resolution SigLIP and SigLIP 2 "
            f"checkpoints), {_VISION_ONLY!r} (their image towers alone), 'siglip2' (NaFlex) or 'clip'"
        )
    note = config.get(_NOTE, "")
    if not isinstance(note, str):
        raise CheckpointError(f"{file}: {_NOTE} is {note!r}, expected {_TYPES[str]}")
    return replace(model, note=note.strip())


def _siglip(path: Path, config: Mapping[str, Any], vision_only: bool) -> ModelConfig:
    file, defaults = path / "config.json", _defaults("siglip")
    values = {
        **defaults["vision_config"],
        **(config if vision_only else _part(file, config, "vision_config")),
    }
    if not values["vision_use_head"]:
        raise CheckpointError(f"{file}: vision_config.vision_use_head is false: there is no pooled embedding")
    vision = _vision(VisionConfig, values, file, "siglip")
    text = None
    if not vision_only:
        values = {**defaults["text_config"], **_part(file, config, "text_config")}
        if values.get("projection_size") is None:
            values["projection_size"] = values["hidden_size"]
        text = _pick(TextConfig, values, file, "text_config")
        _check_blocks(file, "text_config", text, "siglip")
        if text.projection_size != vision.embedding_size:
            raise CheckpointError(
                f"{file}: text_config.projection_size is {text.projection_size}, the image embeddings "
                f"have {vision.embedding_size}: they cannot be compared"
            )
    file, processor = _image_processor(path)
    side = vision.image_size
    size = processor.get("size") or {"height": side, "width": side}
    if size != {"height": side, "width": side}:
        raise CheckpointError(
            f"{file}: size: the image processor resizes to {size}, the vision tower takes a square of {side}"
        )
    image = _image_config(file, processor, defaults["image_processor"], side, None)
    return ModelConfig(path, "siglip", vision, image, text)


def _clip(path: Path, config: Mapping[str, Any]) -> ModelConfig:
    file, defaults = path / "config.json", _defaults("clip")
    projection = config.get("projection_dim", defaults["projection_dim"])
    if type(projection) is not int or projection < 1:
        raise CheckpointError(f"{file}: projection_dim is {projection!r}, expected a whole number above 0")
    values = {}
    for part in ("vision_config", "text_config"):
        # The reference reads old files like this: a `<part>_dict` replaces the part.
        old = config.get(f"{part}_dict")
        given = _part(file, config, part if old is None else f"{part}_dict")
        values[part] = {**defaults[part], **given, "projection_size": projection}
    vision = _vision(ClipVisionConfig, values["vision_config"], file, "clip")
    text = _pick(ClipTextConfig, values["text_config"], file, "text_config")
    _check_blocks(file, "text_config", text, "clip")
    file, processor = _image_processor(path)
    for key in ("image_processor_type", "feature_extractor_type"):
        if not str(processor.get(key, _CLIP_PROCESSOR)).startswith(_CLIP_PROCESSOR):
            raise CheckpointError(f"{file}: {key} is {processor[key]!r}, expected 'CLIPImageProcessor'")
    shortest = _clip_shortest_edge(file, processor, vision.image_size)
    image = _image_config(file, processor, defaults["image_processor"], vision.image_size, shortest)
    return ModelConfig(path, "clip", vision, image, text)


def _clip_shortest_edge(file: Path, processor: Mapping[str, Any], side: int) -> int | None:
    """Find `ImageConfig.shortest_edge`. Old files have plain numbers for `size` and `crop_size`."""
    size, crop = processor.get("size"), processor.get("crop_size")
    size = side if size is None else size
    size = {"shortest_edge": size} if isinstance(size, int) else _square(size)
    crop = {"height": side, "width": side} if crop is None else _square(crop)
    square = {"height": side, "width": side}
    cropped = processor.get("do_center_crop") is not False
    if cropped and crop != square:
        raise CheckpointError(
            f"{file}: crop_size is {processor['crop_size']}, the vision tower takes a square of {side}"
        )
    if size == square:
        return None
    shortest = size.get("shortest_edge") if isinstance(size, dict) and len(size) == 1 else None
    if not isinstance(shortest, int) or shortest < side:
        raise CheckpointError(
            f"{file}: size is {processor['size']}, expected a shortest_edge of at least {side}, "
            f"or a square of {side}"
        )
    if not cropped:
        raise CheckpointError(
            f"{file}: do_center_crop is false, expected true: the vision tower takes a square of {side}"
        )
    return shortest


def _square(size: Any) -> Any:
    """Write a size as the reference's dictionary, without entries that are null."""
    if isinstance(size, int):
        return {"height": size, "width": size}
    if isinstance(size, list) and len(size) == 2:
        return dict(zip(("height", "width"), size, strict=True))
    return (
        {key: value for key, value in size.items() if value is not None} if isinstance(size, dict) else size
    )


def _defaults(family: Family) -> dict[str, Any]:
    text = (
        resources.files("siglip_serve.checkpoint")
        .joinpath(f"{family}_defaults.json")
        .read_text(encoding="utf-8")
    )
    values: dict[str, Any] = json.loads(text)
    return values


def _part(file: Path, config: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = config.get(name) or {}
    if not isinstance(part, dict):
        raise CheckpointError(f"{file}: {name} is {part!r}, expected an object")
    return part


def _vision(kind: type[_Vision], values: Mapping[str, Any], file: Path, family: Family) -> _Vision:
    if values["num_channels"] != 3:
        raise CheckpointError(f"{file}: vision_config.num_channels is {values['num_channels']}, expected 3")
    vision = _pick(kind, values, file, "vision_config")
    _check_blocks(file, "vision_config", vision, family)
    if not 1 <= vision.patch_size <= vision.image_size:
        raise CheckpointError(
            f"{file}: vision_config.patch_size is {vision.patch_size}, expected 1 to image_size, "
            f"{vision.image_size}"
        )
    return vision


def _check_blocks(file: Path, part: str, config: VisionConfig | TextConfig, family: Family) -> None:
    if config.hidden_act not in _ACTIVATIONS[family]:
        raise CheckpointError(
            f"{file}: {part}.hidden_act is {config.hidden_act!r}, "
            f"expected {' or '.join(map(repr, _ACTIVATIONS[family]))}"
        )
    if not config.num_attention_heads or config.hidden_size % config.num_attention_heads:
        raise CheckpointError(
            f"{file}: {part}.hidden_size {config.hidden_size} does not divide into "
            f"{config.num_attention_heads} heads"
        )


def _pick(kind: type[_T], values: Mapping[str, Any], file: Path, part: str) -> _T:
    """Make a configuration of type `kind` from the values of its fields."""
    picked = {}
    for name, type_ in get_type_hints(kind).items():
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, (int, float) if type_ is float else type_):
            raise CheckpointError(f"{file}: {part}.{name} is {value!r}, expected {_TYPES[type_]}")
        if type_ is not str and value < 0:
            raise CheckpointError(f"{file}: {part}.{name} is {value!r}, expected {_TYPES[type_]}")
        picked[name] = value
    return kind(**picked)


def _image_processor(path: Path) -> tuple[Path, dict[str, Any]]:
    """Find the file that describes the image processor, and read it; without a file the result is empty."""
    file = path / "preprocessor_config.json"
    processor = read_json(file, missing_ok=True)
    if not processor:
        file = path / "processor_config.json"
        processor = _part(file, read_json(file, missing_ok=True), "image_processor")
    return file, processor


def _image_config(
    file: Path, processor: Mapping[str, Any], defaults: Mapping[str, Any], side: int, shortest: int | None
) -> ImageConfig:
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if processor.get(step) is False:
            raise CheckpointError(f"{file}: the image processor sets {step} to false, which is not supported")
    values = {**defaults, **{key: value for key, value in processor.items() if value is not None}}
    if values["resample"] not in list(_RESAMPLING):
        raise CheckpointError(f"{file}: resample is {values['resample']}, expected one of {_RESAMPLING}")
    for key in ("image_mean", "image_std"):
        given = values[key]
        if not isinstance(given, list) or [type(v) in (int, float) for v in given] != [True] * 3:
            raise CheckpointError(f"{file}: {key} is {given!r}, expected three numbers")
    if not isinstance(values["rescale_factor"], (int, float)):
        raise CheckpointError(f"{file}: rescale_factor is {values['rescale_factor']!r}, expected a number")
    return ImageConfig(
        size=side,
        resample=_RESAMPLING[values["resample"]],
        rescale=float(values["rescale_factor"]),
        mean=tuple(map(float, values["image_mean"])),
        std=tuple(map(float, values["image_std"])),
        shortest_edge=shortest,
    )


def tensor_dims(model: ModelConfig) -> dict[str, list[int]]:
    """Compute the dimensions, without the rows, of the Triton tensors that depend on the checkpoint."""
    image, vision = model.image, model.vision
    tokens, pixels = vision.grid_size**2, [image.size, image.size, 3]
    if isinstance(image, NaflexImageConfig):
        tokens, pixels = image.max_patches, [image.max_patches, 3 * image.patch_size**2]
    dims = {
        "PIXEL_VALUES": pixels,
        "EMBEDDING": [vision.embedding_size],
        "MEAN_EMBEDDING": [vision.hidden_size],
        "PATCH_EMBEDDINGS": [tokens, vision.hidden_size],
        "PROMPT_VECTORS": [-1, vision.embedding_size],
        "PATCH_MAPS": [-1, tokens],
    }
    if isinstance(image, NaflexImageConfig):
        dims["PATCH_GRID"] = [2]
    return dims if model.vision_only else dims | {"INPUT_IDS": [model.text.max_position_embeddings]}


def limit_patches(model: ModelConfig, most: int) -> ModelConfig:
    """Set the most patches of an image, where images have their own numbers of patches.

    Args:
        model: of any family. A model that takes one size stays as it is.
        most: 0 is the number in the checkpoint's files.

    Raises:
        SettingsError: it is more than 4,096.
    """
    if not most or not isinstance(model.image, NaflexImageConfig):
        return model
    check_most_patches(most)
    return replace(model, image=replace(model.image, max_patches=most))


def _naflex(path: Path, config: Mapping[str, Any]) -> ModelConfig:
    """Read a NaFlex checkpoint as a SigLIP of the square that its positions were learned on."""
    model = _siglip(path, square_config(path / "config.json", config), vision_only=False)
    patch = model.vision.patch_size
    most, resample = naflex_patches(*_image_processor(path), patch)
    image = {**vars(model.image), "resample": _RESAMPLING[resample]}
    return replace(
        model,
        family="naflex",
        vision=NaflexVisionConfig(**vars(model.vision)),
        image=NaflexImageConfig(**image, patch_size=patch, max_patches=most),
    )
