"""The levers of the waterfall on a CPU: each keeps the embeddings; all together equal the engine's runner."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from random_checkpoints import random_model, save_checkpoint

from benchmarks.levers import LeveredVision, Levers
from benchmarks.vision_waterfall import _OFF, _STEPS
from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.model_config import ModelConfig
from siglip_serve.engine.fused.runners import FusedVision
from siglip_serve.engine.torch.runners import TorchVision
from siglip_serve.towers.siglip import load_vision

CPU = torch.device("cpu")
PIXELS = np.random.default_rng(0).integers(0, 256, (1, 50, 50, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    vision = {"image_size": 50, "patch_size": 16, "hidden_size": 48, "num_hidden_layers": 2}
    path = tmp_path_factory.mktemp("checkpoint")
    return load_config(save_checkpoint(random_model(vision, {"projection_size": 48}), path))


def levered(config: ModelConfig, levers: Levers, dtype: torch.dtype) -> NDArray[np.float32]:
    runner = LeveredVision(load_vision(config.path), config.image, CPU, dtype, levers, 1)
    return runner(PIXELS, ["EMBEDDING"])()["EMBEDDING"]


@pytest.mark.parametrize(
    "levers",
    [
        _OFF,
        replace(_OFF, kernels=True),
        replace(_OFF, fold=True),
        replace(_OFF, attention="cudnn"),
        replace(_OFF, attention="own"),
    ],
    ids=["none", "kernels", "fold", "cudnn", "own"],
)
def test_each_lever_keeps_the_embeddings(config: ModelConfig, levers: Levers) -> None:
    tower = TorchVision(load_vision(config.path), config.image, CPU, torch.float32)
    expected = tower(PIXELS, ["EMBEDDING"])()["EMBEDDING"]
    got = levered(config, levers, torch.float32)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_all_levers_are_the_runner_of_the_engine(config: ModelConfig) -> None:
    runner = FusedVision(load_vision(config.path), config.image, CPU, torch.bfloat16, max_rows=1)
    expected = runner(PIXELS, ["EMBEDDING"])()["EMBEDDING"]
    got = levered(config, Levers(graphs=False), torch.bfloat16)
    np.testing.assert_array_equal(got, expected)


def test_each_step_adds_one_lever() -> None:
    """From none to all; the last step but one, all levers, is the engine's runner in 16 bits."""
    steps = [step for step in _STEPS.values() if isinstance(step, Levers)]
    assert steps[0] == _OFF
    for before, after in zip(steps, [*steps[1:], Levers()], strict=True):
        changed = [name for name in vars(before) if getattr(before, name) != getattr(after, name)]
        assert len(changed) == 1
    assert list(_STEPS.values())[-2:] == ["fused", "float8"]
