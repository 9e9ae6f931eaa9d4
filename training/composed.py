"""Scenes of several drawings, with exact masks of the visible part of each.

Shapes: N scenes, K places for objects in each, C the canvas's side in pixels. Everything is seeded.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.pack import Pack, premultiplied
from training.scenes import (
    Random,
    art_brightness,
    backgrounds,
    ink_colour,
    inked,
    sample_art,
    with_brightness,
)

__all__ = ["FEWEST", "MOST", "Scenes", "compose_scenes", "draw_scenes", "sample_presence"]

FEWEST, MOST = 2, 4  # objects of a scene
_SCALES = (0.3, 0.52)  # of an object, in sides of the canvas
_LAYOUTS = 64
_GROUNDS = 4
_BATCH = 256


@dataclass(frozen=True)
class Scenes:
    """Pictures of several objects.

    Attributes:
        pictures: float32 [N, 3, C, C], RGB in 0..1.
        masks: bool [N, K, C, C], the pixels in which an object is seen; none where there is no object.
        concepts: int64 [N, K], positions in `Pack.concepts`, -1 where there is no object.
    """

    pictures: Tensor
    masks: Tensor
    concepts: Tensor


def sample_presence(count: int, random: Random) -> Tensor:
    """bool [count, MOST]: True where a place holds an object, FEWEST to MOST per scene, evenly."""
    span = MOST - FEWEST + 1
    objects = FEWEST + (random.uniform(count) * span).long().clamp(max=span - 1)
    return torch.arange(MOST, device=random.device) < objects[:, None]


def compose_scenes(
    art: Tensor, mono: Tensor, present: Tensor, canvas: int, random: Random, rotation: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Drawings at random places of one ground. Later ones cover earlier ones, which seldom happens.

    Args:
        art: premultiplied RGBA [N, K, 4, S, S].
        mono: bool [N, K]; these drawings get a random ink.
        present: bool [N, K].
        canvas: C, pixels per side.
        random: the source of every choice.
        rotation: largest angle in radians either way.

    Returns:
        RGB [N, 3, C, C] in 0..1, and alpha [N, K, C, C]: how much of each pixel is the object's.
    """
    count, places = present.shape
    brightness = art_brightness(art.flatten(0, 1)).view(count, places)
    ground, mean = _ground(brightness, mono, present, random)
    picture = backgrounds(mean, canvas, random)
    theta = _placements(present, random, rotation)
    visible = torch.zeros(count, places, canvas, canvas, device=picture.device, dtype=picture.dtype)
    for place in range(places):
        drawn = sample_art(art[:, place] * present[:, place, None, None, None], theta[:, place], canvas)
        drawn = inked(drawn, mono[:, place], ink_colour(ground, random))
        alpha = drawn[:, 3:]
        picture = drawn[:, :3] + picture * (1 - alpha)
        visible *= 1 - alpha
        visible[:, place] = alpha[:, 0]
    tint = 1 + random.uniform(count, 3, low=-0.07, high=0.07) + random.uniform(count, 1, low=-0.08, high=0.05)
    return (picture * tint[:, :, None, None]).clamp(0, 1), visible


def _ground(brightness: Tensor, mono: Tensor, present: Tensor, random: Random) -> tuple[Tensor, Tensor]:
    """Brightness [N] and mean colour [N, 3] of grounds on which no coloured drawing vanishes."""
    count = len(present)
    candidates = random.uniform(count, _GROUNDS, low=0.05, high=1.0)
    distance = (candidates[:, :, None] - brightness[:, None]).abs()
    distance = distance.masked_fill((mono | ~present)[:, None], 1.0).amin(2)  # [N, candidates]
    ground = candidates.gather(1, distance.argmax(1, keepdim=True))[:, 0]
    saturation = random.uniform(count, 1) * random.chance(0.75, count)[:, None]
    return ground, with_brightness(0.5 + (random.uniform(count, 3) - 0.5) * saturation, ground)


def _placements(present: Tensor, random: Random, rotation: float) -> Tensor:
    """[N, K, 2, 3] as `affine_grid` takes it: of some random layouts the one with the least overlap."""
    count, places = present.shape
    scale = random.uniform(count, 1, places, low=_SCALES[0], high=_SCALES[1])
    centre = random.uniform(count, _LAYOUTS, places, 2, low=-1, high=1) * (1 - scale[..., None])
    reach = scale[..., None] + scale[..., None, :]  # [N, 1, K, K]
    gaps = (centre[:, :, :, None] - centre[:, :, None]).abs()  # [N, layouts, K, K, 2]
    overlap = (reach[..., None] - gaps).clamp(min=0).prod(-1)
    pairs = torch.ones(places, places, device=present.device).triu(1).bool()
    both = (present[:, :, None] & present[:, None])[:, None] & pairs
    best = (overlap * both).sum((2, 3)).argmin(1)  # [N]
    shift = centre[torch.arange(count, device=best.device), best]  # [N, K, 2]
    angle = random.uniform(count, places, low=-1, high=1) * rotation
    cos, sin = torch.cos(angle) / scale[:, 0], torch.sin(angle) / scale[:, 0]
    linear = torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))
    return torch.cat([linear, -(linear @ shift[..., None])], -1)


def draw_scenes(pack: Pack, count: int, canvas: int, seed: int, role: str = "held-out") -> Scenes:
    """Scenes of the benchmark's classes, drawn in coloured styles of a role, in trained classes.

    Styles in one ink are left out: of an outline only the line is drawn, which is not where the thing is.

    Args:
        pack: the art.
        count: N.
        canvas: C, pixels per side.
        seed: the same one gives the same scenes.
        role: of the styles, as in `Pack.styles`.
    """
    random = Random(seed)
    drawings = pack.of_role(role)
    drawings = drawings[~pack.mono(drawings).numpy()]
    named = np.setdiff1d(pack.classes, pack.never_trained)
    drawings = drawings[np.isin(pack.concept[drawings], named)]
    present = sample_presence(count, random)
    chosen = torch.randint(len(drawings), (count, MOST), generator=random.generator).numpy()
    rows = drawings[chosen]
    concepts = torch.from_numpy(pack.concept[rows]).masked_fill(~present, -1)
    present = present & ~_repeated(concepts)
    concepts = concepts.masked_fill(~present, -1)
    pictures, masks = [], []
    for start in range(0, count, _BATCH):
        part = rows[start : start + _BATCH]
        art = premultiplied(pack.rgba(part.reshape(-1))).unflatten(0, part.shape)
        mono = torch.zeros(part.shape, dtype=torch.bool)
        picture, visible = compose_scenes(art, mono, present[start : start + _BATCH], canvas, random)
        pictures.append(picture)
        masks.append(visible > 0.5)
    return Scenes(torch.cat(pictures), torch.cat(masks), concepts)


def _repeated(concepts: Tensor) -> Tensor:
    """bool [N, K]: a place before holds the same."""
    same = concepts[:, :, None] == concepts[:, None]
    return same.tril(-1).any(2)
