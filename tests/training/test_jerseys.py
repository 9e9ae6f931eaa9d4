from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from siglip_serve.checkpoint.config import load_config
from siglip_serve.towers.siglip import load_vision
from training import train_jerseys
from training.export import export_vision
from training.jerseys import (
    BENCHMARK,
    DIFFERENCES,
    REGION,
    TIERS,
    TRAINING,
    Cast,
    Clip,
    Conditions,
    Kind,
    Part,
    Role,
    Studio,
    Wardrobe,
    clip,
    contact_sheet,
    hard_kits,
    jpeg,
    pair_of_kits,
    render,
    sample_cameras,
    sample_kits,
    sample_players,
    sample_views,
    textures,
    training_batch,
)
from training.jerseys.__main__ import main as write_clip
from training.scenes import Random
from training.train_jerseys import contrastive

SMALL = Cast(players=2, keepers=1, referees=1, frames=2)


def pixels(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture)


def test_training_and_benchmark_share_the_plain_shirt_only() -> None:
    assert set(BENCHMARK) & set(TRAINING) == {Kind.PLAIN}
    assert set(BENCHMARK) | set(TRAINING) == set(Kind)
    kits = hard_kits(200, Random(0), TRAINING, similar=(10, 30))
    assert set(kits.kind.tolist()) == set(TRAINING)
    for tier in TIERS:
        assert set(pair_of_kits(tier, Random(1)).kind.tolist()) <= set(BENCHMARK)


def test_hard_kits_differ_in_arrangement_or_in_colour() -> None:
    kits = hard_kits(400, Random(0), TRAINING, similar=(10, 30))
    same_colours = same_pattern = 0
    for group in kits.colours[:, : Part.SECOND + 1].unflatten(0, (-1, 4)).split(1):
        first = group[0, 0]
        same_colours += int((group[0] == first).all())
    kinds, shares = kits.kind.view(-1, 4), kits.share.view(-1, 4)
    equal = (kinds == kinds[:, :1]).all(1) & (shares == shares[:, :1]).all(1)
    same_pattern = int(equal.sum())
    assert 20 <= same_colours <= 50
    assert 20 <= same_pattern <= 50
    shared = (kits.colours.view(100, 4, -1) == kits.colours.view(100, 4, -1)[:, :1]).all(2).all(1)
    assert all(len(set(row)) == 4 for row in kinds[shared].tolist())
    assert float((kits.colours - kits.colours.clamp(0, 1)).abs().max()) == 0


@pytest.mark.parametrize("kind", [Kind.STRIPES, Kind.HOOPS, Kind.HALVES, Kind.CHECKS, Kind.HARLEQUIN])
def test_a_pattern_covers_its_share(kind: Kind) -> None:
    kits = sample_kits(8, Random(0), [kind])
    black, white = torch.zeros(8, 3), torch.ones(8, 3)
    colours = torch.stack([black, white, *[black] * 6], 1)
    cloth = textures(replace(kits, colours=colours, sponsor=torch.zeros(8, 4)))[:, 0, 4:]  # below the collar
    assert cloth.mean((1, 2)).numpy() == pytest.approx(0.5, abs=0.04)
    assert cloth.std((1, 2)).min() > 0.4


def test_kits_of_t3_differ_in_arrangement_alone() -> None:
    for seed in range(6):
        kits = pair_of_kits("T3", Random(seed))
        assert torch.equal(kits.colours[0], kits.colours[1])
        assert kits.kind[0] != kits.kind[1]
        cloth = textures(kits)
        levels = (cloth * 15).round().flatten(2)
        histograms = [torch.unique(row, dim=1, return_counts=True) for row in levels]
        merged = [{tuple(c.tolist()): int(n) for c, n in zip(h[0].T, h[1], strict=True)} for h in histograms]
        total = cloth[0, 0].numel()
        # Cloth at the border of two colours is mixed, and some arrangements have more borders.
        apart = sum(abs(merged[0].get(key, 0) - merged[1].get(key, 0)) for key in merged[0] | merged[1])
        assert apart / total < 0.3
        assert (cloth[0].mean((1, 2)) - cloth[1].mean((1, 2))).abs().max() < 0.03


def test_colours_are_as_far_apart_as_asked() -> None:
    for seed, difference in enumerate(DIFFERENCES):
        made = clip("T1", seed, Cast(players=1, keepers=0, referees=0, frames=1))
        assert made.difference == pytest.approx(difference, abs=1.5)


def test_the_region_holds_the_shirt() -> None:
    random, count = Random(3), 48
    conditions = Conditions(overlap=0.0, clutter=0.0, jitter=0.02)
    kit = torch.zeros(count, dtype=torch.int64)
    studio = Studio(
        Wardrobe(sample_kits(1, random, [Kind.PLAIN])),
        sample_players(kit, random),
        sample_cameras(count, torch.zeros(count), random),
    )
    drawn = render(
        studio, sample_views(torch.arange(count), conditions, random), conditions, random, (80, 40)
    )
    top, bottom, left, right = REGION
    region = drawn.shirt[:, 0, int(top * 80) : int(bottom * 80), int(left * 40) : int(right * 40)]
    assert region.mean() > 0.55
    assert region.mean() > 3 * drawn.shirt[:, 0, 48:].mean()
    assert drawn.pictures.shape == (count, 3, 80, 40)
    assert drawn.pictures.min() >= 0
    assert drawn.pictures.max() <= 1


