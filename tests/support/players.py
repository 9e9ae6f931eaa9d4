"""Drawn pictures of players: a frame of two teams side by side, and its crops."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

__all__ = ["BOXES", "COUNT", "CROPS", "FRAME", "HEIGHT", "TEAMS", "TRACKS", "WIDTH", "player", "purity"]

KITS = ((200, 30, 40), (235, 235, 245))
COUNT = 40
TEAMS = np.arange(COUNT) % 2
TRACKS = 2 * (np.arange(COUNT) // 4) + TEAMS
WIDTH, HEIGHT = 40, 90


def player(team: int, seed: int) -> Image.Image:
    """Draw something like a player on grass, with noise."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (WIDTH, HEIGHT), (58, 122 + int(rng.integers(16)), 62))
    draw = ImageDraw.Draw(image)
    draw.ellipse((14, 0, 26, 16), fill=(205, 165, 135))
    for part in ((8, 16, 32, 48), (12, 64, 18, 88), (22, 64, 28, 88)):
        draw.rectangle(part, fill=KITS[team])
    draw.rectangle((11, 48, 29, 64), fill=(20, 20, 30))
    noisy = np.asarray(image) + rng.normal(0, 8, (HEIGHT, WIDTH, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


CROPS = [player(int(team), seed) for seed, team in enumerate(TEAMS)]
FRAME = np.concatenate([np.asarray(crop) for crop in CROPS], axis=1)
BOXES = np.array([(WIDTH * row, 0, WIDTH * (row + 1), HEIGHT) for row in range(COUNT)], np.float32)


def purity(labels: NDArray[np.int32]) -> float:
    """Return the fraction of crops with the right label, whichever team has which number."""
    agree = float((labels == TEAMS).mean())
    return max(agree, 1 - agree)
