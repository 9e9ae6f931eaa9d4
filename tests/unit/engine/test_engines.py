"""The engine alone: dtypes, outputs on demand, and memory that runs out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from random_checkpoints import random_model, save_checkpoint

from siglip_serve.checkpoint.config import ModelConfig, VisionConfig, load_config
from siglip_serve.config import Dtype
from siglip_serve.engine import engines
from siglip_serve.engine import plan as plan_module
from siglip_serve.engine.engines import TextEngine, VisionEngine
from siglip_serve.engine.passes import OUTPUTS, Arrays, Finish
from siglip_serve.engine.plan import Plan
from siglip_serve.engine.torch.runners import PlainVision
from siglip_serve.errors import DeviceMemoryError, SettingsError
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


class Scarce:
    """A runner on a device with memory for so many rows: raises what torch raises beyond them."""

    def __init__(self, engine: VisionEngine, rows: int) -> None:
        self.runner, self.rows, self.max_rows = engine.runner, rows, engine.runner.max_rows
        self.passes: list[int] = []

    def __call__(self, part: Any, /, wanted: Sequence[str]) -> Finish:
        self.passes.append(len(part))
        if len(part) > self.rows:
            raise torch.OutOfMemoryError("out of memory")
        return self.runner(part, wanted)


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

    assert isinstance(engine.runner, PlainVision)
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


def test_text_equals_the_tower(config: ModelConfig) -> None:
    tower = load_text(config.path)
    ids = np.random.default_rng(0).integers(
        0, config.text.vocab_size, (40, config.text.max_position_embeddings)
    )
    with torch.inference_mode():
        expected = tower.pool(tower(torch.from_numpy(ids)), torch.from_numpy(ids))
    got = TextEngine(load_text(config.path), Plan("cpu", "float32", "torch"))(ids).outputs["EMBEDDING"]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fits", "passes"), [(16, [16, 16, 8]), (9, [16, 8, 8, 8, 8, 8]), (1, [16, 8, 4, 2, *[1] * 40])]
)
def test_a_pass_that_does_not_fit_is_halved(config: ModelConfig, fits: int, passes: list[int]) -> None:
    engine = vision(config, max_rows=16)
    expected = engine(pixels(40)).outputs["EMBEDDING"]
    scarce = Scarce(engine, fits)
    engine.runner = scarce
    batch = engine(pixels(40))
    assert scarce.passes == passes
    assert not batch.failed.any()
    np.testing.assert_allclose(batch.outputs["EMBEDDING"], expected, rtol=1e-3, atol=1e-4)


def test_what_never_fits_is_refused(config: ModelConfig) -> None:
    engine = vision(config)
    engine.runner = Scarce(engine, 0)
    batch = engine(pixels(3))
    assert batch.failed.tolist() == [True, True, True]
    with pytest.raises(DeviceMemoryError, match="not enough free memory"):
        batch.rows(0, 1)


def test_only_the_row_that_failed_is_refused(config: ModelConfig) -> None:
    """Memory returns after the first row: the others are served, at their own places."""

    class Recovering(Scarce):
        def __call__(self, part: Any, /, wanted: Sequence[str]) -> Finish:
            self.rows = 1 if self.passes else 0
            return super().__call__(part, wanted)

    engine = vision(config, max_rows=1)
    expected = engine(pixels(4)).outputs["EMBEDDING"]
    engine.runner = Recovering(engine, 0)
    batch = engine(pixels(4))
    assert batch.failed.tolist() == [True, False, False, False]
    np.testing.assert_allclose(batch.rows(1, 4)["EMBEDDING"], expected[1:], rtol=1e-4, atol=1e-5)
    with pytest.raises(DeviceMemoryError):
        batch.rows(0, 2)


def test_memory_of_a_pass_under_way_comes_back_first(config: ModelConfig) -> None:
    """There is room for one row at a time, and a started pass holds its room until it is waited for."""
    engine = vision(config, max_rows=2)
    expected = engine(pixels(5)).outputs["EMBEDDING"]
    plain, held = engine.runner, [0]

    class OneAtATime:
        max_rows = 2

        def __call__(self, part: Any, /, wanted: Sequence[str]) -> Finish:
            if held[0] + len(part) > 1:
                raise torch.OutOfMemoryError("out of memory")
            held[0] += 1
            outputs = plain(part, wanted)()

            def finish() -> Arrays:
                held[0] -= 1
                return outputs

            return finish

    engine.runner = OneAtATime()
    batch = engine(pixels(5))
    assert not batch.failed.any()
    np.testing.assert_allclose(batch.outputs["EMBEDDING"], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("width", "dtype"), [(128, "bfloat16"), (512, "float8")])
def test_a_narrow_tower_is_not_computed_in_float8(
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


GPUS = {"7.5": (7, 5), "8.0": (8, 0), "8.9": (8, 9), "9.0": (9, 0)}


@pytest.mark.parametrize(
    ("gpu", "plan", "expected"),
    [
        ("9.0", Plan("cuda:0"), ("bfloat16", "fused")),
        ("9.0", Plan("cuda:0", "float32"), ("float32", "torch")),
        ("9.0", Plan("cuda:0", "float8"), ("float8", "fused")),
        ("8.9", Plan("cuda:0", "float8", "fused"), ("float8", "fused")),
        ("8.0", Plan("cuda:0", "float16", "torch"), ("float16", "torch")),
        ("7.5", Plan("cuda:0"), ("float16", "torch")),
        ("8.0", Plan("cuda:0", "float8"), "8.9 or newer .this one has 8.0"),
        ("9.0", Plan("cuda:0", "float8", "torch"), "needs the backend fused"),
        ("9.0", Plan("cuda:0", "float32", "fused"), "needs 16 or 8 bits"),
        ("7.5", Plan("cuda:0", "float16", "fused"), "this one has 7.5"),
        ("9.0", Plan("cuda:0", "int8"), "not for GPUs"),
        ("9.0", Plan("cuda:0", "auto", "openvino"), "not for GPUs"),
    ],
    ids=str,
)
def test_what_a_gpu_runs(
    gpu: str, plan: Plan, expected: tuple[str, str] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "gpu_capabilities", lambda: (GPUS[gpu],))
    if isinstance(expected, str):
        with pytest.raises(SettingsError, match=expected):
            plan.resolve()
    else:
        resolved = plan.resolve()
        assert (resolved.dtype, resolved.backend) == expected


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan("cpu", "float16"), "not for CPUs"),
        (Plan("cpu", "float8"), "not for CPUs"),
        (Plan("cpu", "float32", "fused"), "not for CPUs"),
        (Plan("cpu", "int8", "torch"), "needs the backend openvino"),
    ],
)
def test_what_a_cpu_cannot_run_is_a_setting_error(plan: Plan, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        plan.resolve()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_setting_error() -> None:
    with pytest.raises(SettingsError, match="device cuda:0: the NVIDIA driver shows no GPUs"):
        Plan("cuda:0").resolve()
