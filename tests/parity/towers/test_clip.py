"""CLIP against transformers: towers to 1e-5 of their scale, pixels and token ids exactly."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any, get_args

import images
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from random_checkpoints import random_clip, save_clip
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from siglip_serve.checkpoint.config import ClipTextConfig, ImageConfig, load_config
from siglip_serve.images.preprocess import Mode, Preprocessor
from siglip_serve.images.resize import Resample, fit
from siglip_serve.towers.clip import ClipTextTower, ClipVisionTower
from siglip_serve.towers.load import load_scale, load_text, load_vision

GEOMETRIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "patch16-224": ({"image_size": 224, "patch_size": 16}, {}),
    "patch14-336, 77 tokens": (
        {"image_size": 336, "patch_size": 14},
        {"max_position_embeddings": 77, "eos_token_id": 2},
    ),
    "grid does not divide, gelu": (
        {"image_size": 50, "patch_size": 16, "hidden_act": "gelu"},
        {"hidden_act": "gelu", "hidden_size": 32, "num_hidden_layers": 2},
    ),
    "tanh, other text width": (
        {"image_size": 64, "patch_size": 32, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 96},
        {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "eos_token_id": 7},
    ),
}


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).abs().max() / reference.abs().max())


def draw_ids(config: ClipTextConfig, texts: int = 4) -> torch.Tensor:
    """Ids with one to three end tokens, at places of their own, and larger ids among them."""
    generator = torch.Generator().manual_seed(1)
    shape = (texts, config.max_position_embeddings)
    ids = torch.randint(config.vocab_size, shape, generator=generator)
    for row in range(texts - 1):  # the last one has none unless by chance
        ids[row, 3 + 2 * row :: 5] = config.eos_token_id
    return ids


def assert_equal_towers(model: CLIPModel, path: Path) -> None:
    vision, text = load_vision(path), load_text(path)
    assert isinstance(vision, ClipVisionTower)
    assert isinstance(text, ClipTextTower)
    size = vision.config.image_size
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    ids = draw_ids(text.config)
    with torch.inference_mode():
        reference = model.get_image_features(pixels)
        tokens = vision(pixels)
        assert tokens.shape[1] == vision.context
        assert relative_error(tokens, reference.last_hidden_state) <= 1e-5
        assert relative_error(vision.patches(tokens), reference.last_hidden_state[:, 1:]) <= 1e-5
        assert relative_error(vision.head(tokens), reference.pooler_output) <= 1e-5
        reference = model.get_text_features(ids)
        tokens = text(ids)
        assert relative_error(tokens, reference.last_hidden_state) <= 1e-5
        assert relative_error(text.pool(tokens, ids), reference.pooler_output) <= 1e-5
    assert load_scale(path) == (model.logit_scale.item(), None)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_towers_with_random_weights_equal_transformers(name: str, tmp_path: Path) -> None:
    vision, text = GEOMETRIES[name]
    model = random_clip(vision, text)
    assert_equal_towers(model, save_clip(model, tmp_path))


def test_reads_sharded_weights(tmp_path: Path) -> None:
    model = random_clip({"image_size": 32, "patch_size": 16})
    save_clip(model, tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_equal_towers(model, tmp_path)


def test_padding_does_not_change_the_embedding(tmp_path: Path) -> None:
    """Reference texts come with a mask of their padding; a text's embedding is the same without."""
    model = random_clip({"image_size": 32, "patch_size": 16})
    text = load_text(save_clip(model, tmp_path))
    assert isinstance(text, ClipTextTower)
    ids = torch.full((1, text.context), text.config.eos_token_id)
    ids[0, :5] = torch.tensor([298, 5, 9, 2, 8])
    mask = (torch.arange(text.context) <= 5).long()[None]
    with torch.inference_mode():
        reference = model.get_text_features(ids, attention_mask=mask).pooler_output
        assert relative_error(text.pool(text(ids), ids), reference) <= 1e-5


OLD_FILES: dict[str, dict[str, Any]] = {
    "nothing but the type": {},
    "of one layout": {
        "text_config": {"eos_token_id": 2, "hidden_size": 64},
        "vision_config": {"patch_size": 14},
    },
    "of both, which differ": {
        "projection_dim": 96,
        "text_config": {"eos_token_id": 2, "hidden_size": 64, "vocab_size": 99},
        "text_config_dict": {"hidden_size": 128, "projection_dim": 32},
        "vision_config": {"patch_size": 14, "hidden_act": "gelu"},
        "vision_config_dict": {"patch_size": 16, "hidden_size": 96},
    },
    "of both, one empty": {
        "text_config": {"eos_token_id": 2, "hidden_size": 64},
        "text_config_dict": {},
        "vision_config": None,
        "vision_config_dict": None,
    },
}


