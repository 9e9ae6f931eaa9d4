"""The heatmap benchmark, end to end on scenes of plain shapes, and its arithmetic."""

from __future__ import annotations

import copy
import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image
from random_checkpoints import random_clip

from benchmarks import heatmaps, plots
from benchmarks.heatmap_methods import Maps, Method, Model, hide, methods, untrained, windows
from benchmarks.heatmaps import METRICS, Perturbation, Setup, collect, prepare, read, sheet, variants
from benchmarks.records import write_csv
from siglip_serve.towers.load import load_vision
from training.composed import Scenes
from training.pack import Pack
from validate.measures.localization import average_precision

TINY = ROOT / "checkpoints" / "siglip-tiny"
LABELS = ["red square", "blue square", "green square", "cat", "dog", "tree"]
COLORS = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.1, 0.9], [0.1, 0.7, 0.1]])


def shapes(size: int, count: int = 3) -> Scenes:
    """Squares of different colours, two in each scene and, in the last, three."""
    pictures = torch.full((count, 3, size, size), 0.9)
    masks = torch.zeros(count, 4, size, size, dtype=torch.bool)
    concepts = torch.full((count, 4), -1)
    third = size // 3
    for scene in range(count):
        for place in range(3 if scene == count - 1 else 2):
            concept = (scene + place) % 3
            top, left = (place % 2) * third + 4, place * third
            pictures[scene, :, top : top + third, left : left + third] = COLORS[concept][:, None, None]
            masks[scene, place, top : top + third, left : left + third] = True
            concepts[scene, place] = concept
    return Scenes(pictures, masks, concepts)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(str(TINY))


@pytest.fixture(scope="module")
def setup(model: Model) -> Setup:
    scenes = read(shapes(model.config.vision.image_size))
    return prepare(model, scenes, LABELS, range(len(LABELS)), seed=0)


def test_run_has_a_row_per_method_with_plausible_figures(model: Model, setup: Setup, tmp_path: Path) -> None:
    scenes = read(shapes(model.config.vision.image_size))
    rows = collect(setup, scenes, perturbed=2, seed=0)
    depth = model.config.vision.num_hidden_layers
    # Two kinds of relative maps per method, except where the prompt is ignored.
    assert len(rows) == 2 * (depth + 1 + 5) + 2
    assert {row["method"] for row in rows} == {
        "ours",
        "ours, untrained",
        "occlusion",
        "LeGrad, pooler",
        "LeGrad, blocks",
        "dense",
        "pool attention",
        "random",
    }
    for row in rows:
        assert (row["checkpoint"], row["scenes"], row["objects"], row["perturbed"]) == (
            "siglip-tiny",
            "3",
            "7",
            "2",
        )
        for name in METRICS[:4]:
            assert 0 <= float(row[f"{name}_low"]) <= float(row[name]) <= float(row[f"{name}_high"]) <= 1
        # Only this project's maps claim to sum to the cosine.
        assert bool(row["completeness"]) == row["method"].startswith("ours")
        if row["completeness"]:
            assert float(row["completeness"]) < 1e-5
        default = row["method"] != "ours" or row["blocks"] == "2"
        assert bool(row["deletion"]) == bool(row["insertion"]) == (default and row["prompts"] != "many")
    by_name = {(row["method"], row["blocks"], row["prompts"]): row for row in rows}
    assert by_name["pool attention", "", ""]["contrast"] == "0.5000"
    assert by_name["occlusion", "", "scene"]["passes"] == "65"
    write_csv(tmp_path / "heatmaps.csv", [{"device": "here", "date": "2026-01-01"} | row for row in rows])
    with Image.open(plots.draw("heatmaps", tmp_path)) as image:
        assert len(set(np.asarray(image.convert("L")).ravel().tolist())) > 10
    assert "LeGrad, pooler" in heatmaps.summary(rows)


def test_command_writes_rows_and_sheets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    meta: dict[str, object] = {
        "styles": [],
        "never_trained": [],
        "size": 1,
        "classes": list(range(len(LABELS))),
    }
    meta["concepts"] = [{"label": label} for label in LABELS]
    nothing = np.zeros(0, dtype=np.uint8)
    pack, output = tmp_path / "art.npz", tmp_path / "heatmaps.csv"
    np.savez(pack, blob=nothing, offsets=nothing, concept=nothing, style=nothing, meta=json.dumps(meta))
    asked = []

    def draw_scenes(_: Pack, count: int, canvas: int, seed: int, role: str = "held-out") -> Scenes:
        asked.append((count, canvas, seed, role))
        return shapes(canvas, count)

    monkeypatch.setattr(heatmaps, "draw_scenes", draw_scenes)
    options = ["--checkpoint", str(TINY), "--pack", str(pack), "--scenes", "1", "--perturbed", "0"]
    heatmaps.main([*options, "--output", str(output), "--sheets", str(tmp_path), "--seed", "3"])
    assert asked == [(1, 96, 3, "held-out")]
    with output.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        *("date", "commit", "device", "python", "torch", "openvino", "numpy", "command"),
        *("checkpoint", "scenes", "objects", "perturbed", "method", "blocks", "prompts", "passes"),
        *(f"{name}{end}" for name in METRICS for end in ("", "_low", "_high")),
        "completeness",
    ]
    assert {row["deletion"] for row in rows} == {""}
    assert (tmp_path / "scene_0.png").is_file()
    assert "pointing" in capsys.readouterr().out


def test_sheet_shows_every_method(model: Model, setup: Setup) -> None:
    scene = read(shapes(model.config.vision.image_size))[2]
    page = np.asarray(sheet(setup, scene, ["a", "b", "c"]))
    tiles = page[14 : 14 + 144].reshape(144, -1, 144, 3)
    assert tiles.shape[1] == 9  # the scene, and eight methods
    assert (tiles.std(axis=(0, 2)).max(axis=1) > 5).all()


