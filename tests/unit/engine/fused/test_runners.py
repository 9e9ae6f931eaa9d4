"""The fused runner on a CPU, its kernels in Triton's interpreter: the same numbers as the plain runner.

What needs a GPU (graphs, float8's kernels, cuDNN) is not run here.
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

from siglip_serve.checkpoint.config import ModelConfig, load_config
from siglip_serve.engine import engines
from siglip_serve.engine.buckets import BUCKETS
from siglip_serve.engine.engines import VisionEngine
from siglip_serve.engine.fused import kernels
from siglip_serve.engine.fused import runners as fused_module
from siglip_serve.engine.fused.blocks import Levers
from siglip_serve.engine.fused.float8 import draw_pictures, round_weight
from siglip_serve.engine.fused.runners import FusedText, FusedVision
from siglip_serve.engine.passes import OUTPUTS, Arrays, in_passes
from siglip_serve.engine.plan import Plan
from siglip_serve.engine.torch.runners import PlainText, PlainVision
from siglip_serve.errors import SettingsError
from siglip_serve.towers.siglip import load_text, load_vision

CPU = torch.device("cpu")
PLAIN = Levers(kernels=False, gelu=False, attention="torch", fold=False, graphs=False)
TUNED = Levers(attention="torch", graphs=False)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    # Patches do not divide the image, and no width is a power of two.
    vision = {"image_size": 50, "patch_size": 16, "hidden_size": 48, "intermediate_size": 80}
    path = tmp_path_factory.mktemp("checkpoint")
    return load_config(save_checkpoint(random_model(vision, {"projection_size": 48}), path))


def pixels(rows: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(rows).integers(0, 256, (rows, 50, 50, 3), dtype=np.uint8)


def plain(config: ModelConfig, rows: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Arrays:
    return PlainVision(load_vision(config.path), config.image, CPU, torch.float32)(rows, OUTPUTS)()


def fused(config: ModelConfig, levers: Levers, dtype: torch.dtype = torch.float32) -> FusedVision:
    return FusedVision(load_vision(config.path), config.image, CPU, dtype, levers, max_rows=4)


@pytest.mark.parametrize(
    "levers",
    [
        PLAIN,
        Levers(kernels=True, gelu=False, attention="torch", fold=False, graphs=False),
        Levers(kernels=False, gelu=False, attention="torch", fold=True, graphs=False),
        Levers(kernels=True, gelu=False, attention="torch", fold=True, graphs=False),
    ],
    ids=["none", "kernels", "fold", "both"],
)
def test_each_lever_keeps_the_outputs(config: ModelConfig, levers: Levers) -> None:
    expected, got = plain(config, pixels(2)), fused(config, levers)(pixels(2), OUTPUTS)()
    assert got.keys() == expected.keys()
    for name, array in got.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-5 * scale)


def test_bfloat16_is_close(config: ModelConfig) -> None:
    a = plain(config, pixels(2))["EMBEDDING"]
    b = fused(config, TUNED, torch.bfloat16)(pixels(2), ["EMBEDDING"])()["EMBEDDING"]
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert 0.999 < cosine.min() < 1


def test_text_keeps_its_embedding(config: ModelConfig) -> None:
    length = config.text.max_position_embeddings
    ids = np.random.default_rng(0).integers(0, config.text.vocab_size, (3, length))
    expected = PlainText(load_text(config.path), CPU, torch.float32)(ids, ["EMBEDDING"])()["EMBEDDING"]
    levers = Levers(gelu=False, attention="torch", graphs=False)
    runner = FusedText(load_text(config.path), CPU, torch.float32, 4, levers)
    got = runner(ids, ["EMBEDDING"])()["EMBEDDING"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_layer_norm_adds_the_branch_and_the_offset() -> None:
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


def test_rounding_makes_good_on_typical_inputs() -> None:
    """Against rounding to the nearest, products with correlated inputs lose less than half as much."""
    torch.manual_seed(0)
    inputs = torch.randn(400, 12) @ torch.randn(12, 64) + torch.randn(64)
    weight = torch.randn(32, 64) * 20
    nearest = weight.to(kernels.FLOAT8).float()
    better = round_weight(weight, inputs.T @ inputs).float()

    def loss(rounded: torch.Tensor) -> float:
        return float((inputs @ (rounded - weight).T).square().mean())

    assert loss(better) < 0.5 * loss(nearest)
    assert (better - weight).abs().max() < 64  # still near


def test_pictures_are_the_same_every_time() -> None:
    first = draw_pictures(6, 40)
    assert first.shape == (6, 40, 40, 3)
    assert np.array_equal(first, draw_pictures(6, 40))
    assert len({picture.tobytes() for picture in first}) == 6


def test_little_of_a_pass_is_padding() -> None:
    """Of any number of rows a quarter at most, and three of the passes that towers with large images take."""
    recorded = [min(size for size in BUCKETS if size >= rows) for rows in range(1, BUCKETS[-1] + 1)]
    padding = [size - rows for rows, size in enumerate(recorded, 1)]
    assert max(empty / size for empty, size in zip(padding, recorded, strict=True)) <= 1 / 4
    assert max(padding[:48]) == 3


def test_a_pass_starts_before_the_one_before_it_is_waited_for() -> None:
    events: list[str] = []

    def start(part: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> object:
        events.append(f"start {part[0]}")

        def finish() -> Arrays:
            events.append(f"finish {part[0]}")
            return {"EMBEDDING": part.astype(np.float32)[:, None]}

        return finish

    batch = in_passes(np.arange(5), 2, start)  # type: ignore[arg-type]
    assert events == ["start 0", "start 2", "finish 0", "start 4", "finish 2", "finish 4"]
    assert batch.outputs["EMBEDDING"].ravel().tolist() == [0, 1, 2, 3, 4]


def test_float8_refuses_what_its_products_cannot_take(tmp_path: Path) -> None:
    model = random_model({"image_size": 32, "patch_size": 16, "intermediate_size": 90})
    narrow = load_config(save_checkpoint(model, tmp_path))
    with pytest.raises(SettingsError, match="intermediate_size 90 have to be multiples of 16"):
        fused(narrow, Levers(attention="torch", graphs=False, float8=True))


def test_more_rows_than_recorded_are_cut(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(tower: Any, image: Any, plan: Plan) -> FusedVision:  # noqa: ARG001
        return fused(config, PLAIN)

    monkeypatch.setattr(engines, "_vision_runner", small)
    monkeypatch.setattr(Plan, "resolve", lambda plan: replace(plan, dtype="float32", backend="fused"))
    engine = VisionEngine(load_vision(config.path), config.image, Plan(max_rows=100))
    got = engine(pixels(9)).outputs["EMBEDDING"]
    assert engine.runner.max_rows == 4
    np.testing.assert_allclose(got, plain(config, pixels(9))["EMBEDDING"], rtol=1e-3, atol=1e-4)


def test_float8_weights_hold_the_layer_norm(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole stack with torch in place of the float8 kernels, which the interpreter rounds wrongly."""

    def normalize_quantize(
        x: torch.Tensor, offset: torch.Tensor, eps: float, branch: kernels.Branch | None = None
    ) -> torch.Tensor:
        if branch is not None:
            x += (branch[0].float() * branch[1][:, None]).to(x.dtype)
        width = x.shape[1]
        normalized = torch.nn.functional.layer_norm(x.float() + offset, (width,), eps=eps)
        return (normalized * kernels.largest_norm_scale(width)).to(kernels.FLOAT8)

    def gelu_quantize(x: torch.Tensor, scale: torch.Tensor) -> kernels.Branch:
        y = torch.nn.functional.gelu(x.float() * scale, approximate="tanh")
        largest = y.abs().amax(1, keepdim=True) / 448
        return (y / largest).to(kernels.FLOAT8), largest[:, 0]

    monkeypatch.setattr(kernels, "normalize_quantize", normalize_quantize)
    monkeypatch.setattr(kernels, "gelu_quantize", gelu_quantize)
    # A few pictures: Triton's interpreter takes a minute to cut as many as a GPU is given.
    monkeypatch.setattr(fused_module, "_CALIBRATION_TOKENS", 300)
    levers = Levers(attention="torch", graphs=False, float8=True)
    got = fused(config, levers, torch.bfloat16)(pixels(4), ["EMBEDDING"])()["EMBEDDING"]
    expected = plain(config, pixels(4))["EMBEDDING"]
    cosine = (got * expected).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(expected, axis=1)
    assert 0.99 < cosine.min() < 0.9999999


def test_the_bundled_checkpoint_survives() -> None:
    """fold and kernels on trained weights, whose biases and norms are not those of a random model."""
    path = ROOT / "checkpoints" / "siglip-tiny"
    config = load_config(path)
    rows = draw_pictures(1, config.vision.image_size)
    expected = PlainVision(load_vision(path), config.image, CPU, torch.float32)(rows, ["EMBEDDING"])()
    levers = Levers(kernels=False, gelu=False, attention="torch", graphs=False)
    runner = FusedVision(load_vision(path), config.image, CPU, torch.float32, levers, 1)
    got = runner(rows, ["EMBEDDING"])()["EMBEDDING"]
    scale = np.abs(expected["EMBEDDING"]).max()
    np.testing.assert_allclose(got, expected["EMBEDDING"], rtol=0, atol=1e-5 * scale)
