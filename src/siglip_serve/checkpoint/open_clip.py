"""Translate `open_clip_config.json` into the words of transformers, or refuse it by name.

Served are CLIP with open_clip's own ViT, and SigLIP with an image tower of timm. open_clip builds its towers
from the values that are given and from defaults for all others. `open_clip_defaults.json` holds those. A
value that would build another tower is refused.

Some of it looks wrong and is kept, since the result must be that of open_clip: timm computes the GELU of some
SigLIP towers exactly, although they were trained with its tanh form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from siglip_serve.checkpoint.files import read_json
from siglip_serve.errors import CheckpointError

__all__ = ["open_clip_config", "open_clip_processor", "open_clip_tokenizer", "reference_values"]

_FILE = "open_clip_config.json"
_TIMM_NAME = re.compile(r"vit_([a-z0-9]+)_patch(\d+)_siglip_(\d+)")
_RESAMPLE = {"bilinear": 2, "bicubic": 3}
_CLEANINGS = ("lower", "whitespace", "canonicalize")
# Keys that shape the towers served here, and keys that change nothing in the result of a trained model. All
# others must have their default.
_FREE: Mapping[str, set[str]] = {
    "model_cfg": {"embed_dim", "vision_cfg", "text_cfg", "custom_text", "init_logit_scale"}
    | {"nonscalar_logit_scale", "output_dict"},
    "vision_cfg": {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "act_kwargs"}
    | {"norm_kwargs", "timm_model_name", "timm_model_pretrained", "timm_drop", "timm_drop_path"}
    | {"patch_dropout", "output_tokens"},
    "text_cfg": {
        "context_length",
        "vocab_size",
        "width",
        "heads",
        "layers",
        "mlp_ratio",
        "eos_id",
        "act_kwargs",
    }
    | {"norm_kwargs", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "output_tokens", "pad_id"}
    | {"hf_model_pretrained", "hf_proj_type", "hf_pooler_type"},
}


@cache
def reference_values() -> dict[str, Any]:
    """Read the defaults of open_clip and the shapes of timm's SigLIP towers."""
    file = resources.files("siglip_serve.checkpoint").joinpath("open_clip_defaults.json")
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return values


def open_clip_config(path: Path) -> dict[str, Any]:
    """Read `open_clip_config.json` as the `config.json` that describes the same towers.

    Raises:
        CheckpointError: the file is malformed, or describes towers that are not served. It names the value.
    """
    file = path / _FILE
    model = _object(file, read_json(file), "model_cfg")
    vision, text = _object(file, model, "vision_cfg"), _object(file, model, "text_cfg")
    if vision.get("timm_model_name") is not None:
        return _siglip(file, model, vision, text)
    return _clip(file, model, vision, text)


def open_clip_processor(path: Path) -> dict[str, Any]:
    """Read `preprocess_cfg` as the `preprocessor_config.json` that makes the same pixels.

    The key `crop_rounding` is ours: open_clip puts the square at the rounded centre, transformers at the
    centre rounded down.

    Raises:
        CheckpointError: the file is malformed, or images are fitted in a way that is not served.
    """
    file = path / _FILE
    content = read_json(file)
    vision = _object(file, _object(file, content, "model_cfg"), "vision_cfg")
    side = vision.get("image_size", reference_values()["vision_cfg"]["image_size"])
    given = content.get("preprocess_cfg") or {}
    values = reference_values()["preprocess_cfg"] | {k: v for k, v in given.items() if v is not None}
    if values["resize_mode"] not in ("shortest", "squash"):
        raise CheckpointError(
            f"{file}: preprocess_cfg.resize_mode is {values['resize_mode']!r}, "
            "expected 'shortest' or 'squash'"
        )
    if values["interpolation"] not in _RESAMPLE:
        raise CheckpointError(
            f"{file}: preprocess_cfg.interpolation is {values['interpolation']!r}, "
            f"expected {' or '.join(map(repr, _RESAMPLE))}"
        )
    square = {"height": side, "width": side}
    return {
        "size": square if values["resize_mode"] == "squash" else {"shortest_edge": side},
        "crop_size": square,
        "resample": _RESAMPLE[values["interpolation"]],
        "rescale_factor": 1 / 255,
        "image_mean": _per_channel(values["mean"]),
        "image_std": _per_channel(values["std"]),
        "crop_rounding": "nearest",
    }


def open_clip_tokenizer(path: Path) -> tuple[bool, str]:
    """Tell whether open_clip uses its own tokenizer, not the directory's, and how it cleans texts before.

    Raises:
        CheckpointError: the tokenizer is used in a way that is not served.
    """
    file = path / _FILE
    text = _object(file, _object(file, read_json(file), "model_cfg"), "text_cfg")
    own = not text.get("hf_tokenizer_name")
    options = {"clean": "lower" if own else "whitespace", **(text.get("tokenizer_kwargs") or {})}
    others = {
        key: value for key, value in options.items() if key != "clean" and value not in (None, False, "")
    }
    if others or text.get("tokenizer_mode") or options["clean"] not in _CLEANINGS:
        raise CheckpointError(
            f"{file}: text_cfg has tokenizer_mode {text.get('tokenizer_mode')!r} and tokenizer_kwargs "
            f"{options}, expected only clean, one of {', '.join(_CLEANINGS)}"
        )
    return own, options["clean"]


