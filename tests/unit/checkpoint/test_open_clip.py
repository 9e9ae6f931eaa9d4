"""Configurations of open_clip: what they become, what is refused, and tensors in its layout."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.model_config import ClipTextConfig
from siglip_serve.checkpoint.open_clip import open_clip_tokenizer
from siglip_serve.engine.plan import Plan
from siglip_serve.errors import CheckpointError, SettingsError
from siglip_serve.images.resize import cut_offsets
from siglip_serve.texts.tokenizer import find_tokenizer, load_tokenizer
from siglip_serve.towers.clip import ClipTextTower, ClipVisionTower
from siglip_serve.towers.load import load_text, load_vision

CLIP: dict[str, Any] = {
    "embed_dim": 48,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 50, "layers": 2, "width": 64, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 300, "width": 64, "heads": 4, "layers": 2},
}
VISION = {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none"}
TEXT = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
TEXT |= {"context_length": 64, "vocab_size": 32000, "width": 64, "heads": 4, "hf_tokenizer_name": "a/b"}
SIGLIP: dict[str, Any] = {"embed_dim": 768, "init_logit_bias": -10, "vision_cfg": VISION, "text_cfg": TEXT}


def write(
    path: Path, model: dict[str, Any], changes: dict[str, Any] | None = None, **preprocess: Any
) -> Path:
    """Write the configuration; `part__name` in `changes` is the key `name` of the object `part`."""
    model = json.loads(json.dumps(model))
    for key, value in (changes or {}).items():
        part, _, name = key.rpartition("__")
        (model[part] if part else model)[name] = value
    (path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model, "preprocess_cfg": preprocess})
    )
    return path


def test_clip(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, CLIP))
    vision, text, image = config.vision, config.text, config.image
    assert config.family == "clip"
    assert (vision.num_attention_heads, vision.intermediate_size, vision.embedding_size) == (4, 256, 48)
    assert (vision.hidden_act, vision.layer_norm_eps) == ("quick_gelu", 1e-5)
    assert isinstance(text, ClipTextConfig)
    assert text.pools_largest_id
    assert (image.size, image.shortest_edge, image.resample, image.round_crop) == (50, 50, "bicubic", True)
    assert image.mean == (0.48145466, 0.4578275, 0.40821073)
    assert open_clip_tokenizer(tmp_path) == (True, "lower")
    end = load_config(write(tmp_path, CLIP, {"text_cfg__pool_type": "eos", "quick_gelu": False})).text
    assert isinstance(end, ClipTextConfig)
    assert (end.pools_largest_id, end.eos_token_id, end.hidden_act) == (False, 2, "gelu")


@pytest.mark.parametrize(
    ("name", "side", "width", "activation"),
    [
        ("vit_base_patch16_siglip_224", 224, 768, "gelu"),
        ("vit_so400m_patch14_siglip_384", 384, 1152, "gelu"),
        ("vit_so400m_patch16_siglip_256", 256, 1152, "gelu_pytorch_tanh"),
    ],
)
def test_siglip(tmp_path: Path, name: str, side: int, width: int, activation: str) -> None:
    changes = {"vision_cfg__timm_model_name": name, "vision_cfg__image_size": side, "embed_dim": width}
    config = load_config(write(tmp_path, SIGLIP, changes, resize_mode="squash", mean=0.5, std=[0.5] * 3))
    assert (config.family, config.vision.hidden_size, config.vision.hidden_act) == (
        "siglip",
        width,
        activation,
    )
    assert (config.vision.layer_norm_eps, config.text.layer_norm_eps) == (1e-6, 1e-6)
    assert (config.text.hidden_act, config.text.projection_size) == ("gelu", width)
    assert (config.image.size, config.image.shortest_edge, config.image.mean) == (side, None, (0.5,) * 3)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (
            CLIP,
            {"vision_cfg__layers": [3, 4, 6, 3]},
            "vision_cfg.layers is .3, 4, 6, 3.: a ResNet, expected a ViT",
        ),
        (CLIP, {"vision_cfg__pool_type": "avg"}, "vision_cfg.pool_type is 'avg', expected 'tok'"),
        (CLIP, {"vision_cfg__no_ln_pre": True}, "vision_cfg.no_ln_pre is True, expected False"),
        (CLIP, {"vision_cfg__ls_init_value": 1e-5}, "vision_cfg.ls_init_value is 1e-05, expected None"),
        (
            CLIP,
            {"vision_cfg__width": "wide"},
            "vision_cfg.width is 'wide' and mlp_ratio 4.0, expected numbers",
        ),
        (CLIP, {"vision_cfg__head_width": 0}, "does not divide into 0 heads"),
        (
            CLIP,
            {"text_cfg__hf_model_name": "roberta-base"},
            "hf_model_name is 'roberta-base', which is not support",
        ),
        (CLIP, {"text_cfg__no_causal_mask": True}, "text_cfg.no_causal_mask is True, expected False"),
        (CLIP, {"text_cfg__pool_type": "first"}, "text_cfg.pool_type is 'first', expected 'argmax' or 'eos'"),
        (
            CLIP,
            {"text_cfg__act_kwargs": {"approximate": "tanh"}},
            "act_kwargs is .* expected GELU's approximate",
        ),
        (CLIP, {"init_logit_bias": -10}, "model_cfg.init_logit_bias is -10, expected None"),
        (CLIP, {"multimodal_cfg": {"width": 512}}, "multimodal_cfg is .*, which is not supported"),
        (CLIP, {"text_cfg": None}, "text_cfg is None, expected an object"),
        (CLIP, {"embed_dim": None}, "projection_dim is None"),
        (
            SIGLIP,
            {"vision_cfg__timm_model_name": "vit_base_patch16_siglip_gap_224"},
            "expected SigLIP's attention-p",
        ),
        (
            SIGLIP,
            {"vision_cfg__timm_model_name": "eva02_base_patch16"},
            "is 'eva02_base_patch16', expected SigLIP's",
        ),
        (SIGLIP, {"vision_cfg__timm_proj": "linear"}, "vision_cfg.timm_proj is 'linear', expected 'none'"),
        (SIGLIP, {"vision_cfg__image_size": 256}, "vision_cfg.image_size is 256, expected 224"),
        (SIGLIP, {"embed_dim": 512}, "embed_dim is 512, vit_base_patch16_siglip_224 has 768"),
        (SIGLIP, {"text_cfg__pool_type": "argmax"}, "text_cfg.pool_type is 'argmax', expected 'last'"),
        (
            SIGLIP,
            {"text_cfg__norm_kwargs": {"bias": False}},
            "norm_kwargs is .*, expected no other key than eps",
        ),
    ],
    ids=str,
)
def test_refuses_other_towers_by_name(
    tmp_path: Path, model: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"open_clip_config.json: .*{message}"):
        load_config(write(tmp_path, model, changes))


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        ({"resize_mode": "longest"}, "resize_mode is 'longest', expected 'shortest' or 'squash'"),
        ({"interpolation": "random"}, "interpolation is 'random', expected 'bilinear' or 'bicubic'"),
        ({"mean": [0.5]}, "image_mean is .0.5., expected three numbers"),
    ],
    ids=str,
)
def test_refuses_other_preprocessing(tmp_path: Path, preprocess: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"open_clip_config.json: .*{message}"):
        load_config(write(tmp_path, CLIP, **preprocess))


def test_refuses_other_ways_to_use_a_tokenizer(tmp_path: Path) -> None:
    for changes in (
        {"text_cfg__tokenizer_kwargs": {"strip_sep_token": True}},
        {"text_cfg__tokenizer_mode": "clips"},
    ):
        config = load_config(write(tmp_path, SIGLIP, changes, resize_mode="squash"))
        with pytest.raises(
            CheckpointError, match=r"text_cfg has tokenizer_mode .* expected only clean, one of lower"
        ):
            find_tokenizer(config)
    config = load_config(write(tmp_path, SIGLIP, resize_mode="squash"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(
        CheckpointError, match=r"tokenizer_class is 'BertTokenizer', expected one of .*T5Tokenizer"
    ):
        find_tokenizer(config)


def test_says_that_ftfy_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(CheckpointError, match="repairs texts with the package ftfy, which is not installed"):
        load_tokenizer(load_config(write(tmp_path, CLIP)))


def test_the_square_is_at_the_rounded_centre(tmp_path: Path) -> None:
    image = load_config(write(tmp_path, CLIP)).image
    offsets = [cut_offsets(image, (50 + odd, 50)) for odd in (0, 1, 2, 3, 5)]
    assert offsets == [(0, 0), (0, 0), (1, 0), (2, 0), (2, 0)]


def test_gelu_runs_in_the_fused_kernels_but_not_in_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siglip_serve.engine.plan.gpu_capabilities", lambda: ((9, 0),))
    for plan in (Plan("cuda:0"), Plan("cuda:0", backend="fused")):
        assert plan.for_vision("siglip", 1024, "gelu").backend == "fused"
        assert plan.for_text("siglip", "gelu").backend == "fused"
    with pytest.raises(SettingsError, match="for towers with gelu_pytorch_tanh only, this one has gelu; "):
        Plan("cuda:0", dtype="float8").for_vision("siglip", 1024, "gelu")


def theirs(name: str) -> str:
    """open_clip's name of a parameter of CLIP."""
    words = {
        "encoder.layers.": "transformer.resblocks.",
        "layer_norm": "ln_",
        "self_attn.qkv_proj.": "attn.in_proj_",
        "self_attn.": "attn.",
        "fc1": "c_fc",
        "fc2": "c_proj",
        "embeddings.patch_embedding": "conv1",
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.": "",
        "pre_layrnorm": "ln_pre",
        "post_layernorm": "ln_post",
        "final_ln_": "ln_final",
    }
    for ours, word in words.items():
        name = name.replace(ours, word)
    return name


@pytest.mark.parametrize("text_prefix", ["", "text."])
def test_tensors_of_clip_come_to_their_places(tmp_path: Path, text_prefix: str) -> None:
    config = load_config(write(tmp_path, CLIP))
    torch.manual_seed(0)
    assert isinstance(config.text, ClipTextConfig)
    towers = ClipVisionTower(config.vision), ClipTextTower(config.text)  # type: ignore[arg-type]
    tensors = {"logit_scale": torch.zeros(1)}
    for tower, prefix, projection in zip(
        towers, ("visual.", text_prefix), ("proj", "text_projection"), strict=True
    ):
        with torch.no_grad():
            for tensor in tower.parameters():
                tensor.copy_(torch.randn(tensor.shape))
        values = {name: value.clone() for name, value in tower.state_dict().items()}
        tensors[prefix + projection] = values.pop("projection.weight").mT.contiguous()
        tensors |= {prefix + theirs(name): value for name, value in values.items()}
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    for tower, loaded in zip(towers, (load_vision(tmp_path), load_text(tmp_path)), strict=True):
        for name, value in tower.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name]), name
