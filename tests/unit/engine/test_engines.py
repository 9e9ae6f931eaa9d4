"""Engines on a CPU by torch: outputs against the towers, dtypes, outputs on demand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from random_checkpoints import random_model, save_checkpoint

from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.model_config import ModelConfig, VisionConfig
from siglip_serve.config import Dtype
from siglip_serve.engine import engines
from siglip_serve.engine import plan as plan_module
from siglip_serve.engine.engines import TextEngine, VisionEngine
from siglip_serve.engine.passes import OUTPUTS, Finish
from siglip_serve.engine.plan import Plan
from siglip_serve.engine.torch.runners import TorchVision
from siglip_serve.towers.siglip import VisionTower, load_text, load_vision


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path = tmp_path_factory.mktemp("checkpoint")
    return load_config(save_checkpoint(random_model({"image_size": 48, "patch_size": 16}), path))


def vision(config: ModelConfig, dtype: Dtype = "float32", max_rows: int = 0) -> VisionEngine:
    plan = Plan("cpu", dtype, "torch", max_rows)
    return VisionEngine(load_vision(config.path), config.image, plan)


def pixels(rows: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(rows).integers(0, 256, (rows, 48, 48, 3), dtype=np.uint8)


def test_outputs_equal_those_of_the_tower(config: ModelConfig) -> None:
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


def test_computes_outputs_only_when_asked_for(config: ModelConfig) -> None:
    engine = vision(config)

    def forbidden(*_: object) -> None:
        raise AssertionError("the head ran")

    assert isinstance(engine.runner, TorchVision)
    assert isinstance(engine.runner.tower, VisionTower)
    engine.runner.tower.head.register_forward_pre_hook(forbidden)
    assert list(engine(pixels(2), ["MEAN_EMBEDDING"]).outputs) == ["MEAN_EMBEDDING"]
    with pytest.raises(AssertionError, match="the head ran"):
        engine(pixels(2))


def test_bfloat16_is_close(config: ModelConfig) -> None:
    exact = vision(config)(pixels(5)).outputs["EMBEDDING"]
    rough = vision(config, "bfloat16")(pixels(5)).outputs["EMBEDDING"]
    cosine = (exact * rough).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rough, axis=1)
    assert 0.999 < cosine.min() < 1


def test_text_embeddings_equal_those_of_the_tower(config: ModelConfig) -> None:
    tower = load_text(config.path)
    ids = np.random.default_rng(0).integers(
        0, config.text.vocab_size, (40, config.text.max_position_embeddings)
    )
    with torch.inference_mode():
        expected = tower.pool(tower(torch.from_numpy(ids)), torch.from_numpy(ids))
    got = TextEngine(load_text(config.path), Plan("cpu", "float32", "torch"))(ids).outputs["EMBEDDING"]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_a_pass_that_does_not_fit_keeps_the_embeddings(config: ModelConfig) -> None:
    """Halved by a runner with memory for three rows, as torch raises it."""
    engine = vision(config, max_rows=8)
    expected = engine(pixels(9)).outputs["EMBEDDING"]
    plain, passes = engine.runner, []

    class Scarce:
        max_rows = plain.max_rows

        def __call__(self, part: Any, /, wanted: Sequence[str]) -> Finish:
            passes.append(len(part))
            if len(part) > 3:
                raise torch.OutOfMemoryError("out of memory")
            return plain(part, wanted)

    engine.runner = Scarce()
    batch = engine(pixels(9))
    assert passes == [8, 4, 2, 2, 2, 2, 1]
    assert not batch.any_failed
    np.testing.assert_allclose(batch.outputs["EMBEDDING"], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("width", "dtype"), [(128, "bfloat16"), (511, "bfloat16"), (512, "float8")])
def test_says_that_a_narrow_tower_is_not_computed_in_float8(
    width: int, dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan_module, "gpu_capabilities", lambda: ((9, 0),))
    monkeypatch.setattr(engines, "_use_device", lambda plan: plan)
    config = VisionConfig(
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=4,
        patch_size=4,
        layer_norm_eps=1e-6,
        hidden_act="gelu_pytorch_tanh",
    )
    prepared = engines._vision_plan(Plan("cuda:0", "float8", "fused"), VisionTower(config))
    assert prepared.dtype == dtype
    assert ("gains nothing in float8" in capsys.readouterr().out) == (dtype == "bfloat16")
