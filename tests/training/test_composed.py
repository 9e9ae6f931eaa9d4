"""Scenes of several drawings, whose masks tell where each drawing is visible."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from training.composed import FEWEST, MOST, compose_scenes, draw_scenes, sample_presence
from training.pack import Pack
from training.scenes import Random

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255))
STYLES = [
    {"name": "flat", "role": "held-out", "mono": False, "kind": "vendor"},
    {"name": "ink", "role": "held-out", "mono": True, "kind": "vendor"},
    {"name": "other", "role": "train", "mono": False, "kind": "vendor"},
]


@pytest.fixture(scope="module")
def pack() -> Pack:
    """Five concepts, each a square of its own colour in three styles; the last concept is never trained."""
    files, concept, style = [], [], []
    for number, colour in enumerate(COLOURS):
        for kind in range(len(STYLES)):
            file = io.BytesIO()
            Image.new("RGBA", (16, 16), (*colour, 255)).save(file, "PNG")
            files.append(file.getvalue())
            concept.append(number)
            style.append(kind)
    return Pack(
        blob=np.frombuffer(b"".join(files), np.uint8),
        offsets=np.cumsum([0, *map(len, files)]),
        concept=np.array(concept),
        style=np.array(style),
        styles=STYLES,
        concepts=[{"label": str(number)} for number in range(len(COLOURS))],
        classes=list(range(len(COLOURS))),
        never_trained=[len(COLOURS) - 1],
        size=16,
    )


def test_masks_are_the_pixels_of_the_drawings(pack: Pack) -> None:
    scenes = draw_scenes(pack, 40, 64, seed=3)
    assert scenes.pictures.shape == (40, 3, 64, 64)
    assert not (scenes.masks.sum(1) > 1).any()  # a pixel shows one thing
    checked = 0
    for picture, masks, concepts in zip(scenes.pictures, scenes.masks, scenes.concepts.tolist(), strict=True):
        for mask, concept in zip(masks, concepts, strict=True):
            assert bool(mask.any()) <= (concept >= 0)
            if mask.sum() < 20:  # covered by another
                continue
            colour = picture[:, mask].median(dim=1).values
            expected = torch.tensor(COLOURS[concept]) / 255
            assert float((colour - expected).abs().max()) < 0.2, concept
            checked += 1
    assert checked > 60


def test_scenes_hold_two_to_four_different_things_of_coloured_trained_classes(pack: Pack) -> None:
    concepts = draw_scenes(pack, 200, 16, seed=0).concepts
    counts = (concepts >= 0).sum(1)
    assert int(counts.min()) >= 1  # a thing drawn twice is left out once
    assert int(counts.max()) <= MOST
    assert set(concepts.unique().tolist()) == {-1, 0, 1, 2, 3}
    for row in concepts.tolist():
        shown = [concept for concept in row if concept >= 0]
        assert len(set(shown)) == len(shown)


def test_a_seed_repeats_its_scenes(pack: Pack) -> None:
    one, two, other = (draw_scenes(pack, 6, 32, seed) for seed in (1, 1, 2))
    assert torch.equal(one.pictures, two.pictures)
    assert torch.equal(one.masks, two.masks)
    assert not torch.equal(one.pictures, other.pictures)


def test_presence_is_even() -> None:
    counts = sample_presence(3000, Random(0)).sum(1)
    shares = torch.bincount(counts, minlength=MOST + 1) / len(counts)
    assert not shares[:FEWEST].any()
    assert float((shares[FEWEST:] - 1 / 3).abs().max()) < 0.05


def test_later_drawings_cover_earlier_ones() -> None:
    art = torch.ones(50, 4, 4, 8, 8)
    mono = torch.zeros(50, 4, dtype=torch.bool)
    present = torch.tensor([True, True, True, True]).expand(50, 4)
    _, visible = compose_scenes(art, mono, present, 32, Random(0))
    assert float(visible.sum(1).max()) <= 1 + 1e-6
    assert float((visible[:, 3].amax((1, 2)) - 1).abs().max()) < 1e-6  # nothing comes after the last