def test_a_scene_of_one_kind_is_left_out_and_places_of_one_kind_are_joined() -> None:
    made = shapes(12, count=2)
    made.concepts[0] = torch.tensor([1, 1, -1, -1])
    (kept,) = read(made)
    assert kept.concepts == (0, 1, 2)
    made.concepts[1] = torch.tensor([2, 0, 2, -1])
    (joined,) = read(made)
    assert joined.concepts == (0, 2)
    assert joined.masks[1].sum() == (made.masks[1, 0] | made.masks[1, 2]).sum()


def test_relative_maps_and_maps_that_ignore_the_prompt(model: Model) -> None:
    maps = Maps(np.array([[[1.0, 3.0]], [[3.0, 3.0]]]), np.array([[1.0, 0.0]]))
    way = Method("", None, 1, lambda _: maps)
    found = variants(way, maps)
    assert found["scene"].tolist() == [[[-1, 0]], [[1, 0]]]
    assert found["many"].tolist() == [[[0, 3]], [[2, 3]]]
    assert list(variants(replace(way, relative=False), maps)) == [""]
    assert len({(each.name, each.blocks) for each in methods(model, 0)}) == 17


def test_occlusion_finds_the_pixels_that_change_the_cosine(setup: Setup) -> None:
    """The tower is replaced by a linear one that reads one place, to which the map must point."""

    class Corner(Model):
        def __init__(self) -> None:
            self.config, self.tower = setup.model.config, setup.model.tower

        def embed(self, pictures: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> heatmaps.Rows:
            place = pictures[:, 10:30, 50:70].mean(axis=(1, 2, 3)) / 255
            return np.stack([place, np.ones_like(place)], axis=1).astype(np.float32)

    size = setup.model.config.vision.image_size
    picture = np.zeros((size, size, 3), dtype=np.uint8)
    picture[10:30, 50:70] = 255
    case = Corner().case(picture, np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32))
    occlusion = next(way for way in setup.ways if way.name == "occlusion")
    mask = np.zeros((size, size), dtype=bool)
    mask[10:30, 50:70] = True
    maps = occlusion.find(case)
    assert average_precision(maps.own[0], mask) > 0.6
    assert average_precision(-maps.own[1], mask) > 0.6
    # The score stays high while that place is hidden last, and drops when it is hidden first.
    curves = Perturbation(Corner(), case)
    good, bad = curves(np.stack([maps.own[0], -maps.own[0]])), curves(np.stack([-maps.own[0], maps.own[0]]))
    assert good[0] < bad[0]
    assert good[1] > bad[1]


def test_every_method_draws_maps_of_a_clip_tower(setup: Setup, tmp_path: Path) -> None:
    random_clip({"image_size": 48, "patch_size": 8}).save_pretrained(tmp_path)
    tower = load_vision(tmp_path)
    config = setup.model.config
    vision = replace(config.vision, image_size=48, patch_size=8)

    class Clip(Model):
        def __init__(self) -> None:
            self.config, self.tower = replace(config, _vision=vision), tower

        def embed(self, pictures: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> heatmaps.Rows:
            with torch.inference_mode():
                pixels = torch.cat([self.case(each, vectors, vectors).pixels for each in pictures])
                return np.asarray(tower.head(tower(pixels)).numpy())

    vectors = np.eye(48, dtype=np.float32)[:3]
    made, depth = Clip(), len(tower.encoder.layers)
    picture = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    case = made.case(picture, vectors[:2], vectors)
    ways = methods(made, seed=0)
    assert [way.blocks for way in ways if way.name == "ours"] == list(range(1, depth + 1))
    assert "LeGrad, pooler" not in {way.name for way in ways}
    for way in ways:
        maps = way.find(case)
        side = 48 if way.name == "occlusion" else 6
        assert (maps.own.shape, maps.bank.shape) == ((2, side, side), (side, side))
        assert maps.own.std(axis=(1, 2)).min() > 0
        assert np.isfinite(maps.completeness) == way.name.startswith("ours")
        assert not maps.completeness > 1e-5


@pytest.mark.parametrize(
    ("image", "patch", "count", "side"), [(96, 8, 64, 3), (224, 16, 144, 3), (378, 14, 144, 5)]
)
def test_occlusion_hides_every_pixel(setup: Setup, image: int, patch: int, count: int, side: int) -> None:
    config = setup.model.config
    model = copy.copy(setup.model)
    model.config = replace(config, _vision=replace(config.vision, image_size=image, patch_size=patch))
    found = windows(model)
    assert len(found) == count
    assert (found.sum(axis=(1, 2)) == (side * patch) ** 2).all()
    assert found.any(axis=0).all()
    assert len({each.tobytes() for each in found}) == count


def test_hidden_places_have_the_mean_colour() -> None:
    picture = np.zeros((2, 2, 3), dtype=np.uint8)
    picture[0] = 100
    gone = np.array([[[True, False], [False, False]]])
    assert hide(picture, gone)[0, :, :, 0].tolist() == [[50, 100], [0, 0]]


def test_untrained_weights_differ_and_repeat(model: Model) -> None:
    size = model.config.vision.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        trained, first, again, other = (
            each.tower.head(each.tower(pixels))
            for each in (model, untrained(model, 1), untrained(model, 1), untrained(model, 2))
        )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)
    assert not torch.allclose(first, trained, atol=0.1)
    assert torch.isfinite(first).all()
    # The pictures differ, so that the maps are not those of a constant.
    assert not torch.allclose(first[0], first[1], atol=0.01)