@pytest.fixture(scope="module")
def shaded() -> Clip:
    return clip("T5", 4, Cast(players=3, keepers=1, referees=2, frames=4))


def test_a_seed_repeats_a_clip(shaded: Clip) -> None:
    again = clip("T5", 4, Cast(players=3, keepers=1, referees=2, frames=4))
    assert again.crops == shaded.crops
    assert np.array_equal(again.team, shaded.team)
    assert clip("T5", 5, SMALL).crops != clip("T5", 4, SMALL).crops


def test_truth_of_a_clip_is_consistent(shaded: Clip) -> None:
    count = len(shaded.crops)
    truth = (shaded.team, shaded.role, shaded.track, shaded.player, shaded.frame, shaded.camera, shaded.lit)
    assert all(array.shape == (count,) for array in truth)
    assert np.array_equal(shaded.team == -1, shaded.role == Role.REFEREE)
    assert set(shaded.team[shaded.role == Role.PLAYER]) == {0, 1}
    assert np.array_equal(shaded.held_out, shaded.frame >= 2)
    assert shaded.camera[~shaded.held_out].max() < 3
    assert (shaded.camera[shaded.held_out] == 3).any()
    assert not shaded.lit.all()
    assert [pixels(data).shape[0] for data in shaded.crops] == shaded.height.tolist()
    assert contact_sheet(shaded).width == 4 * 56


def test_tiers_have_their_sizes_teams_and_swapped_tracks() -> None:
    tiny = clip("T6", 0, SMALL)
    assert tiny.height.min() >= 8
    assert tiny.height.max() <= 16
    assert set(clip("T7", 0, SMALL).team) <= {0, -1}
    swapped = clip("T8", 0, Cast(players=3, keepers=0, referees=0, frames=4))
    moved = swapped.track != swapped.player
    assert moved.any()
    assert not moved[swapped.frame == 0].any()
    for track in np.unique(swapped.track[moved]):
        assert set(swapped.team[swapped.track == track]) == {0, 1}
    frames = zip(swapped.frame.tolist(), swapped.track.tolist(), strict=True)
    assert len(set(frames)) == len(swapped.crops)


def test_training_batch_has_squares_of_the_served_size() -> None:
    made, kit = training_batch(4, 3, Random(7), 24)
    assert made.shape == (12, 3, 24, 24)
    assert kit.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert made.min() >= 0
    assert made.max() <= 1
    assert made.std((1, 2, 3)).median() > 0.03
    assert torch.equal(made, training_batch(4, 3, Random(7), 24)[0])
    whole, _ = training_batch(2, 2, Random(7), 32, region=False)
    assert whole.shape == (4, 3, 32, 32)


@pytest.mark.parametrize(("quality", "subsampled"), [(45, True), (75, True), (92, False)])
def test_jpeg_is_close_to_pillows(quality: int, subsampled: bool) -> None:
    picture = torch.nn.functional.interpolate(
        Random(0).uniform(1, 3, 8, 5), (61, 37), mode="bicubic", antialias=True
    ).clamp(0, 1)
    ours = jpeg(picture, torch.tensor([float(quality)]), torch.tensor([subsampled]))[0]
    file = io.BytesIO()
    array = (picture[0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(file, "JPEG", quality=quality, subsampling=2 if subsampled else 0)
    theirs = torch.from_numpy(pixels(file.getvalue()).copy()).permute(2, 0, 1) / 255
    loss = (theirs - picture[0]).abs().mean()
    assert (ours - theirs).abs().mean() < 0.25 * loss + 0.5 / 255


def test_the_contrastive_loss_prefers_kits_together() -> None:
    kit = torch.arange(4).repeat_interleave(3)
    together = torch.eye(4)[kit]
    apart = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    # Two others of the same kit share the whole probability: log 2 each.
    assert contrastive(together, kit, 0.01).item() == pytest.approx(np.log(2), abs=1e-4)
    assert contrastive(apart, kit, 0.01) > 10


def test_run_leaves_a_servable_image_tower(tmp_path: Path) -> None:
    settings = '{"kits": 4, "views": 2, "compile": false, "shape": {"layers": 1, "width": 32, "heads": 2}}'
    train_jerseys.main(["--out", str(tmp_path / "run"), "--minutes", "0.02", "--set", settings])
    export_vision(tmp_path / "run", tmp_path / "checkpoint")
    tower = load_vision(tmp_path / "checkpoint")
    assert tower(torch.zeros(1, 3, 64, 64)).shape == (1, 64, 32)
    assert load_config(tmp_path / "checkpoint").vision_only


def test_writes_a_clip_as_files(tmp_path: Path) -> None:
    write_clip(["T6", str(tmp_path / "crops"), "--sheet", str(tmp_path / "sheet.png")])
    names = {path.name for path in (tmp_path / "crops").iterdir()}
    rows = (tmp_path / "crops.truth.csv").read_text().splitlines()
    assert {row.split(",")[0] for row in rows[1:]} == names
    assert "frame00_track00.jpg" in names
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 1000