def _siglip(
    file: Path, model: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any]
) -> dict[str, Any]:
    timm, name, width = reference_values()["timm"], str(vision["timm_model_name"]), model.get("embed_dim")
    found = _TIMM_NAME.fullmatch(name)
    if not found or found[1] not in timm["widths"]:
        raise CheckpointError(
            f"{file}: vision_cfg.timm_model_name is {name!r}, expected SigLIP's attention-pooled ViT, "
            f"vit_<size>_patch<n>_siglip_<n> with a size of {', '.join(timm['widths'])}"
        )
    shape, patch, side = timm["widths"][found[1]], int(found[2]), int(found[3])
    _check(file, "model_cfg", model, {"init_logit_bias": model.get("init_logit_bias")})
    _check(file, "vision_cfg", vision, {"timm_pool": "map", "timm_proj": "none", "image_size": side})
    if width != shape["hidden_size"]:
        raise CheckpointError(f"{file}: embed_dim is {width!r}, {name} has {shape['hidden_size']}")
    _check(file, "text_cfg", text, {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"})
    return {
        "model_type": "siglip",
        "vision_config": {
            **shape,
            "image_size": side,
            "patch_size": patch,
            "hidden_act": "gelu_pytorch_tanh" if name in timm["tanh"] else "gelu",
            "layer_norm_eps": timm["layer_norm_eps"],
        },
        "text_config": {**_text(file, text, False), "projection_size": width},
    }


def _clip(
    file: Path, model: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any]
) -> dict[str, Any]:
    quick = bool(model.get("quick_gelu", False))
    _check(file, "model_cfg", model, {"quick_gelu": quick})
    _check(file, "vision_cfg", vision, {})
    values = reference_values()["vision_cfg"] | vision
    if isinstance(values["layers"], list):
        raise CheckpointError(f"{file}: vision_cfg.layers is {values['layers']}: a ResNet, expected a ViT")
    pool = text.get("pool_type", "argmax")
    if pool not in ("argmax", "eos"):
        raise CheckpointError(f"{file}: text_cfg.pool_type is {pool!r}, expected 'argmax' or 'eos'")
    _check(file, "text_cfg", text, {"pool_type": pool})
    width, head = values["width"], values["head_width"]
    inner = _inner(file, "vision_cfg", values)
    return {
        "model_type": "clip",
        "projection_dim": model.get("embed_dim"),
        "vision_config": {
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": values["layers"],
            "num_attention_heads": width // head if type(head) is int and head > 0 else head,
            "image_size": values["image_size"],
            "patch_size": values["patch_size"],
            **_activation(file, "vision_cfg", vision, quick),
        },
        "text_config": {
            **_text(file, text, quick),
            "eos_token_id": (reference_values()["text_cfg"] | text)["eos_id"],
            "pools_largest_id": pool == "argmax",
        },
    }


def _text(file: Path, text: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    values = reference_values()["text_cfg"] | text
    return {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["width"],
        "intermediate_size": _inner(file, "text_cfg", values),
        "num_hidden_layers": values["layers"],
        "num_attention_heads": values["heads"],
        "max_position_embeddings": values["context_length"],
        **_activation(file, "text_cfg", text, quick),
    }


def _activation(file: Path, part: str, values: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    act, norm = values.get("act_kwargs") or {}, values.get("norm_kwargs") or {}
    form = act.get("approximate", "none")
    if set(act) - {"approximate"} or form not in ("none", "tanh") or (quick and act):
        raise CheckpointError(
            f"{file}: {part}.act_kwargs is {act}, expected GELU's approximate 'none' or 'tanh'"
        )
    if set(norm) - {"eps"}:
        raise CheckpointError(f"{file}: {part}.norm_kwargs is {norm}, expected no other key than eps")
    exact = "quick_gelu" if quick else "gelu"
    return {
        "hidden_act": "gelu_pytorch_tanh" if form == "tanh" else exact,
        "layer_norm_eps": norm.get("eps", reference_values()["layer_norm_eps"]),
    }


def _inner(file: Path, part: str, values: Mapping[str, Any]) -> int:
    width, ratio = values["width"], values["mlp_ratio"]
    if type(width) is not int or type(ratio) not in (int, float):
        raise CheckpointError(f"{file}: {part}.width is {width!r} and mlp_ratio {ratio!r}, expected numbers")
    return int(width * ratio)


def _per_channel(value: Any) -> Any:
    return value if isinstance(value, list) else [value] * 3


def _object(file: Path, content: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = content.get(name)
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: {name} is {value!r}, expected an object")
    return value


def _check(file: Path, part: str, given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse values, also by default, that are not the wanted ones, and keys that nothing here reads."""
    defaults = reference_values()[part] | ({} if part == "model_cfg" else reference_values()["blocks"])
    for key in given:
        if key not in defaults and key not in _FREE[part] and given[key] is not None:
            raise CheckpointError(f"{file}: {part}.{key} is {given[key]!r}, which is not supported")
    for key, default in defaults.items():
        if key in _FREE[part] and key not in wanted:
            continue
        value, expected = given.get(key, default), wanted.get(key, default)
        if value != expected:
            raise CheckpointError(f"{file}: {part}.{key} is {value!r}, expected {expected!r}")