@pytest.mark.parametrize("name", OLD_FILES)
def test_configurations_are_read_as_the_reference_does(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **OLD_FILES[name]}))
    ours, reference = load_config(tmp_path), CLIPConfig.from_pretrained(tmp_path)
    assert ours.family == "clip"
    for part, theirs in ((ours.vision, reference.vision_config), (ours.text, reference.text_config)):
        for field in part.__dataclass_fields__:
            wanted = reference.projection_dim if field == "projection_size" else getattr(theirs, field)
            assert getattr(part, field) == wanted, field
    processor = CLIPImageProcessorPil()
    assert ours.image.mean == tuple(processor.image_mean)
    assert ours.image.std == tuple(processor.image_std)
    assert ours.image.resample == "bicubic"
    assert ours.image.rescale == pytest.approx(processor.rescale_factor)
    assert ours.image.shortest_edge == ours.image.size == processor.size["shortest_edge"]


# Side of the square, and what the shortest side is resized to before it is cut out.
SQUARES = [(224, 224), (336, 336), (64, 64), (224, 256), (63, 65)]
ASPECTS = [
    (375, 500),
    (500, 375),
    (224, 225),
    (64, 128),
    (63, 65),
    (65, 500),
    (500, 65),
    (17, 272),
    (1000, 100),
    (1, 1),
    (1, 5),
    (7, 3),
]
EXTREMES = [(20, 330), (330, 20), (40, 1200), (1500, 50), (300, 5000), (1, 40), (40, 1)]
FILES = {**images.image_files(), **images.oriented_files()}
RESAMPLES: tuple[Resample, ...] = get_args(Resample)


def image_config(size: int, shortest: int, resample: Resample = "bicubic") -> ImageConfig:
    return ImageConfig(size, resample, 1 / 255, (0.5,) * 3, (0.5,) * 3, shortest)


def reference_pixels(image: Image.Image, config: ImageConfig) -> NDArray[np.uint8]:
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": config.shortest_edge},
        crop_size={"height": config.size, "width": config.size},
        resample=Image.Resampling[config.resample.upper()],
        do_rescale=False,
        do_normalize=False,
    )
    planes = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
    assert planes.dtype == np.uint8
    return planes.transpose(1, 2, 0)


def pictures(width: int, height: int) -> list[Image.Image]:
    """A photo, and random black and white: that clips in every pass, so that a wrong order of them shows."""
    noise = np.random.default_rng(width).integers(0, 2, (height, width, 3)).astype(np.uint8) * 255
    return [images.photo(width, height, width), Image.fromarray(noise)]


@pytest.mark.parametrize("resample", RESAMPLES)
@pytest.mark.parametrize(("width", "height"), ASPECTS)
def test_pixels_equal_transformers(width: int, height: int, resample: Resample) -> None:
    for image in pictures(width, height):
        for size, shortest in SQUARES:
            config = image_config(size, shortest, resample)
            expected = reference_pixels(image, config)
            np.testing.assert_array_equal(fit(np.array(image), config, "pil"), expected)
            difference = np.abs(fit(np.array(image), config, "fast").astype(int) - expected)
            assert difference.max() <= 2
            assert difference.mean() <= 0.1


@pytest.mark.parametrize(("width", "height"), EXTREMES)
def test_pixels_of_long_pictures_equal_transformers(width: int, height: int) -> None:
    """What is cut off before the resize does not count."""
    for image in pictures(width, height):
        for size, shortest in SQUARES:
            config = image_config(size, shortest)
            expected = reference_pixels(image, config).astype(int)
            for mode in get_args(Mode):
                assert np.abs(fit(np.array(image), config, mode) - expected).max() <= 2


@pytest.mark.parametrize("name", FILES)
def test_pixels_of_files_equal_transformers(name: str) -> None:
    """Upright and without alpha before they are cut."""
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(FILES[name])) as image:
        config = image_config(64, 72)
        expected = reference_pixels(ImageOps.exif_transpose(image), config)
        long = max(image.size) > 16 * min(image.size)
    exact = Preprocessor(config, "pil")(FILES[name])
    assert np.abs(exact.astype(int) - expected).max() <= (1 if long else 0)
    assert np.abs(Preprocessor(config, "fast")(FILES[name]).astype(int) - expected).max() <= 2
