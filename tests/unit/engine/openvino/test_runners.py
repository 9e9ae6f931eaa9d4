"""OpenVINO against the torch towers, and int8 with its files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from random_checkpoints import random_model, save_checkpoint
from wire import TINY

from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.model_config import ModelConfig
from siglip_serve.config import Dtype
from siglip_serve.engine.engines import TextEngine, VisionEngine
from siglip_serve.engine.openvino.compiled import Compiled
from siglip_serve.engine.openvino.graph import build_vision
from siglip_serve.engine.openvino.runners import OpenVinoVision
from siglip_serve.engine.passes import OUTPUTS
from siglip_serve.engine.plan import Plan
from siglip_serve.errors import SettingsError
from siglip_serve.machine import available_cores
from siglip_serve.towers.siglip import VisionTower, load_text, load_vision
from siglip_serve.towers.stored import StoredVision

BATCHES = (1, 3, 8, 11)
GEOMETRIES: dict[str, dict[str, Any]] = {
    "whole patches": {"image_size": 48, "patch_size": 16},
    "no multiple of the patch": {"image_size": 50, "patch_size": 14},
    "narrow heads": {"image_size": 40, "patch_size": 8, "hidden_size": 72, "num_attention_heads": 6},
}


@pytest.fixture(scope="module", params=["bundled", *GEOMETRIES])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    if request.param == "bundled":
        return load_config(TINY)
    vision = GEOMETRIES[request.param]
    text = {"projection_size": vision.get("hidden_size", 64)}
    return load_config(save_checkpoint(random_model(vision, text), tmp_path_factory.mktemp("random")))


def pixels(config: ModelConfig, rows: int) -> NDArray[np.uint8]:
    size = config.image.size
    return np.random.default_rng(rows).integers(0, 256, (rows, size, size, 3), dtype=np.uint8)


def vision(config: ModelConfig, dtype: Dtype = "float32", **plan: Any) -> VisionEngine:
    return VisionEngine(load_vision(config.path), config.image, Plan("cpu", dtype, "openvino", **plan))


def expected(config: ModelConfig, rows: NDArray[np.uint8]) -> dict[str, torch.Tensor]:
    tower = load_vision(config.path)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.image.mean, config.image.std))
    with torch.inference_mode():
        tokens = tower((torch.from_numpy(rows).permute(0, 3, 1, 2) * config.image.rescale - mean) / std)
        return {"EMBEDDING": tower.head(tokens), "MEAN_EMBEDDING": tokens.mean(1), "PATCH_EMBEDDINGS": tokens}


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def test_float32_outputs_equal_those_of_the_tower(config: ModelConfig) -> None:
    engine = vision(config)
    for rows in BATCHES:
        got = engine(pixels(config, rows), OUTPUTS).outputs
        for name, tensor in expected(config, pixels(config, rows)).items():
            assert got[name].dtype == np.float32
            assert got[name].shape == tensor.shape
            assert np.abs(got[name] - tensor.numpy()).max() <= 1e-5 * tensor.abs().max(), (name, rows)


def test_float32_text_embeddings_equal_those_of_the_tower(config: ModelConfig) -> None:
    tower = load_text(config.path)
    engine = TextEngine(load_text(config.path), Plan("cpu", "float32", "openvino"))
    for rows in (*BATCHES, 40):
        ids = np.random.default_rng(rows).integers(0, config.text.vocab_size, (rows, tower.context))
        with torch.inference_mode():
            theirs = tower.pool(tower(torch.from_numpy(ids)), torch.from_numpy(ids)).numpy()
        assert np.abs(engine(ids).outputs["EMBEDDING"] - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_bfloat16_is_close_on_the_bundled_checkpoint() -> None:
    config = load_config(TINY)
    rows = np.stack(
        [
            np.asarray(Image.open(file).convert("RGB").resize((config.image.size,) * 2))
            for file in sorted((TINY / "samples").glob("*.jpg"))
        ]
    )
    exact, rough = (vision(config, dtype)(rows, OUTPUTS).outputs for dtype in ("float32", "bfloat16"))
    assert cosine(exact["EMBEDDING"], rough["EMBEDDING"]) >= 0.9999
    assert cosine(exact["MEAN_EMBEDDING"], rough["MEAN_EMBEDDING"]) >= 0.9999


def test_float32_is_not_computed_in_bfloat16() -> None:
    """The plugin's own choice would be bfloat16 where the processor has it."""
    config = load_config(TINY)
    plan = Plan("cpu", "float32", "openvino")
    stored = StoredVision.open(config)
    model = build_vision(stored.parameters, stored.config, config.image)
    compiled = Compiled(model, plan)._request.get_compiled_model()
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert compiled.get_property("INFERENCE_NUM_THREADS") == available_cores()


def test_pixels_may_be_read_only_and_views() -> None:
    config = load_config(TINY)
    rows = pixels(config, 4)
    rows.flags.writeable = False
    engine = vision(config)
    whole = engine(rows).outputs["EMBEDDING"]
    np.testing.assert_allclose(engine(rows[::2]).outputs["EMBEDDING"], whole[::2], rtol=1e-4, atol=1e-5)


def test_runs_the_head_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(TINY)
    engine = vision(config)
    assert isinstance(engine.runner, OpenVinoVision)

    def forbidden(_: object) -> NDArray[np.float32]:
        raise AssertionError("the head ran")

    monkeypatch.setattr(engine.runner, "_head", forbidden)
    assert list(engine(pixels(config, 2), ["MEAN_EMBEDDING"]).outputs) == ["MEAN_EMBEDDING"]
    with pytest.raises(AssertionError, match="the head ran"):
        engine(pixels(config, 2))


