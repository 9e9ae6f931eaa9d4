"""Which part of a picture becomes the square, by value."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from siglip_serve.checkpoint.model_config import ImageConfig
from siglip_serve.images.resize import LONGEST, cut_offsets, fit, shown, target_size

STRETCHED = ImageConfig(size=32, resample="bicubic", rescale=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3)
CUT = replace(STRETCHED, shortest_edge=40)


@pytest.mark.parametrize(
    ("height", "width", "size", "offsets"),
    [
        (100, 100, (40, 40), (4, 4)),
        (100, 201, (40, 80), (4, 24)),
        (201, 100, (80, 40), (24, 4)),
        (100, 199, (40, 79), (4, 23)),
        (3, 2, (60, 40), (14, 4)),
    ],
)
def test_resizes_the_shortest_side_and_cuts_the_centre(
    height: int, width: int, size: tuple[int, int], offsets: tuple[int, int]
) -> None:
    assert target_size(CUT, height, width) == size
    assert cut_offsets(CUT, size) == offsets
    assert target_size(STRETCHED, height, width) == (32, 32)
    assert cut_offsets(STRETCHED, (32, 32)) == (0, 0)


def test_rounds_an_odd_remainder_down() -> None:
    assert cut_offsets(CUT, (33, 40)) == (0, 4)
    assert cut_offsets(CUT, (35, 41)) == (1, 4)


def test_says_what_is_shown_as_left_top_right_bottom() -> None:
    assert shown(CUT, 100, 200) == pytest.approx((60, 10, 140, 90))
    assert shown(CUT, 200, 100) == pytest.approx((10, 60, 90, 140))
    assert shown(STRETCHED, 100, 200) == (0, 0, 200, 100)


@pytest.mark.parametrize("mode", ["fast", "pil"])
@pytest.mark.parametrize("long", [LONGEST * 40, LONGEST * 40 + 40])
def test_shows_the_centre_of_long_pictures(mode: str, long: int) -> None:
    pixels = np.zeros((40, long, 3), np.uint8)
    pixels[:, long // 2 :] = 200
    for picture, axis in ((pixels, 1), (pixels.swapaxes(0, 1).copy(), 0)):
        square = fit(picture, CUT, mode)  # type: ignore[arg-type]
        halves = np.split(square.astype(int), 2, axis)
        assert halves[0].mean() < 15
        assert halves[1].mean() > 185
