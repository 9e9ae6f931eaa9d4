"""Checkpoints in open_clip's layout against open_clip itself: pixels, ids, embeddings, scale.

The packages open_clip_torch, timm, torchvision and ftfy are not part of the project's environment. Where they
are missing these tests are skipped.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from random_checkpoints import randomise
from safetensors.torch import save_file
from torch import Tensor
from transformers import T5Tokenizer
from varied_texts import character_map, train_sentencepiece, varied_texts, write_gemma

from siglip_serve.checkpoint import open_clip as ours
from siglip_serve.checkpoint.config import load_config, tensor_dims
from siglip_serve.checkpoint.model_config import ModelConfig
from siglip_serve.checkpoint.scale import load_scale
from siglip_serve.errors import CheckpointError
from siglip_serve.images.preprocess import Preprocessor
from siglip_serve.texts.tokenizer import load_tokenizer
from siglip_serve.towers.load import load_text, load_vision

open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
timm = pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("ftfy", reason="ftfy is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

TEXTS = 5_000
MOST_DIFFERENCE, LEAST_COSINE = 1e-5, 0.999999
CLIP_TEXT = {"context_length": 24, "vocab_size": 300, "width": 64, "heads": 4, "layers": 2}
CLIP: dict[str, Any] = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 50, "patch_size": 16, "width": 64, "layers": 2, "head_width": 16},
    "text_cfg": CLIP_TEXT,
}
SIGLIP_TEXT = {**CLIP_TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
SIGLIP_TEXT |= {"norm_kwargs": {"eps": 1e-6}, "mlp_ratio": 3.7362}
SIGLIP_VISION = {"timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


def siglip(name: str, side: int, width: int, text: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a SigLIP with an image tower of timm."""
    vision = {**SIGLIP_VISION, "timm_model_name": name, "image_size": side}
    model = {"embed_dim": width, "init_logit_bias": -10, "custom_text": True}
    return {**model, "vision_cfg": vision, "text_cfg": text}


MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip, quick_gelu": ({**CLIP, "quick_gelu": True}, {}),
    "clip, gelu, text apart": ({**CLIP, "custom_text": True}, {}),
    "clip, end token": ({**CLIP, "text_cfg": {**CLIP_TEXT, "pool_type": "eos", "eos_id": 2}}, {}),
    "siglip, gelu": (siglip("vit_tiny_patch16_siglip_40", 40, 64, SIGLIP_TEXT), HALF),
    "siglip, tanh": (
        siglip("vit_tiny_patch16_siglip_48", 48, 64, {**SIGLIP_TEXT, "act_kwargs": {"approximate": "tanh"}}),
        HALF,
    ),
}
FULL_WIDTH = ["ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16-SigLIP", "ViT-B-16-SigLIP2", "ViT-B-32-SigLIP2-256"]


@pytest.fixture(autouse=True)
def tiny_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let timm and ours know towers of timm's construction that are narrow."""
    from timm.models import register_model
    from timm.models.vision_transformer import VisionTransformer

    def make(name: str, side: int, act: str | None) -> None:
        def build(pretrained: bool = False, **options: Any) -> Any:
            assert not pretrained
            known = {key: options[key] for key in ("num_classes", "global_pool") if key in options}
            return VisionTransformer(
                img_size=side, patch_size=16, embed_dim=64, depth=2, num_heads=4, class_token=False,
                act_layer=act, **{"global_pool": "map", **known},
            )  # fmt: skip

        build.__name__, build.__module__ = name, "timm.models.vision_transformer"
        register_model(build)

    make("vit_tiny_patch16_siglip_40", 40, None)
    make("vit_tiny_patch16_siglip_48", 48, "gelu_tanh")
    timm_values = ours.reference_values()["timm"]
    monkeypatch.setitem(timm_values["widths"], "tiny", TINY)
    monkeypatch.setitem(timm_values, "tanh", [*timm_values["tanh"], "vit_tiny_patch16_siglip_48"])


def save(path: Path, model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any], file: str) -> Any:
    """Write a checkpoint with random weights as open_clip does, and let open_clip load it."""
    content = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (path / "open_clip_config.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{path}", load_weights=False)
    randomise(model)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    if file.endswith(".safetensors"):
        save_file(tensors, path / file)
    else:
        torch.save(tensors, path / file)
    return open_clip.create_model(f"local-dir:{path}").eval()


