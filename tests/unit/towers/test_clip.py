"""CLIP's checkpoints: what is refused, how the engine runs them, and what is cut out of a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from clip_vocabulary import END, write_clip_vocabulary
from random_checkpoints import random_clip, save_clip
from safetensors.torch import load_file, save_file

from siglip_serve.checkpoint.config import ImageConfig, ModelConfig, load_config, tensor_dims
from siglip_serve.config import Backend, Dtype
from siglip_serve.engine.engines import TextEngine, VisionEngine
from siglip_serve.engine.passes import OUTPUTS
from siglip_serve.engine.plan import Plan
from siglip_serve.errors import CheckpointError, SettingsError
from siglip_serve.images.preprocess import Mode
from siglip_serve.images.resize import fit, shown
from siglip_serve.texts.tokenizer import load_tokenizer
from siglip_serve.towers.clip import ClipVisionTower
from siglip_serve.towers.load import load_scale, load_text, load_vision

SIDE, PATCH = 50, 16
ACTIVATIONS = ["quick_gelu", "gelu", "gelu_pytorch_tanh"]


def make(path: Path, activation: str = "quick_gelu") -> Path:
    vision = {"image_size": SIDE, "patch_size": PATCH, "hidden_act": activation}
    return save_clip(random_clip(vision, {"hidden_act": activation}), path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make(tmp_path)


@pytest.fixture(scope="module", params=ACTIVATIONS)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return load_config(make(tmp_path_factory.mktemp("clip"), request.param))


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    for key, value in changes.items():
        part, _, name = key.rpartition("__")
        (content[part] if part else content)[name] = value
    file.write_text(json.dumps(content))


def test_reads_the_widths_of_tower_and_joint_space(checkpoint: Path) -> None:
    dims = tensor_dims(load_config(checkpoint))
    assert dims["EMBEDDING"] == [48]
    assert dims["PROMPT_VECTORS"] == [-1, 48]
    assert dims["MEAN_EMBEDDING"] == [64]
    assert dims["PATCH_EMBEDDINGS"] == [9, 64]
    assert dims["PIXEL_VALUES"] == [SIDE, SIDE, 3]


@pytest.mark.parametrize(
    ("changes", "shortest_edge"),
    [
        ({"size": SIDE, "crop_size": SIDE}, SIDE),
        ({"size": SIDE + 6, "crop_size": {"height": SIDE, "width": SIDE}}, SIDE + 6),
        ({"size": {"shortest_edge": SIDE, "longest_edge": None}, "crop_size": None}, SIDE),
        ({"size": None, "crop_size": None, "feature_extractor_type": "CLIPFeatureExtractor"}, SIDE),
        ({"size": {"height": SIDE, "width": SIDE}}, None),
        ({"size": [SIDE, SIDE], "do_center_crop": False, "crop_size": 9}, None),
    ],
)
def test_reads_how_pictures_are_resized_and_cropped(
    changes: dict[str, Any], shortest_edge: int | None, checkpoint: Path
) -> None:
    edit(checkpoint / "preprocessor_config.json", **changes)
    image = load_config(checkpoint).image
    assert (image.size, image.shortest_edge) == (SIDE, shortest_edge)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": "clip_vision_model"}, "model_type is 'clip_vision_model', expected"),
        ("config.json", {"text_config__hidden_act": "relu"}, "text_config.hidden_act is 'relu', expected"),
        ("config.json", {"vision_config__hidden_act": None}, "vision_config.hidden_act is None"),
        ("config.json", {"vision_config__num_attention_heads": 7}, "does not divide into 7 heads"),
        ("config.json", {"vision_config__num_channels": 1}, "num_channels is 1"),
        ("config.json", {"vision_config__image_size": [50, 50]}, "image_size is .50, 50., expected a whole"),
        ("config.json", {"vision_config__patch_size": 0}, "patch_size is 0, expected 1 to image_size"),
        ("config.json", {"vision_config__hidden_size": -8}, "hidden_size is -8, expected a whole number"),
        (
            "config.json",
            {"text_config__layer_norm_eps": "small"},
            "layer_norm_eps is 'small', expected a num",
        ),
        ("config.json", {"text_config__eos_token_id": [1, 2]}, "eos_token_id is .1, 2., expected a whole"),
        ("config.json", {"projection_dim": None}, "projection_dim is None"),
        ("config.json", {"text_config": 5}, "text_config is 5, expected an object"),
        ("preprocessor_config.json", {"image_processor_type": "ViTImageProcessor"}, "expected 'CLIPImage"),
        ("preprocessor_config.json", {"size": SIDE - 1}, "expected a shortest_edge of at least 50"),
        ("preprocessor_config.json", {"size": {"height": 60, "width": 60}}, "or a square of 50"),
        ("preprocessor_config.json", {"size": {"longest_edge": 60}}, "or a square of 50"),
        ("preprocessor_config.json", {"size": "large"}, "size is large"),
        ("preprocessor_config.json", {"crop_size": 40}, "crop_size is 40, the vision tower takes a square"),
        ("preprocessor_config.json", {"do_center_crop": False}, "do_center_crop is false"),
        ("preprocessor_config.json", {"do_resize": False}, "sets do_resize to false"),
        ("preprocessor_config.json", {"resample": [3]}, "resample is .3., expected one of"),
        ("preprocessor_config.json", {"image_mean": 0.5}, "image_mean is 0.5, expected three numbers"),
        ("preprocessor_config.json", {"image_std": [1, 1, None]}, "image_std is .1, 1, None."),
    ],
)
def test_unusable_configurations_are_named(
    file: str, change: dict[str, Any], message: str, checkpoint: Path
) -> None:
    edit(checkpoint / file, **change)
    with pytest.raises(CheckpointError, match=f"{file}: .*{message}"):
        load_config(checkpoint)


def test_every_wrong_tensor_is_listed(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors["vision_model.embeddings.position_ids"] = torch.arange(10)[None]  # of old versions
    save_file(tensors, file)
    load_vision(checkpoint)
    del tensors["visual_projection.weight"]
    tensors["vision_model.encoder.layers.9.layer_norm1.bias"] = torch.zeros(64)
    tensors["vision_model.embeddings.class_embedding"] = torch.zeros(3)
    tensors["text_projection.bias"] = torch.zeros(48)
    tensors["logit_bias"] = torch.zeros(1)
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        load_vision(checkpoint)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "missing: visual_projection.weight [48, 64]",
        "unexpected: vision_model.encoder.layers.9.layer_norm1.bias",
        "mis-shaped: vision_model.embeddings.class_embedding is [3], expected [64]",
    ]
    with pytest.raises(CheckpointError, match=r"unexpected: text_projection\.bias"):
        load_text(checkpoint)
    with pytest.raises(CheckpointError, match=r"expected one logit_scale .* got .*'logit_bias'"):
        load_scale(checkpoint)


def pixels(rows: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(rows).integers(0, 256, (rows, SIDE, SIDE, 3), dtype=np.uint8)


def test_the_engine_equals_the_towers(config: ModelConfig) -> None:
    tower, plan = load_vision(config.path), Plan("cpu", "float32")
    assert isinstance(tower, ClipVisionTower)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (config.image.mean, config.image.std))
    with torch.inference_mode():
        tokens = tower((torch.from_numpy(pixels(11)).permute(0, 3, 1, 2) / 255 - mean) / std)
        expected = {
            "EMBEDDING": tower.head(tokens),
            "MEAN_EMBEDDING": tokens[:, 1:].mean(1),
            "PATCH_EMBEDDINGS": tokens[:, 1:],
        }
    engine = VisionEngine(load_vision(config.path), config.image, plan)
    assert engine.plan.backend == "torch"
    got = engine(pixels(11), OUTPUTS).outputs
    dims = tensor_dims(config)
    for name, array in got.items():
        assert array.flags.c_contiguous
        assert list(array.shape[1:]) == dims[name]
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5)
    text = load_text(config.path)
    ids = torch.randint(
        config.text.vocab_size, (40, text.context), generator=torch.Generator().manual_seed(0)
    )
    with torch.inference_mode():
        pooled = text.pool(text(ids), ids)
    engine_of_texts = TextEngine(load_text(config.path), plan)
    np.testing.assert_allclose(
        engine_of_texts(ids.numpy()).outputs["EMBEDDING"], pooled, rtol=1e-4, atol=1e-5
    )


def test_bfloat16_is_close(config: ModelConfig) -> None:
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    ids = np.random.default_rng(0).integers(
        0, config.text.vocab_size, (5, tensor_dims(config)["INPUT_IDS"][0])
    )
    images, texts = [], []
    for dtype in dtypes:
        plan = Plan("cpu", dtype)
        images.append(
            VisionEngine(load_vision(config.path), config.image, plan)(pixels(5)).outputs["EMBEDDING"]
        )
        texts.append(TextEngine(load_text(config.path), plan)(ids).outputs["EMBEDDING"])
    for exact, rough in (images, texts):
        cosine = (exact * rough).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rough, axis=1)
        assert 0.999 < cosine.min() < 1


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_maps_of_the_engine_sum_to_the_cosine(config: ModelConfig, dtype: Dtype, tolerance: float) -> None:
    """Though the engine has put other layers in place of those that the tower was made with."""
    engine = VisionEngine(load_vision(config.path), config.image, Plan("cpu", dtype))
    vectors = np.random.default_rng(0).normal(size=(3, 48)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = engine.explain(pixels(1), vectors)
    assert found.maps.shape == (3, 9)
    embedding = engine(pixels(1)).outputs["EMBEDDING"][0]
    np.testing.assert_allclose(found.embedding, embedding, atol=10 * tolerance)
    cosine = vectors @ embedding / np.linalg.norm(embedding)
    np.testing.assert_allclose(found.maps.sum(1) + found.unattributed, cosine, atol=tolerance)
    assert found.maps.std(1).min() > 1e-5


def test_autocast_is_close(config: ModelConfig) -> None:
    vision, text = load_vision(config.path), load_text(config.path)
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(text.context)[None]
    with torch.inference_mode():
        exact = [vision.head(vision(x)), text.pool(text(ids), ids)]
        with torch.autocast("cpu", torch.bfloat16):
            rough = [vision.head(vision(x)), text.pool(text(ids), ids)]
    for ours, theirs in zip(exact, rough, strict=True):
        assert 0.999 < float(torch.cosine_similarity(ours, theirs.float()).min()) < 1


@pytest.mark.parametrize(
    ("dtype", "backend", "message"),
    [
        ("float32", "openvino", "backend openvino: runs SigLIP's towers only; torch runs CLIP's"),
        ("auto", "fused", "backend fused: runs SigLIP's towers only"),
        ("int8", "auto", "dtype int8: for SigLIP's towers only"),
        ("float8", "torch", "dtype float8: for SigLIP's towers only"),
        ("float16", "torch", "dtype float16: not for CPUs"),
    ],
)
def test_refuses_dtypes_and_backends_that_cannot_run_clip(
    dtype: Dtype, backend: Backend, message: str, checkpoint: Path
) -> None:
    config = load_config(checkpoint)
    with pytest.raises(SettingsError, match=message):
        VisionEngine(load_vision(checkpoint), config.image, Plan("cpu", dtype, backend))
    with pytest.raises(SettingsError, match=message):
        TextEngine(load_text(checkpoint), Plan("cpu", dtype, backend))


def cut(size: int, shortest: int | None) -> ImageConfig:
    return ImageConfig(size, "bicubic", 1 / 255, (0.5,) * 3, (0.5,) * 3, shortest)


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (65_535, 2), (1, 1), (40, 3), (3, 40)])
def test_fits_extreme_shapes(mode: Mode, size: tuple[int, int]) -> None:
    """A line of 60,000 pixels would be resized to 32 x 1,920,000: 180 MB."""
    width, height = size
    rng = np.random.default_rng(0)
    picture = np.broadcast_to(np.array([7, 8, 9], np.uint8), (height, width, 3)).copy()
    assert (fit(picture, cut(32, 32), mode) == (7, 8, 9)).all()
    # Only the pixels in the centre count.
    left, top, right, bottom = (int(side) for side in shown(cut(32, 32), height, width))
    around = rng.integers(0, 256, picture.shape, dtype=np.uint8)
    rows, columns = slice(max(0, top - 9), bottom + 10), slice(max(0, left - 9), right + 10)
    around[rows, columns] = picture[rows, columns]
    assert (fit(around, cut(32, 32), mode) == (7, 8, 9)).all()


@pytest.mark.parametrize(
    ("config", "height", "width", "box"),
    [
        (cut(10, None), 30, 50, (0, 0, 50, 30)),
        (cut(10, 10), 20, 40, (10, 0, 30, 20)),
        (cut(10, 10), 40, 20, (0, 10, 20, 30)),
        (cut(10, 10), 20, 20, (0, 0, 20, 20)),
        (cut(10, 20), 40, 60, (20, 10, 40, 30)),
        # 10 x 15.5 becomes 10 x 15; of the 5 beyond the square, 2 are above it.
        (cut(10, 10), 31, 20, (0, 2 * 31 / 15, 20, 12 * 31 / 15)),
    ],
)
def test_view_is_the_centre_square(
    config: ImageConfig, height: int, width: int, box: tuple[float, float, float, float]
) -> None:
    assert shown(config, height, width) == pytest.approx(box)


def tokenizer_files(path: Path) -> Path:
    assert write_clip_vocabulary(path, ["a photo of a cat", "a photo of a dog"] * 20, size=300) <= 300
    return path


def test_texts_stand_between_their_tokens(checkpoint: Path) -> None:
    config = load_config(tokenizer_files(checkpoint))
    tokenizer = load_tokenizer(config)
    end = json.loads((checkpoint / "vocab.json").read_text())[END]
    ids = tokenizer("A  Cat ")
    assert ids.dtype == np.int64
    assert ids.shape == (config.text.max_position_embeddings,)
    assert ids[0] == end - 1
    assert (ids[len(tokenizer.encode("a cat")) - 1 :] == end).all()
    cut_off = tokenizer("cat " * 100, truncation=True)
    assert cut_off[-1] == end
    assert (cut_off == end).sum() == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"vocab.json": None}, "no tokenizer.json, and not both of vocab.json and merges.txt"),
        ({"merges.txt": None}, "no tokenizer.json, and not both of vocab.json and merges.txt"),
        ({"vocab.json": "{"}, "vocab.json and merges.txt: not a byte-pair vocabulary"),
        ({"vocab.json": "[]"}, "vocab.json and merges.txt: not a byte-pair vocabulary"),
        ({"merges.txt": "#version: 0.2\nq x\n"}, "vocab.json and merges.txt: not a byte-pair vocabulary"),
        ({"merges.txt": "#version: 0.2\nqx\n"}, "vocab.json and merges.txt: not a byte-pair vocabulary"),
        ({"tokenizer.json": "{"}, "tokenizer.json: not valid JSON"),
        ({"tokenizer.json": '{"model": 5}'}, "tokenizer.json: not a byte-pair vocabulary"),
        ({"tokenizer.json": '{"model": {"vocab": {"a": 0}, "merges": [5]}}'}, "not a byte-pair vocabulary"),
        ({"tokenizer.json": '{"added_tokens": []}'}, "tokenizer.json: not a byte-pair vocabulary"),
        ({"tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}'}, "expected one of CLIPTokenizer"),
        ({"tokenizer_config.json": '{"padding_side": "left"}'}, "padding_side is 'left', expected 'right'"),
        ({"tokenizer_config.json": '{"truncation_side": "left"}'}, "truncation_side is 'left'"),
        ({"tokenizer_config.json": '{"pad_token": 5}'}, "the special tokens of the tokenizer are malformed"),
        (
            {"tokenizer_config.json": '{"added_tokens_decoder": {"x": "y"}}'},
            "special tokens .* are malformed",
        ),
        ({"tokenizer.json": '{"added_tokens": [{"content": "a"}]}'}, "special tokens .* are malformed"),
        ({"tokenizer_config.json": '{"pad_token": "<pad>"}'}, "the token '<pad>' has id 300"),
    ],
)
def test_unusable_tokenizers_are_named(files: dict[str, str | None], message: str, tmp_path: Path) -> None:
    config = load_config(make(tmp_path))
    size = write_clip_vocabulary(
        tmp_path, ["a photo of a cat, two dogs and a large red house"] * 20, size=300
    )
    edit(tmp_path / "config.json", text_config__vocab_size=size)
    for name, content in files.items():
        if content is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_text(content)
    message = message.replace("300", str(size))
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(load_config(config.path))
