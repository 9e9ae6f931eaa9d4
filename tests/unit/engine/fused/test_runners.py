"""The fused runners on a CPU, with their kernels in Triton's interpreter, against the runners of torch.

CUDA graphs, the kernels of float8 and the attention kernels need a GPU and are not run here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paths import ROOT
from random_checkpoints import random_model, save_checkpoint

from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.model_config import ModelConfig
from siglip_serve.engine import engines
from siglip_serve.engine.engines import VisionEngine
from siglip_serve.engine.fused import kernels
from siglip_serve.engine.fused import runners as fused_module
from siglip_serve.engine.fused.float8 import draw_pictures, round_weight
from siglip_serve.engine.fused.folded import FoldedPatchEmbedding, FoldedPooling
from siglip_serve.engine.fused.runners import FusedText, FusedVision
from siglip_serve.engine.passes import OUTPUTS, Arrays
from siglip_serve.engine.plan import Plan
from siglip_serve.engine.torch.runners import TorchText, TorchVision
from siglip_serve.errors import SettingsError
from siglip_serve.towers.siglip import load_text, load_vision

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    # Patches do not divide the image, and no width is a power of two. Tokens and layers are few, as the
    # interpreter takes 20 ms for each row of each kernel.
    vision = {"image_size": 50, "patch_size": 16, "hidden_size": 48, "intermediate_size": 80}
    text = {"projection_size": 48, "max_position_embeddings": 7}
    layers = {"num_hidden_layers": 2}
    path = tmp_path_factory.mktemp("checkpoint")
    return load_config(save_checkpoint(random_model(vision | layers, text | layers), path))


def pixels(rows: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(rows).integers(0, 256, (rows, 50, 50, 3), dtype=np.uint8)


def plain(config: ModelConfig, rows: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Arrays:
    return TorchVision(load_vision(config.path), config.image, CPU, torch.float32)(rows, OUTPUTS)()


def fused(config: ModelConfig, dtype: torch.dtype = torch.float32, float8: bool = False) -> FusedVision:
    return FusedVision(load_vision(config.path), config.image, CPU, dtype, float8, max_rows=2)


@pytest.mark.usefixtures("gelu")
def test_outputs_equal_those_of_the_tower(config: ModelConfig) -> None:
    expected, got = plain(config, pixels(2)), fused(config)(pixels(2), OUTPUTS)()
    assert got.keys() == expected.keys()
    for name, array in got.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-5 * scale)


def test_bfloat16_is_close(config: ModelConfig) -> None:
    a = plain(config, pixels(1))["EMBEDDING"]
    b = fused(config, torch.bfloat16)(pixels(1), ["EMBEDDING"])()["EMBEDDING"]
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert 0.999 < cosine.min() < 1


@pytest.mark.usefixtures("gelu")
def test_text_embeddings_equal_those_of_the_tower(config: ModelConfig) -> None:
    length = config.text.max_position_embeddings
    ids = np.random.default_rng(0).integers(0, config.text.vocab_size, (3, length))
    expected = TorchText(load_text(config.path), CPU, torch.float32)(ids, ["EMBEDDING"])()["EMBEDDING"]
    runner = FusedText(load_text(config.path), CPU, torch.float32, 4)
    got = runner(ids, ["EMBEDDING"])()["EMBEDDING"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_layer_norm_adds_branch_and_offset() -> None:
    torch.manual_seed(0)
    x, branch, scale, offset = torch.randn(3, 72), torch.randn(3, 72), torch.rand(3), torch.randn(72)
    norm = torch.nn.LayerNorm(72, eps=1e-6).requires_grad_(False)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    stream = x + branch * scale[:, None]
    expected = norm(stream + offset)
    got = kernels.layer_norm(x, offset, norm, (branch, scale))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x, stream)  # the stream itself, without the offset


def test_rounding_loses_little_on_typical_inputs() -> None:
    """Products with correlated inputs lose less than half as much as by rounding to the nearest."""
    torch.manual_seed(0)
    inputs = torch.randn(400, 12) @ torch.randn(12, 64) + torch.randn(64)
    weight = torch.randn(32, 64) * 20
    nearest = weight.to(kernels.FLOAT8).float()
    better = round_weight(weight, inputs.T @ inputs).float()

    def loss(rounded: torch.Tensor) -> float:
        return float((inputs @ (rounded - weight).T).square().mean())

    assert loss(better) < 0.5 * loss(nearest)
    assert (better - weight).abs().max() < 64  # still near


def test_calibration_pictures_are_the_same_every_time() -> None:
    first = draw_pictures(6, 40)
    assert first.shape == (6, 40, 40, 3)
    assert np.array_equal(first, draw_pictures(6, 40))
    assert len({picture.tobytes() for picture in first}) == 6


def test_float8_refuses_widths_that_are_not_multiples_of_16(tmp_path: Path) -> None:
    model = random_model({"image_size": 32, "patch_size": 16, "intermediate_size": 90})
    narrow = load_config(save_checkpoint(model, tmp_path))
    with pytest.raises(SettingsError, match="intermediate_size 90 have to be multiples of 16"):
        fused(narrow, float8=True)


@pytest.mark.usefixtures("gelu")
def test_cuts_more_rows_than_are_recorded(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(tower: Any, image: Any, plan: Plan) -> FusedVision:  # noqa: ARG001
        return fused(config)

    monkeypatch.setattr(engines, "_vision_runner", small)
    monkeypatch.setattr(Plan, "resolve", lambda plan: replace(plan, dtype="float32", backend="fused"))
    engine = VisionEngine(load_vision(config.path), config.image, Plan(max_rows=100))
    got = engine(pixels(3)).outputs["EMBEDDING"]
    assert engine.runner.max_rows == 2
    np.testing.assert_allclose(got, plain(config, pixels(3))["EMBEDDING"], rtol=1e-3, atol=1e-4)


def test_float8_is_close(float8_kernels: pytest.MonkeyPatch, config: ModelConfig) -> None:
    # A few pictures: Triton's interpreter would take a minute to cut as many as are drawn for a GPU.
    float8_kernels.setattr(fused_module, "_CALIBRATION_TOKENS", 90)
    got = fused(config, torch.bfloat16, float8=True)(pixels(2), ["EMBEDDING"])()["EMBEDDING"]
    expected = plain(config, pixels(2))["EMBEDDING"]
    cosine = (got * expected).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(expected, axis=1)
    assert 0.99 < cosine.min() < 0.9999999


@torch.inference_mode()
def test_folded_weights_keep_the_embedding_of_the_bundled_checkpoint() -> None:
    """Trained weights, whose biases and norms are not those of a random model."""
    path = ROOT / "checkpoints" / "siglip-tiny"
    config, tower = load_config(path), load_vision(path)
    rows = draw_pictures(1, config.vision.image_size)
    expected = TorchVision(load_vision(path), config.image, CPU, torch.float32)(rows, ["EMBEDDING"])()
    embed = FoldedPatchEmbedding(tower.embeddings, config.image, torch.float32)
    pool = FoldedPooling(tower.head, torch.float32)
    got = pool(tower.post_layernorm(tower.encoder(embed(torch.from_numpy(rows))[None]))).numpy()
    scale = np.abs(expected["EMBEDDING"]).max()
    np.testing.assert_allclose(got, expected["EMBEDDING"], rtol=0, atol=1e-5 * scale)
