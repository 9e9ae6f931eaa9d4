"""Translate `open_clip_config.json` into the words of transformers, or refuse it by name.

Served are CLIP with open_clip's own ViT, and SigLIP with an image tower of timm. open_clip builds its towers
from the values that are given and from defaults for all others. A value that would build another tower is
refused.

Some of it looks wrong and is kept, since the result must be that of open_clip: timm computes the GELU of some
SigLIP towers exactly, although they were trained with its tanh form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from siglip_serve.checkpoint.files import read_json
from siglip_serve.errors import CheckpointError

__all__ = ["TIMM_WIDTHS", "open_clip_config", "open_clip_processor", "open_clip_tokenizer"]

_FILE = "open_clip_config.json"
_TIMM_NAME = re.compile(r"vit_([a-z0-9]+)_patch(\d+)_siglip_(\d+)")
# Width, layers, heads and width of the MLP by the size in timm's name.
TIMM_WIDTHS: dict[str, tuple[int, int, int, int]] = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}
# The image towers for which timm computes GELU in its tanh form: those that came with SigLIP 2.
_TANH_TOWERS = re.compile(
    r"vit_(base_patch32_siglip_256|large_patch16_siglip_512|(so400m_patch16|giantopt)_.*)"
)
_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_RESAMPLE = {"bilinear": 2, "bicubic": 3}
_HEAD_WIDTH, _MLP_RATIO, _EPS = 64, 4.0, 1e-5

# Keys that change nothing in the result of a trained model.
_MODEL_IGNORED = {"custom_text", "init_logit_scale", "nonscalar_logit_scale", "output_dict"}
_VISION_IGNORED = {"patch_dropout", "output_tokens", "timm_model_pretrained", "timm_drop", "timm_drop_path"}
_TEXT_IGNORED = {"hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "output_tokens", "pad_id"}
# The only value of other keys for which the towers here are those of open_clip.
_BLOCK_FIXED: dict[str, Any] = {
    "ls_init_value": None,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
_VISION_FIXED = {
    **_BLOCK_FIXED,
    "attentional_pool": False,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "final_ln_after_pool": False,
    "pool_type": "tok",
}
_TEXT_FIXED = {**_BLOCK_FIXED, "embed_cls": False, "final_ln_after_pool": False, "proj_type": "linear"}


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
    given = {key: value for key, value in content.get("preprocess_cfg", {}).items() if value is not None}
    side = _object(file, _object(file, content, "model_cfg"), "vision_cfg").get("image_size", 224)
    mode = given.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise CheckpointError(
            f"{file}: preprocess_cfg.resize_mode is {mode!r}, expected 'shortest' or 'squash'"
        )
    interpolation = given.get("interpolation", "bicubic")
    if interpolation not in _RESAMPLE:
        raise CheckpointError(
            f"{file}: preprocess_cfg.interpolation is {interpolation!r}, "
            f"expected {' or '.join(map(repr, _RESAMPLE))}"
        )
    square = {"height": side, "width": side}
    return {
        "size": square if mode == "squash" else {"shortest_edge": side},
        "crop_size": square,
        "resample": _RESAMPLE[interpolation],
        "rescale_factor": 1 / 255,
        "image_mean": _per_channel(given.get("mean", _CLIP_MEAN)),
        "image_std": _per_channel(given.get("std", _CLIP_STD)),
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
    if options["clean"] not in ("lower", "whitespace", "canonicalize"):
        raise CheckpointError(f"{file}: text_cfg.tokenizer_kwargs.clean is {options['clean']!r}")
    others = {
        key: value for key, value in options.items() if key != "clean" and value not in (None, False, "")
    }
    if others or text.get("tokenizer_mode"):
        raise CheckpointError(
            f"{file}: text_cfg has tokenizer_mode {text.get('tokenizer_mode')!r} and tokenizer_kwargs "
            f"{options}, expected no other option than clean"
        )
    return own, options["clean"]


def _siglip(
    file: Path, model: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any]
) -> dict[str, Any]:
    name, width = str(vision["timm_model_name"]), model.get("embed_dim")
    found = _TIMM_NAME.fullmatch(name)
    if not found or found[1] not in TIMM_WIDTHS:
        raise CheckpointError(
            f"{file}: vision_cfg.timm_model_name is {name!r}, expected SigLIP's attention-pooled ViT, "
            "such as 'vit_base_patch16_siglip_224'"
        )
    size, patch, side = found[1], int(found[2]), int(found[3])
    hidden, layers, heads, inner = TIMM_WIDTHS[size]
    _check(
        file, "model_cfg", model, {"quick_gelu": False}, _MODEL_IGNORED | _MODEL_KEYS | {"init_logit_bias"}
    )
    wanted = {"timm_pool": "map", "timm_proj": "none", "timm_proj_bias": False, "image_size": side}
    _check(
        file,
        "vision_cfg",
        {"timm_proj": "linear", "timm_pool": "avg", "image_size": 224, **vision},
        wanted,
        _VISION_IGNORED | {"timm_model_name"},
    )
    if width != hidden:
        raise CheckpointError(f"{file}: embed_dim is {width!r}, {name} has {hidden}")
    fixed = {**_TEXT_FIXED, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    text = {"pool_type": "argmax", "no_causal_mask": False, "proj_bias": False, **text}
    _check(file, "text_cfg", text, fixed, _TEXT_IGNORED | _TEXT_KEYS)
    return {
        "model_type": "siglip",
        "vision_config": {
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "image_size": side,
            "patch_size": patch,
            "hidden_act": "gelu_pytorch_tanh" if _TANH_TOWERS.fullmatch(name) else "gelu",
            "layer_norm_eps": 1e-6,
        },
        "text_config": {**_text(file, text, False), "projection_size": width},
    }


def _clip(
    file: Path, model: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any]
) -> dict[str, Any]:
    quick = bool(model.get("quick_gelu", False))
    if not isinstance(vision.get("layers", 12), int):
        raise CheckpointError(f"{file}: vision_cfg.layers is {vision['layers']}: a ResNet, expected a ViT")
    fixed = {"init_logit_bias": None, "quick_gelu": quick}
    _check(file, "model_cfg", model, fixed, _MODEL_IGNORED | _MODEL_KEYS)
    _check(file, "vision_cfg", vision, _VISION_FIXED, _VISION_IGNORED | _VISION_KEYS)
    pool = text.get("pool_type", "argmax")
    fixed = {**_TEXT_FIXED, "no_causal_mask": False, "proj_bias": False}
    if pool not in ("argmax", "eos"):
        raise CheckpointError(f"{file}: text_cfg.pool_type is {pool!r}, expected 'argmax' or 'eos'")
    _check(file, "text_cfg", text, fixed, _TEXT_IGNORED | _TEXT_KEYS | {"pool_type"})
    width, head = vision.get("width", 768), vision.get("head_width", _HEAD_WIDTH)
    return {
        "model_type": "clip",
        "projection_dim": model.get("embed_dim"),
        "vision_config": {
            "hidden_size": width,
            "intermediate_size": _inner(file, "vision_cfg", width, vision),
            "num_hidden_layers": vision.get("layers", 12),
            "num_attention_heads": width // head if isinstance(head, int) and head > 0 else head,
            "image_size": vision.get("image_size", 224),
            "patch_size": vision.get("patch_size", 16),
            **_activation(file, "vision_cfg", vision, quick),
        },
        "text_config": {
            **_text(file, text, quick),
            "eos_token_id": text.get("eos_id", 2),
            "pools_largest_id": pool == "argmax",
        },
    }


_MODEL_KEYS = {"embed_dim", "vision_cfg", "text_cfg"}
_VISION_KEYS = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"}
_VISION_KEYS |= {"act_kwargs", "norm_kwargs", "timm_model_name", "timm_pool", "timm_proj", "timm_proj_bias"}
_TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "eos_id"}
_TEXT_KEYS |= {"act_kwargs", "norm_kwargs", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"}


def _text(file: Path, text: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    width = text.get("width", 512)
    return {
        "vocab_size": text.get("vocab_size", 49408),
        "hidden_size": width,
        "intermediate_size": _inner(file, "text_cfg", width, text),
        "num_hidden_layers": text.get("layers", 12),
        "num_attention_heads": text.get("heads", 8),
        "max_position_embeddings": text.get("context_length", 77),
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
        "layer_norm_eps": norm.get("eps", _EPS),
    }


def _inner(file: Path, part: str, width: Any, values: Mapping[str, Any]) -> int:
    ratio = values.get("mlp_ratio", _MLP_RATIO)
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


def _check(
    file: Path, part: str, given: Mapping[str, Any], fixed: Mapping[str, Any], known: set[str]
) -> None:
    """Refuse keys with another value than the fixed one, and keys that nobody knows."""
    for key, value in given.items():
        if key in fixed:
            if value != fixed[key]:
                raise CheckpointError(f"{file}: {part}.{key} is {value!r}, expected {fixed[key]!r}")
        elif key not in known:
            raise CheckpointError(f"{file}: {part}.{key} is {value!r}, which is not supported")
