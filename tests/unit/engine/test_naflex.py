"""The engine of NaFlex: 200 pictures in one batch, padding, heatmaps, and plans that are refused."""

from __future__ import annotations

from functools import partial
from typing import cast

import numpy as np
import pytest
import torch
from images import photo
from random_checkpoints import random_naflex, save_naflex
from transformers import Siglip2ImageProcessorPil, Siglip2Model

from siglip_serve.checkpoint.config import load_config, tensor_dims
from siglip_serve.checkpoint.model_config import ModelConfig, NaflexImageConfig
from siglip_serve.config import Backend, Dtype
from siglip_serve.engine.engines import NaflexEngine, TextEngine
from siglip_serve.engine.groups import group_rows
from siglip_serve.engine.passes import OUTPUTS
from siglip_serve.engine.patches import PatchRows
from siglip_serve.engine.plan import Plan
from siglip_serve.errors import SettingsError
from siglip_serve.images.patches import cut_patches, patch_grid
from siglip_serve.towers.load import load_text
from siglip_serve.towers.naflex import load_vision

MOST = 64
BACKENDS: tuple[Backend, ...] = ("torch", "openvino")
ASPECTS = np.exp(np.linspace(np.log(1 / 8), np.log(8), 200))
PICTURES = [
    photo(max(8, round(40 * aspect**0.5)), max(8, round(40 * aspect**-0.5)), seed)
    for seed, aspect in enumerate(ASPECTS.tolist())
]


@pytest.fixture(scope="module")
def model() -> Siglip2Model:
    return random_naflex()


@pytest.fixture(scope="module")
def config(model: Siglip2Model, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return load_config(save_naflex(model, tmp_path_factory.mktemp("naflex"), MOST))


@pytest.fixture(scope="module")
def rows(config: ModelConfig) -> PatchRows:
    """All pictures. What follows an image's patches is noise, which must not count."""
    assert isinstance(config.image, NaflexImageConfig)
    grids = np.array([patch_grid(config.image, *picture.size[::-1]) for picture in PICTURES])
    cut = np.stack([cut_patches(np.array(picture), config.image, "pil") for picture in PICTURES])
    rows = PatchRows(cut, grids)
    noise = np.random.default_rng(0).integers(0, 256, cut.shape, dtype=np.uint8)
    return PatchRows(np.where(rows.real[..., None], cut, noise), grids)


def make_engine(config: ModelConfig, plan: Plan) -> NaflexEngine:
    assert isinstance(config.image, NaflexImageConfig)
    return NaflexEngine(load_vision(config.path), config.image, plan)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_batch_equals_transformers_and_one_by_one(
    backend: Backend, model: Siglip2Model, config: ModelConfig, rows: PatchRows
) -> None:
    processor = Siglip2ImageProcessorPil.from_pretrained(config.path)
    inputs = processor(PICTURES, return_tensors="pt")
    with torch.inference_mode():
        found = model.vision_model(**inputs)
    engine = make_engine(config, Plan("cpu", "float32", backend))
    got = engine(rows, OUTPUTS).outputs
    assert {name: list(array.shape[1:]) for name, array in got.items()}.items() <= tensor_dims(config).items()
    np.testing.assert_allclose(got["EMBEDDING"], found.pooler_output, atol=1e-5, rtol=0)
    tokens = found.last_hidden_state.numpy() * rows.real[..., None]
    np.testing.assert_allclose(got["PATCH_EMBEDDINGS"], tokens, atol=1e-5, rtol=0)
    mean = tokens.sum(1) / rows.counts[:, None]
    np.testing.assert_allclose(got["MEAN_EMBEDDING"], mean, atol=1e-5, rtol=0)
    for index in range(len(rows)):
        alone = engine(rows[index : index + 1]).outputs["EMBEDDING"][0]
        np.testing.assert_allclose(got["EMBEDDING"][index], alone, atol=1e-5, rtol=0)


def test_little_is_padding(rows: PatchRows) -> None:
    counts = rows.counts
    groups = group_rows(counts, 8)
    assert sorted(np.concatenate(groups)) == list(range(200))
    assert max(map(len, groups)) == 8
    computed = sum(len(group) * counts[group].max() for group in groups)
    assert 1 - counts.sum() / computed <= 0.15
    assert 1 - counts.sum() / (200 * MOST) > 0.03  # without groups


def test_padding_is_bounded_in_every_pass() -> None:
    counts = np.random.default_rng(1).integers(1, 257, 1000)
    for group in group_rows(counts, 64):
        assert 1 - counts[group].mean() / counts[group].max() <= 0.1 + 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_close(backend: Backend, config: ModelConfig, rows: PatchRows) -> None:
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    exact, rough = (
        make_engine(config, Plan("cpu", dtype, backend))(rows[::20]).outputs["EMBEDDING"] for dtype in dtypes
    )
    cosine = (exact * rough).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rough, axis=1)
    assert 0.999 < cosine.min() < 1