class _Full:
    def infer(self, rows: list[NDArray[Any]], **_: object) -> list[NDArray[np.float32]]:
        if len(rows[0]) > 2:
            raise RuntimeError(
                "Check 'ptr' failed at cpu_memory.cpp:257:\nFailed to allocate 331776000 bytes of memory"
            )
        return [np.zeros((len(rows[0]), 1), np.float32)]


def test_halves_a_pass_that_does_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(TINY)
    engine = TextEngine(load_text(TINY), Plan("cpu", "float32", "openvino"))
    monkeypatch.setattr(engine.runner._tower, "_request", _Full())  # type: ignore[attr-defined]
    ids = np.zeros((5, config.text.max_position_embeddings), np.int64)
    batch = engine(ids)
    assert not batch.failed.any()
    assert batch.outputs["EMBEDDING"].shape == (5, 1)


class _Int8:
    """A narrow tower of one block, pictures, and engines on them."""

    def __init__(self, path: Path) -> None:
        narrow = {**GEOMETRIES["whole patches"], "num_hidden_layers": 1}
        self.config = load_config(save_checkpoint(random_model(narrow), path / "model"))
        self.pictures, self.cache = path / "pictures", path / "cache"
        (self.pictures / "some").mkdir(parents=True)
        for index in range(20):
            Image.fromarray(pixels(self.config, index + 1)[0]).save(self.pictures / "some" / f"{index}.png")

    def engine(self, tower: VisionTower | None = None) -> VisionEngine:
        plan = Plan("cpu", "int8", "openvino", cache=self.cache, calibration=self.pictures)
        return VisionEngine(tower or load_vision(self.config.path), self.config.image, plan)

    def files(self) -> list[Path]:
        return sorted(self.cache.iterdir())


def test_int8_is_close_and_kept_until_something_changes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("nncf")
    int8 = _Int8(tmp_path)
    rows = pixels(int8.config, 5)
    (int8.pictures / "broken.jpg").write_bytes(b"not a picture")

    first = int8.engine()(rows, OUTPUTS).outputs
    said = capfd.readouterr().out
    assert "calibrating int8 on 18 images" in said
    assert "not calibrated on" in said
    assert "int8 against float32: cosine 0.9" in said
    exact = vision(int8.config)(rows, OUTPUTS).outputs
    assert 0.99 < cosine(first["EMBEDDING"], exact["EMBEDDING"]) < 1

    # A second start uses the file of the first, and reports the same fidelity.
    again = int8.engine()(rows, OUTPUTS).outputs
    np.testing.assert_array_equal(again["PATCH_EMBEDDINGS"], first["PATCH_EMBEDDINGS"])
    said = capfd.readouterr().out
    assert "calibrating" not in said
    assert "int8 against float32: cosine 0.9" in said

    # A damaged file is noticed and replaced.
    (kept,) = int8.files()
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2] + b"damage" + whole[len(whole) // 2 + 6 :])
    repaired = int8.engine()(rows, OUTPUTS).outputs
    np.testing.assert_allclose(repaired["EMBEDDING"], first["EMBEDDING"], rtol=1e-3, atol=1e-3)
    said = capfd.readouterr().out
    assert "cannot be used and is made again" in said
    assert int8.files() == [kept]

    # Other weights never use this file.
    tower = load_vision(int8.config.path)
    tower.post_layernorm.bias.data += 1
    int8.engine(tower)
    assert "calibrating" in capfd.readouterr().out
    assert len(int8.files()) == 2


def test_int8_is_calibrated_where_standard_output_takes_ascii_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is so in the locale C. The progress bar of nncf and the names of files have other characters."""
    pytest.importorskip("nncf")
    int8 = _Int8(tmp_path)
    (int8.pictures / "brisé.jpg").write_bytes(b"not a picture")
    log = io.BytesIO()
    stream = io.TextIOWrapper(log, encoding="ascii", errors="strict", write_through=True)
    monkeypatch.setattr("sys.stdout", stream)
    assert int8.engine()(pixels(int8.config, 2), OUTPUTS).outputs["EMBEDDING"].shape[0] == 2
    said = log.getvalue().decode()
    assert "not calibrated on" in said
    assert "brisé.jpg" in said
    assert "int8 against float32: cosine 0.9" in said
    assert (stream.encoding, stream.errors) == ("ascii", "strict")


def test_int8_runs_without_a_writable_cache(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nncf")
    int8 = _Int8(tmp_path)
    int8.cache.write_text("a file where the folder should be")
    assert int8.engine()(pixels(int8.config, 2)).outputs["EMBEDDING"].shape[0] == 2
    assert "the int8 model is not kept" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (None, "setting 'calibration' is not given"),
        ("nowhere", "setting 'calibration': .*nowhere is not a folder"),
        ("empty", "setting 'calibration': 0 readable images in .*empty"),
        ("broken", "setting 'calibration': 0 readable images in .*broken"),
    ],
)
def test_int8_refuses_to_start_without_images(tmp_path: Path, folder: str | None, message: str) -> None:
    pytest.importorskip("nncf")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"no picture")
    config = load_config(TINY)
    with pytest.raises(SettingsError, match=message):
        vision(config, "int8", calibration=tmp_path / folder if folder else None)
