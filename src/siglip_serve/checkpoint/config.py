"""Read and check a checkpoint's JSON files into a `ModelConfig`.

There are three families: fixed-resolution SigLIP and SigLIP 2, SigLIP 2 NaFlex, and CLIP with MetaCLIP 2.
Values that a `config.json` leaves out have the defaults of the reference, transformers.
`siglip_defaults.json` holds those of `SiglipVisionConfig`, `SiglipTextConfig` and `SiglipImageProcessor`,
`clip_defaults.json` those of the CLIP classes. The towers of NaFlex have the defaults of SigLIP's. The
configuration of open_clip is translated first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from siglip_serve.checkpoint.files import is_open_clip, main_file, read_json
from siglip_serve.checkpoint.model_config import (
    ClipTextConfig,
    ClipVisionConfig,
    Family,
    ImageConfig,
    ModelConfig,
    NaflexImageConfig,
    NaflexVisionConfig,
    TextConfig,
    VisionConfig,
)
from siglip_serve.checkpoint.naflex import check_most_patches, naflex_patches, square_config
from siglip_serve.checkpoint.open_clip import open_clip_config, open_clip_processor
from siglip_serve.errors import CheckpointError

__all__ = ["limit_patches", "load_config", "tensor_dims"]

_T = TypeVar("_T")
_Vision = TypeVar("_Vision", bound=VisionConfig)
_Part = Literal["vision", "text"]
# Family and towers by `model_type`.
_KINDS: Mapping[str, tuple[Family, tuple[_Part, ...]]] = {
    "siglip": ("siglip", ("vision", "text")),
    "siglip_vision_model": ("siglip", ("vision",)),
    "siglip_text_model": ("siglip", ("text",)),
    "siglip2": ("naflex", ("vision", "text")),
    "siglip2_vision_model": ("naflex", ("vision",)),
    "siglip2_text_model": ("siglip", ("text",)),
    "clip": ("clip", ("vision", "text")),
    "clip_vision_model": ("clip", ("vision",)),
    "clip_text_model": ("clip", ("text",)),
    "metaclip_2": ("clip", ("vision", "text")),
    "metaclip_2_vision_model": ("clip", ("vision",)),
    "metaclip_2_text_model": ("clip", ("text",)),
}
# Early configurations of CLIP give this id for the end token, whatever the id in their vocabulary is.
_NO_END_TOKEN = 2
_RESAMPLING: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
_ACTIVATIONS: Mapping[Family, tuple[str, ...]] = {
    "siglip": ("gelu_pytorch_tanh", "gelu"),
    "clip": ("quick_gelu", "gelu", "gelu_pytorch_tanh"),
}
_TYPES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
_CLIP_PROCESSOR = "CLIP"  # prefix of the names of CLIP's image processors in every version of the reference
_NOTE = "siglip_serve_note"


def load_config(path: Path) -> ModelConfig:
    """Read and check the JSON files of a checkpoint directory, without its weights and without torch.

    Raises:
        CheckpointError: a file is missing or malformed, or describes a model that is neither a SigLIP nor a
            CLIP.
    """
    file = main_file(path)
    config = open_clip_config(path) if is_open_clip(path) else read_json(file)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _KINDS:
        known = "', '".join(_KINDS)
        raise CheckpointError(f"{file}: model_type is {kind!r}, expected one of '{known}'")
    family, parts = _KINDS[kind]
    if len(parts) == 1:  # the configuration of one tower alone is not nested
        config = {**config, f"{parts[0]}_config": config}
    model = _READERS[family](path, file, config, parts)
    note = config.get(_NOTE, "")
    if not isinstance(note, str):
        raise CheckpointError(f"{file}: {_NOTE} is {note!r}, expected {_TYPES[str]}")
    return replace(model, note=note.strip())


def _siglip(path: Path, file: Path, config: Mapping[str, Any], parts: tuple[_Part, ...]) -> ModelConfig:
    defaults = _defaults("siglip")
    vision, image, text = None, None, None
    if "vision" in parts:
        values = {**defaults["vision_config"], **_part(file, config, "vision_config")}
        if not values["vision_use_head"]:
            raise CheckpointError(
                f"{file}: vision_config.vision_use_head is false: there is no pooled embedding"
            )
        vision = _vision(VisionConfig, values, file, "siglip")
        image = _siglip_image(path, vision.image_size, defaults["image_processor"])
    if "text" in parts:
        values = {**defaults["text_config"], **_part(file, config, "text_config")}
        if values.get("projection_size") is None:
            values["projection_size"] = values["hidden_size"]
        text = _pick(TextConfig, values, file, "text_config")
        _check_blocks(file, "text_config", text, "siglip")
    if vision and text and text.projection_size != vision.embedding_size:
        raise CheckpointError(
            f"{file}: text_config.projection_size is {text.projection_size}, the image embeddings "
            f"have {vision.embedding_size}: they cannot be compared"
        )
    return ModelConfig(path, "siglip", vision, image, text)


def _siglip_image(path: Path, side: int, defaults: Mapping[str, Any]) -> ImageConfig:
    file, processor = _image_processor(path)
    size = processor.get("size") or {"height": side, "width": side}
    shortest = None
    if size == {"shortest_edge": side} and "crop_rounding" in processor:
        shortest = side
    elif size != {"height": side, "width": side}:
        raise CheckpointError(
            f"{file}: size: the image processor resizes to {size}, the vision tower takes a square of {side}"
        )
    return _image_config(file, processor, defaults, side, shortest)


def _clip(path: Path, file: Path, config: Mapping[str, Any], parts: tuple[_Part, ...]) -> ModelConfig:
    defaults = _defaults("clip")
    vision, image, text = None, None, None
    projection = config.get("projection_dim", defaults["projection_dim"])
    if type(projection) is not int or projection < 1:
        raise CheckpointError(f"{file}: projection_dim is {projection!r}, expected a whole number above 0")
    projected = len(parts) == 2 or _has_projection(file, config)
    if "vision" in parts:
        values = _clip_part(file, config, "vision_config", projection, projected)
        vision = _vision(ClipVisionConfig, values, file, "clip")
        file_of_images, processor = _image_processor(path)
        for key in ("image_processor_type", "feature_extractor_type"):
            if not str(processor.get(key, _CLIP_PROCESSOR)).startswith(_CLIP_PROCESSOR):
                raise CheckpointError(
                    f"{file_of_images}: {key} is {processor[key]!r}, expected 'CLIPImageProcessor'"
                )
        shortest = _clip_shortest_edge(file_of_images, processor, vision.image_size)
        image = _image_config(
            file_of_images, processor, defaults["image_processor"], vision.image_size, shortest
        )
    multilingual = str(config["model_type"]).startswith("metaclip_2")
    if "text" in parts:
        values = _clip_part(file, config, "text_config", projection, projected)
        # MetaCLIP 2 means its end token, which happens to have this id.
        early = values["eos_token_id"] == _NO_END_TOKEN and not multilingual
        values.setdefault("pools_largest_id", early)
        text = _pick(ClipTextConfig, values, file, "text_config")
        _check_blocks(file, "text_config", text, "clip")
    return ModelConfig(path, "clip", vision, image, text, multilingual)


def _clip_part(
    file: Path, config: Mapping[str, Any], name: str, projection: int, projected: bool
) -> dict[str, Any]:
    # The reference reads old files like this: a `<part>_dict` replaces the part.
    old = config.get(f"{name}_dict")
    values = {**_defaults("clip")[name], **_part(file, config, name if old is None else f"{name}_dict")}
    values["projected"] = projected
    values["projection_size"] = projection if projected else values["hidden_size"]
    return values


def _has_projection(file: Path, config: Mapping[str, Any]) -> bool:
    """Return True if the one tower of a checkpoint ends with the projection to the joint space."""
    classes = config.get("architectures")
    if not isinstance(classes, list) or len(classes) != 1:
        raise CheckpointError(
            f"{file}: architectures is {classes!r}, expected the one class of the model, since it tells "
            "whether the tower has a projection"
        )
    return str(classes[0]).endswith("WithProjection")


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
        if isinstance(value, bool) != (type_ is bool) or not isinstance(
            value, (int, float) if type_ is float else type_
        ):
            raise CheckpointError(f"{file}: {part}.{name} is {value!r}, expected {_TYPES[type_]}")
        if type_ is not str and value < 0:
            raise CheckpointError(f"{file}: {part}.{name} is {value!r}, expected {_TYPES[type_]}")
        picked[name] = value
    return kind(**picked)


def _image_processor(path: Path) -> tuple[Path, dict[str, Any]]:
    """Find the file that describes the image processor, and read it; without a file the result is empty."""
    if is_open_clip(path):
        return main_file(path), open_clip_processor(path)
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
        round_crop=processor.get("crop_rounding") == "nearest",
    )


def tensor_dims(model: ModelConfig) -> dict[str, list[int]]:
    """Compute the dimensions, without the rows, of the Triton tensors that depend on the checkpoint."""
    dims: dict[str, list[int]] = {}
    if not model.vision_only:
        dims |= {
            "EMBEDDING": [model.text.projection_size],
            "INPUT_IDS": [model.text.max_position_embeddings],
        }
    if model.text_only:
        return dims
    image, vision = model.image, model.vision
    tokens, pixels = vision.grid_size**2, [image.size, image.size, 3]
    if isinstance(image, NaflexImageConfig):
        tokens, pixels = image.max_patches, [image.max_patches, 3 * image.patch_size**2]
        dims["PATCH_GRID"] = [2]
    return dims | {
        "PIXEL_VALUES": pixels,
        "EMBEDDING": [vision.embedding_size],
        "MEAN_EMBEDDING": [vision.hidden_size],
        "PATCH_EMBEDDINGS": [tokens, vision.hidden_size],
        "PROMPT_VECTORS": [-1, vision.embedding_size],
        "PATCH_MAPS": [-1, tokens],
    }


def limit_patches(model: ModelConfig, most: int) -> ModelConfig:
    """Set the most patches of an image, where images have their own numbers of patches.

    Args:
        model: of any family. A model that takes one size stays as it is.
        most: 0 is the number in the checkpoint's files.

    Raises:
        SettingsError: it is more than 4,096.
    """
    if not most or model.family != "naflex" or not isinstance(model.image, NaflexImageConfig):
        return model
    check_most_patches(most)
    return replace(model, _image=replace(model.image, max_patches=most))


def _naflex(path: Path, file: Path, config: Mapping[str, Any], parts: tuple[_Part, ...]) -> ModelConfig:
    """Read a NaFlex checkpoint as a SigLIP of the square that its positions were learned on."""
    model = _siglip(path, file, square_config(file, config), parts)
    patch = model.vision.patch_size
    most, resample = naflex_patches(*_image_processor(path), patch)
    image = {**vars(model.image), "resample": _RESAMPLING[resample]}
    return replace(
        model,
        family="naflex",
        _vision=NaflexVisionConfig(**vars(model.vision)),
        _image=NaflexImageConfig(**image, patch_size=patch, max_patches=most),
    )


_Reader = Callable[[Path, Path, Mapping[str, Any], tuple[_Part, ...]], ModelConfig]
_READERS: Mapping[Family, _Reader] = {"siglip": _siglip, "naflex": _naflex, "clip": _clip}
