"""The engine alone: dtypes, outputs on demand, and memory that runs out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from random_checkpoints import random_model, save_checkpoint

from siglip_serve.checkpoint import ModelConfig, load_config
from siglip_serve.engine import OUTPUTS, TextEngine, VisionEngine, choose_dtype
from siglip_serve.errors import DeviceMemoryError, SettingsError
from siglip_serve.siglip import load_text, load_vision


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path = tmp_path_factory.mktemp("checkpoint")
    return load_config(save_checkpoint(random_model({"image_size": 48, "patch_size": 16}), path))


def vision(config: ModelConfig, dtype: torch.dtype = torch.float32, max_rows: int = 0) -> VisionEngine:
    return VisionEngine(load_vision(config.path), config.image, "cpu", dtype, max_rows)


def pixels(rows: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(rows).integers(0, 256, (rows, 48, 48, 3), dtype=np.uint8)


class Scarce:
    """A tower on a device with memory for so many rows: raises what torch raises beyond them."""

    def __init__(self, engine: VisionEngine, rows: int) -> None:
        self.tower, self.rows = engine.tower, rows
        self.head, self.config = engine.tower.head, engine.tower.config
        self.passes: list[int] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.passes.append(len(x))
        if len(x) > self.rows:
            raise torch.OutOfMemoryError("out of memory")
        return self.tower(x)


def test_equals_the_tower(config: ModelConfig) -> None:
    tower = load_vision(config.path)
    x = ((torch.from_numpy(pixels(11)).permute(0, 3, 1, 2) / 255) - 0.5) / 0.5
    with torch.inference_mode():
        tokens = tower(x)
        expected = {
            "EMBEDDING": tower.head(tokens),
            "MEAN_EMBEDDING": tokens.mean(1),
            "PATCH_EMBEDDINGS": tokens,
        }
    got = vision(config)(pixels(11), OUTPUTS).outputs
    assert got.keys() == expected.keys()
    for name, array in got.items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5)


def test_outputs_are_computed_only_when_asked_for(config: ModelConfig) -> None:
    engine = vision(config)

    def forbidden(*_: object) -> None:
        raise AssertionError("the head ran")

    engine.tower.head.register_forward_pre_hook(forbidden)
    assert list(engine(pixels(2), ["MEAN_EMBEDDING"]).outputs) == ["MEAN_EMBEDDING"]
    with pytest.raises(AssertionError, match="the head ran"):
        engine(pixels(2))


def test_bfloat16_is_close(config: ModelConfig) -> None:
    exact = vision(config)(pixels(5)).outputs["EMBEDDING"]
    rough = vision(config, torch.bfloat16)(pixels(5)).outputs["EMBEDDING"]
    cosine = (exact * rough).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rough, axis=1)
    assert 0.999 < cosine.min() < 1


def test_text_equals_the_tower(config: ModelConfig) -> None:
    tower = load_text(config.path)
    ids = np.random.default_rng(0).integers(
        0, config.text.vocab_size, (40, config.text.max_position_embeddings)
    )
    with torch.inference_mode():
        expected = tower.pool(tower(torch.from_numpy(ids)))
    got = TextEngine(load_text(config.path), "cpu", torch.float32)(ids).outputs["EMBEDDING"]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fits", "passes"), [(16, [16, 16, 8]), (9, [16, 8, 8, 8, 8, 8]), (1, [16, 8, 4, 2, *[1] * 40])]
)
def test_a_pass_that_does_not_fit_is_halved(config: ModelConfig, fits: int, passes: list[int]) -> None:
    engine = vision(config, max_rows=16)
    expected = engine(pixels(40)).outputs["EMBEDDING"]
    scarce = Scarce(engine, fits)
    engine.tower = scarce  # type: ignore[assignment]
    batch = engine(pixels(40))
    assert scarce.passes == passes
    assert not batch.failed.any()
    np.testing.assert_allclose(batch.outputs["EMBEDDING"], expected, rtol=1e-3, atol=1e-4)


def test_what_never_fits_is_refused(config: ModelConfig) -> None:
    engine = vision(config)
    engine.tower = Scarce(engine, 0)  # type: ignore[assignment]
    batch = engine(pixels(3))
    assert batch.failed.tolist() == [True, True, True]
    with pytest.raises(DeviceMemoryError, match="not enough free memory"):
        batch.rows(0, 1)


def test_only_the_row_that_failed_is_refused(config: ModelConfig) -> None:
    """Memory returns after the first row: the others are served, at their own places."""
    engine = vision(config, max_rows=1)
    expected = engine(pixels(4)).outputs["EMBEDDING"]
    scarce = Scarce(engine, 0)
    engine.tower = scarce  # type: ignore[assignment]
    run = engine._run

    def recovering(part: np.ndarray, wanted: list[str]) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
        if scarce.passes:
            scarce.rows = 1
        return run(part, wanted)

    engine._run = recovering  # type: ignore[assignment,method-assign]
    batch = engine(pixels(4))
    assert batch.failed.tolist() == [True, False, False, False]
    np.testing.assert_allclose(batch.rows(1, 4)["EMBEDDING"], expected[1:], rtol=1e-4, atol=1e-5)
    with pytest.raises(DeviceMemoryError):
        batch.rows(0, 2)


def test_float16_is_not_for_cpus() -> None:
    with pytest.raises(SettingsError, match="not for CPUs"):
        choose_dtype("float16", "cpu")


def test_a_gpu_that_is_not_there_is_a_setting_error() -> None:
    if torch.cuda.is_available():
        assert choose_dtype("auto", "cuda:0") in {torch.bfloat16, torch.float16}
    else:
        with pytest.raises(SettingsError, match="sees no CUDA GPU"):
            choose_dtype("auto", "cuda:0")