@pytest.mark.parametrize(("backend", "blocks"), [("torch", 0), ("torch", 2), ("openvino", 2)])
def test_maps_sum_to_the_cosine(config: ModelConfig, rows: PatchRows, backend: Backend, blocks: int) -> None:
    engine = make_engine(config, Plan("cpu", "float32", backend, heatmap_blocks=blocks))
    vectors = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for index in (0, 77, 199):
        row = rows[index : index + 1]
        found, count = engine.explain(row, vectors), int(row.counts[0])
        embedding = engine(row).outputs["EMBEDDING"][0]
        np.testing.assert_allclose(found.embedding, embedding, atol=1e-5)
        cosine = vectors @ embedding / np.linalg.norm(embedding)
        np.testing.assert_allclose(found.maps.sum(1) + found.unattributed, cosine, atol=1e-5)
        assert found.maps.shape == (3, MOST)
        assert found.maps[:, :count].std(1).min() > 1e-5
        assert not found.maps[:, count:].any()


def test_rows_that_fail_are_those_of_the_caller(
    config: ModelConfig, rows: PatchRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are computed in another order."""
    engine = make_engine(config, Plan("cpu", "float32"))
    expected = engine(rows[:40]).outputs["EMBEDDING"]
    run, thin = engine.runner.__call__, rows.grids[3]

    def fail(some: PatchRows, wanted: list[str]) -> object:
        if (some.grids == thin).all(axis=1).any():
            raise torch.OutOfMemoryError("no memory")
        return run(some, wanted)

    monkeypatch.setattr(engine, "runner", partial(fail))
    for name, value in (("max_rows", 8), ("grouped", True)):
        monkeypatch.setattr(engine.runner, name, value, raising=False)
    batch = engine(rows[:40])
    np.testing.assert_array_equal(batch.failed, (rows.grids[:40] == thin).all(axis=1))
    good = ~batch.failed
    assert good.any()
    np.testing.assert_allclose(batch.outputs["EMBEDDING"][good], expected[good], atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "backend", "message"),
    [
        ("int8", "auto", "dtype int8: not for towers of NaFlex; float32, bfloat16, and on GPUs float16"),
        ("auto", "fused", "backend fused: not for CPUs"),
    ],
)
def test_refuses_plans_that_run_no_naflex(
    dtype: Dtype, backend: Backend, message: str, config: ModelConfig
) -> None:
    with pytest.raises(SettingsError, match=message):
        make_engine(config, Plan("cpu", dtype, backend))


def test_auto_is_the_choice_of_siglip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siglip_serve.engine.plan.gpu_capabilities", lambda: ((9, 0),))
    for device, dtype, backend in (
        ("cpu", "float32", "openvino"),
        ("cuda:0", "float8", "fused"),
        ("cuda:0", "float32", "torch"),
    ):
        resolved = Plan(device, cast("Dtype", dtype)).for_vision("naflex", 768)
        assert (resolved.dtype, resolved.backend) == (dtype, backend)
    assert Plan("cuda:0").for_vision("naflex", 768, "gelu").backend == "fused"
    assert Plan("cuda:0").for_vision("naflex", 768, "relu").backend == "torch"


def test_texts_run_as_those_of_siglip(model: Siglip2Model, config: ModelConfig) -> None:
    assert Plan("cpu", "float32", "openvino").for_text("naflex").backend == "openvino"
    ids = np.random.default_rng(0).integers(0, 300, (5, 64))
    with torch.inference_mode():
        expected = model.text_model(torch.from_numpy(ids)).pooler_output
    got = TextEngine(load_text(config.path), Plan("cpu", "float32"))(ids).outputs["EMBEDDING"]
    np.testing.assert_allclose(got, expected, atol=1e-4)