@torch.inference_mode()
def differences(path: Path, model: Any, text_cfg: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Largest difference of the normalised embeddings and least cosine of each tower."""
    config = load_config(path)
    generator = torch.Generator().manual_seed(1)
    side, context = config.image.size, config.text.max_position_embeddings
    pixels = torch.rand(2, 3, side, side, generator=generator) * 2 - 1
    ids = torch.randint(3, text_cfg["vocab_size"], (3, context), generator=generator)
    ids[0, 5:8] = 2
    vision, text = load_vision(path), load_text(path)
    found = {
        "image": (vision.head(vision(pixels)), model.encode_image(pixels)),
        "text": (text.pool(text(ids), ids), model.encode_text(ids)),
    }
    assert tensor_dims(config)["EMBEDDING"] == [found["image"][0].shape[1]]
    return {name: compared(*pair) for name, pair in found.items()}


def compared(mine: Tensor, theirs: Tensor) -> tuple[float, float]:
    mine, theirs = (torch.nn.functional.normalize(values.double(), dim=-1) for values in (mine, theirs))
    return float((mine - theirs).abs().max()), float((mine * theirs).sum(-1).min())


def assert_close(found: dict[str, tuple[float, float]]) -> None:
    print({name: (f"{most:.1e}", f"{least:.9f}") for name, (most, least) in found.items()})
    for most, least in found.values():
        assert most <= MOST_DIFFERENCE
        assert least >= LEAST_COSINE


@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize("name", MODELS)
def test_narrow_towers(name: str, file: str, tmp_path: Path) -> None:
    model_cfg, preprocess_cfg = MODELS[name]
    model = save(tmp_path, model_cfg, preprocess_cfg, file)
    assert_close(differences(tmp_path, model, model_cfg["text_cfg"]))
    bias = None if model.logit_bias is None else model.logit_bias.item()
    assert load_scale(tmp_path) == (model.logit_scale.item(), bias)


@pytest.mark.parametrize("name", FULL_WIDTH)
def test_full_width_towers(name: str, tmp_path: Path) -> None:
    """Published configurations with random weights and a smaller vocabulary."""
    model_cfg = open_clip.get_model_config(name)
    model_cfg["text_cfg"]["vocab_size"] = 1000
    file = "open_clip_model.safetensors"
    model = save(tmp_path, model_cfg, HALF if "SigLIP" in name else {}, file)
    assert_close(differences(tmp_path, model, model_cfg["text_cfg"]))


def test_names_what_is_wrong_in_the_words_of_the_file(tmp_path: Path) -> None:
    model_cfg, preprocess_cfg = MODELS["siglip, gelu"]
    file = "open_clip_model.safetensors"
    tensors = save(tmp_path, model_cfg, preprocess_cfg, file).state_dict()
    del tensors["visual.trunk.attn_pool.kv.bias"]
    tensors["visual.trunk.pos_embed"] = tensors["visual.trunk.pos_embed"][0]
    tensors["visual.trunk.reg_token"] = torch.zeros(1)
    tensors["text.cls_emb"] = torch.zeros(1)
    save_file({name: value.clone() for name, value in tensors.items()}, tmp_path / file)
    with pytest.raises(CheckpointError) as caught:
        load_vision(tmp_path)
    assert str(caught.value).splitlines() == [
        f"{tmp_path / file}: the weights are not those of its open_clip_config.json:",
        "  missing: visual.trunk.attn_pool.kv.bias [128]",
        "  unexpected: visual.trunk.reg_token",
        "  mis-shaped: visual.trunk.pos_embed is [4, 64], expected [1, 4, 64]",
    ]
    with pytest.raises(CheckpointError, match=r"unexpected: text\.cls_emb$"):
        load_text(tmp_path)


@pytest.mark.parametrize("preprocess_cfg", [{}, HALF, {"interpolation": "bilinear", "mean": [0.1, 0.2, 0.3]}])
def test_pixels(preprocess_cfg: dict[str, Any], tmp_path: Path) -> None:
    """Identical for RGB pictures, wherever the centre falls."""
    model = save(tmp_path, CLIP, preprocess_cfg, "open_clip_model.safetensors")
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg), is_train=False
    )
    config = load_config(tmp_path).image
    mine = Preprocessor(config, "pil")
    for size in [(50, 50), (64, 80), (81, 64), (333, 97), (97, 334), (51, 50), (52, 50), (53, 50), (700, 52)]:
        pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels)
        file = io.BytesIO()
        picture.save(file, "PNG")
        got = torch.from_numpy(mine(file.getvalue())).permute(2, 0, 1).float() * config.rescale
        mean, std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))
        assert float(((got - mean) / std - transform(picture)).abs().max()) <= 1e-6, size


def texts_of_the_web(seed: int, count: int) -> Iterator[str]:
    """Varied texts with what cleaning is for: broken encodings, HTML, quotes, tokens written out."""
    rng = random.Random(seed)
    parts = [
        "&amp;",
        "&amp;lt;b&amp;gt;",
        "&#8217;",
        "cafÃ©",
        "â€œquotedâ€\x9d",
        "“curly” ‘quotes’",
        "ﬁne",
        "<start_of_text>",
    ]
    parts += [
        "<END_OF_TEXT>",
        "!<end_of_text>",
        "it'ſ",
        "IT'S",
        "WE'LL",
        "ｆｕｌｌ",
        "snake_case",
        "\x1b[31mred",
        "don_t",
        "'K",
        "'T",
    ]
    for text in varied_texts(seed, count):
        yield (
            text
            if rng.random() < 0.5
            else rng.choice(parts) + rng.choice(["", " "]) + text + rng.choice(parts)
        )


def config_of(path: Path, family: str, context: int) -> ModelConfig:
    text = SimpleNamespace(max_position_embeddings=context, vocab_size=100_000)
    found = SimpleNamespace(path=path, family=family, text=text, multilingual=False)
    return cast(ModelConfig, found)


def write_config(path: Path, text_cfg: dict[str, Any]) -> None:
    content = {
        "model_cfg": {"embed_dim": 64, "vision_cfg": {}, "text_cfg": {"context_length": 32, **text_cfg}}
    }
    (path / "open_clip_config.json").write_text(json.dumps(content))


def own_vocabulary(path: Path) -> str:
    """The vocabulary that open_clip has, as the repositories of its checkpoints have it."""
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): index for token, index in tokenizer.encoder.items()}
    (path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in tokenizer.bpe_ranks)
    (path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    write_config(path, {})
    return "clip"


def t5_vocabulary(path: Path) -> str:
    """Write what repositories of SigLIP have: a T5 tokenizer that is padded with its end token."""
    import base64

    import sentencepiece

    train_sentencepiece(path, byte_fallback=False)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path / "spiece.model"))
    vocabulary = [(model.id_to_piece(index), model.get_score(index)) for index in range(len(model))]
    characters = character_map(path / "spiece.model")
    (path / "spiece.model").unlink()
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, pad_token="</s>", additional_special_tokens=[])
    tokenizer.save_pretrained(path)
    saved = json.loads((path / "tokenizer.json").read_text())
    encoded = base64.b64encode(characters).decode()
    saved["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": encoded}
    (path / "tokenizer.json").write_text(json.dumps(saved))
    write_config(path, {"hf_tokenizer_name": "a/b", "tokenizer_kwargs": {"clean": "canonicalize"}})
    return "siglip"


def gemma_vocabulary(path: Path) -> str:
    write_gemma(path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "GemmaTokenizer"}))
    write_config(path, {"hf_tokenizer_name": "a/b", "tokenizer_kwargs": {"clean": "canonicalize"}})
    return "siglip"


@pytest.mark.parametrize("write", [own_vocabulary, t5_vocabulary, gemma_vocabulary])
def test_ids(write: Callable[[Path], str], tmp_path: Path) -> None:
    family = write(tmp_path)
    reference = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    mine = load_tokenizer(config_of(tmp_path, family, 32))
    differing = []
    for text in texts_of_the_web(1, TEXTS):
        expected = reference(text)[0].tolist()
        got = mine(text, truncation=True).tolist()
        if got != expected:
            differing.append((text, got, expected))
    assert not differing, f"{len(differing)} of {TEXTS} differ, first: {differing[0]}"
