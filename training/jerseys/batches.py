"""Batches to train an encoder on: many kits, each on several players who look as different as they can."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from training.jerseys.camera import Conditions, jpeg, sample_cameras, sense
from training.jerseys.colours import integers
from training.jerseys.drawing import Wardrobe
from training.jerseys.figure import sample_players
from training.jerseys.kits import TRAINING, hard_kits
from training.jerseys.stage import FULL, Studio, render, sample_views
from training.scenes import Random

__all__ = ["REGION", "WIDE", "training_batch"]

# Top, bottom, left and right of the shirt's region in a crop.
REGION = (0.2, 0.5, 0.25, 0.75)
MARGIN = (0.06, 0.1)  # drawn around it, for blur and JPEG
WIDE = Conditions(
    heights=(26, 140), gain=(0.5, 1.2), shadow=(0.3, 0.65), shaded=0.35, crossed=0.15, warmth=0.15, grade=1.3,
    noise=(0.0, 0.035), blur=1.4, quality=(35, 96), subsampled=0.85, jitter=0.04, overlap=0.15, clutter=0.3,
)  # fmt: skip
GROUPS = 8  # sizes of crops a batch
ASPECTS = (0.34, 0.65)


def _finish(pictures: Tensor, height: int, aspect: float, conditions: Conditions, random: Random) -> Tensor:
    """Bring display values [n, 3, H, W] to the pixels of crops' size, with noise and JPEG."""
    small = sense(pictures, (height, max(round(height * aspect), 4)), conditions, random)
    count = len(small)
    low, high = conditions.quality
    quality = random.uniform(count, low=low, high=high + 1).floor()
    return jpeg(small, quality, random.chance(conditions.subsampled, count))


def _cut(pixels: Tensor, drawn: tuple[float, ...], wanted: tuple[float, ...]) -> Tensor:
    """The wanted part of boxes, of which `drawn` is here."""
    edges = []
    for axis in (0, 1):
        low, high = drawn[2 * axis : 2 * axis + 2]
        extent = pixels.shape[2 + axis]
        start, end = (round((wanted[2 * axis + side] - low) / (high - low) * extent) for side in (0, 1))
        edges.append(slice(start, max(end, start + 1)))
    return pixels[:, :, edges[0], edges[1]]


def training_batch(
    kits: int, views: int, random: Random, size: int, conditions: Conditions = WIDE, region: bool = True
) -> tuple[Tensor, Tensor]:
    """Kits of the training's patterns, each worn by several players, as the server would cut and scale them.

    Among the kits are groups that share all colours, and groups that share a pattern and nearly the colours.

    Args:
        kits: how many; groups of four are related.
        views: crops a kit, each of another player in another pose, light, camera and size.
        random: the source of every choice; pictures are made on its device.
        size: pixels per side of the output.
        conditions: how far views differ.
        region: only the shirt's region of each crop; else whole crops.

    Returns:
        Pixels [kits * views, 3, size, size] in 0..1, and each one's kit, int64 [kits * views], ascending.
    """
    # Hundreds of operations on a few numbers each are done sooner by the host.
    host = Random(int(integers(1, 0, 1 << 24, random)))
    wardrobe = Wardrobe(hard_kits(kits, host, TRAINING, similar=(12, 32)).to(random.device))
    kit = torch.arange(kits, device=random.device).repeat_interleave(views)
    count = len(kit)
    strength = random.uniform(count) ** 1.5 * conditions.grade
    studio = Studio(wardrobe, sample_players(kit, random), sample_cameras(count, strength, random))
    everyone = torch.arange(count, device=random.device)
    down, across = MARGIN
    top, bottom, left, right = REGION
    window = (top - down, bottom + down, left - across, right + across) if region else FULL
    canvas = (64, 56) if region else (144, 72)
    pictures = render(
        studio, sample_views(everyone, conditions, random), conditions, random, canvas, window
    ).pictures

    shares = host.uniform(GROUPS, 2).tolist()
    order = random.uniform(count).argsort()
    low, high = (math.log(height) for height in conditions.heights)
    pixels = torch.empty(count, 3, size, size, device=random.device, dtype=random.dtype)
    for rows, (tall, wide) in zip(order.chunk(GROUPS), shares, strict=False):
        height = math.exp(low + (high - low) * tall) * (window[1] - window[0])
        aspect = (ASPECTS[0] + (ASPECTS[1] - ASPECTS[0]) * wide) * (window[3] - window[2])
        crops = _finish(
            pictures[rows], max(round(height), 6), aspect / (window[1] - window[0]), conditions, random
        )
        cut = _cut(crops, window, REGION) if region else crops
        scaled = F.interpolate(cut, (size, size), mode="bicubic", antialias=True)
        pixels[rows] = scaled.clamp(0, 1).to(random.dtype)
    return pixels, kit
