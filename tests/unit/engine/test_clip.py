"""Engines with CLIP's towers: outputs, heatmaps, and plans that are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from clip_checkpoints import SIDE, make_clip

from siglip_serve.checkpoint.config import load_config, tensor_dims
from siglip_serve.checkpoint.model_config import ModelConfig
from siglip_serve.config import Backend, Dtype
from siglip_serve.engine.engines import TextEngine, VisionEngine
from siglip_serve.engine.passes import OUTPUTS
from siglip_serve.engine.plan import Plan
from siglip_serve.errors import SettingsError
from siglip_serve.towers.clip import ClipVisionTower
from siglip_serve.towers.load import load_text, load_vision

ACTIVATIONS = ["quick_gelu", "gelu", "gelu_pytorch_tanh"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_clip(tmp_path)


@pytest.fixture(scope="module", params=ACTIVATIONS)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return load_config(make_clip(tmp_path_factory.mktemp("clip"), request.param))


def pixels(rows: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(rows).integers(0, 256, (rows, SIDE, SIDE, 3), dtype=np.uint8)


def test_outputs_equal_those_of_the_towers(config: ModelConfig) -> None:
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
def test_maps_sum_to_the_cosine(config: ModelConfig, dtype: Dtype, tolerance: float) -> None:
    """The engine has replaced layers of the tower by packed ones."""
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
def test_refuses_plans_that_run_no_clip(
    dtype: Dtype, backend: Backend, message: str, checkpoint: Path
) -> None:
    config = load_config(checkpoint)
    with pytest.raises(SettingsError, match=message):
        VisionEngine(load_vision(checkpoint), config.image, Plan("cpu", dtype, backend))
    with pytest.raises(SettingsError, match=message):
        TextEngine(load_text(checkpoint), Plan("cpu", dtype, backend))
