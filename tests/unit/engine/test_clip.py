"""Engines with CLIP's towers: outputs, shortened texts, int8, heatmaps, and plans that are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_checkpoints import SIDE, make_clip
from numpy.typing import NDArray
from PIL import Image

from siglip_serve.checkpoint.config import load_config, tensor_dims
from siglip_serve.checkpoint.model_config import ModelConfig
from siglip_serve.config import Backend, Dtype
from siglip_serve.engine.engines import TextEngine, VisionEngine
from siglip_serve.engine.passes import OUTPUTS, Finish
from siglip_serve.engine.plan import Plan
from siglip_serve.errors import SettingsError
from siglip_serve.towers.clip import ClipTextTower, ClipVisionTower
from siglip_serve.towers.load import load_text, load_vision

ACTIVATIONS = ["quick_gelu", "gelu", "gelu_pytorch_tanh"]
BACKENDS: list[Backend] = ["torch", "openvino"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_clip(tmp_path)


@pytest.fixture(scope="module", params=ACTIVATIONS)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return load_config(make_clip(tmp_path_factory.mktemp("clip"), request.param))


def pixels(rows: int) -> NDArray[np.uint8]:
    return np.random.default_rng(rows).integers(0, 256, (rows, SIDE, SIDE, 3), dtype=np.uint8)


def ids_ending_at(tower: ClipTextTower, places: Sequence[int]) -> NDArray[np.int64]:
    """Ids with an end token at each place, none for -1, and behind it ids that must not count."""
    config = tower.config
    ids = np.random.default_rng(0).integers(0, config.eos_token_id - 1, (len(places), tower.context))
    for row, place in enumerate(places):
        if place >= 0:
            ids[row, place] = config.eos_token_id
            ids[row, place + 1 :: 3] = config.eos_token_id
    return ids


def text_tower(path: Path) -> ClipTextTower:
    tower = load_text(path)
    assert isinstance(tower, ClipTextTower)
    return tower


def least_cosine(exact: NDArray[np.float32], rough: NDArray[np.float32]) -> float:
    cosine = (exact * rough).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rough, axis=1)
    return float(cosine.min())


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_equal_those_of_the_towers(config: ModelConfig, backend: Backend) -> None:
    tower, plan = load_vision(config.path), Plan("cpu", "float32", backend)
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
    dims = tensor_dims(config)
    for wanted in (OUTPUTS, *([name] for name in OUTPUTS)):
        got = engine(pixels(11), wanted).outputs
        assert sorted(got) == sorted(wanted)
        for name, array in got.items():
            assert array.flags.c_contiguous
            assert list(array.shape[1:]) == dims[name]
            np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pools_largest_id", [False, True])
def test_shortened_texts_have_the_embeddings_of_whole_ones(
    config: ModelConfig, backend: Backend, pools_largest_id: bool
) -> None:
    """More texts than a pass has, of all lengths, in no order, and some without an end token."""
    tower = text_tower(config.path)
    tower.config = replace(tower.config, pools_largest_id=pools_largest_id)
    places = [int(place) for place in np.random.default_rng(1).permutation(tower.context)]
    ids = ids_ending_at(tower, [*places, -1, *([5] * 30), -1])
    whole = torch.from_numpy(ids)
    with torch.inference_mode():
        expected = tower.pool(tower(whole), whole)
    engine = TextEngine(tower, Plan("cpu", "float32", backend))
    for rows in (1, 32, len(ids)):
        got = engine(ids[:rows]).outputs["EMBEDDING"]
        np.testing.assert_allclose(got, expected[:rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pass_is_as_long_as_its_longest_text_and_has_few_shorter_ones(
    config: ModelConfig, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = text_tower(config.path)
    ids = ids_ending_at(tower, [*([3, 40] * 32), 7, 8])
    engine = TextEngine(tower, Plan("cpu", "float32", backend))
    shapes: list[tuple[int, ...]] = []
    run = engine.runner

    def recorded(part: NDArray[np.int64], wanted: Sequence[str]) -> Finish:
        shapes.append(part.shape)
        return run(part, wanted)

    recorded.max_rows = run.max_rows  # type: ignore[attr-defined]
    monkeypatch.setattr(engine, "runner", recorded)
    engine(ids)
    assert shapes == [(32, 48), (3, 16), (31, 8)]
    shapes.clear()
    engine(ids[-2:])
    engine(ids[-2:-1])
    engine(ids_ending_at(tower, [tower.context - 1]))
    assert shapes == [(2, 16), (1, 8), (1, tower.context)]


def test_openvino_runs_clip_on_cpus(checkpoint: Path) -> None:
    config = load_config(checkpoint)
    assert VisionEngine(load_vision(checkpoint), config.image, Plan("cpu")).plan.backend == "openvino"
    assert TextEngine(load_text(checkpoint), Plan("cpu")).plan.backend == "openvino"


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_close(config: ModelConfig, backend: Backend) -> None:
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    images, texts, patches = [], [], []
    for dtype in dtypes:
        plan, tower = Plan("cpu", dtype, backend), text_tower(config.path)
        found = VisionEngine(load_vision(config.path), config.image, plan)(pixels(5), OUTPUTS).outputs
        images.append(found["EMBEDDING"])
        patches.append(found["MEAN_EMBEDDING"])
        texts.append(TextEngine(tower, plan)(ids_ending_at(tower, [3, 9, 12, 40, 63])).outputs["EMBEDDING"])
    assert least_cosine(images[0], images[1]) > 0.999
    assert least_cosine(texts[0], texts[1]) > 0.999
    assert least_cosine(patches[0], patches[1]) > 0.999


def test_int8_is_close(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nncf")
    config = load_config(make_clip(tmp_path / "model"))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(20):
        Image.fromarray(pixels(index + 1)[0]).save(pictures / f"{index}.png")
    plan = Plan("cpu", "int8", cache=tmp_path / "cache", calibration=pictures)
    exact = VisionEngine(load_vision(config.path), config.image, Plan("cpu", "float32"))(pixels(5), OUTPUTS)
    first = VisionEngine(load_vision(config.path), config.image, plan)(pixels(5), OUTPUTS)
    for name, rough in first.outputs.items():
        assert 0.99 < least_cosine(exact.outputs[name].reshape(5, -1), rough.reshape(5, -1)) < 1, name
    assert "calibrating int8 on 18 images" in capfd.readouterr().out
    again = VisionEngine(load_vision(config.path), config.image, plan)(pixels(5), OUTPUTS)
    assert "calibrating" not in capfd.readouterr().out
    np.testing.assert_array_equal(again.outputs["EMBEDDING"], first.outputs["EMBEDDING"])
    assert TextEngine(load_text(config.path), plan).plan.dtype != "int8"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_maps_sum_to_the_cosine(
    config: ModelConfig, dtype: Dtype, tolerance: float, backend: Backend
) -> None:
    """With torch, the engine has replaced layers of the tower by packed ones."""
    engine = VisionEngine(load_vision(config.path), config.image, Plan("cpu", dtype, backend))
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
        ("auto", "fused", "backend fused: not for CPUs; torch and openvino are"),
        ("int8", "torch", "dtype int8: needs the backend openvino"),
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
