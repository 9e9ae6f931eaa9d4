"""The square that CLIP's preprocessing cuts out of a picture."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from siglip_serve.checkpoint.model_config import ImageConfig
from siglip_serve.images.resize import Mode, fit, shown


def cut(size: int, shortest: int | None) -> ImageConfig:
    return ImageConfig(size, "bicubic", 1 / 255, (0.5,) * 3, (0.5,) * 3, shortest)


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (65_535, 2), (1, 1), (40, 3), (3, 40)])
def test_fits_extreme_shapes(mode: Mode, size: tuple[int, int]) -> None:
    """A line of 60,000 pixels would be resized to 32 x 1,920,000: 180 MB."""
    width, height = size
    rng = np.random.default_rng(0)
    picture = np.broadcast_to(np.array([7, 8, 9], np.uint8), (height, width, 3)).copy()
    assert (fit(picture, cut(32, 32), mode) == (7, 8, 9)).all()
    # Only the pixels in the centre count.
    left, top, right, bottom = (int(side) for side in shown(cut(32, 32), height, width))
    around = rng.integers(0, 256, picture.shape, dtype=np.uint8)
    rows, columns = slice(max(0, top - 9), bottom + 10), slice(max(0, left - 9), right + 10)
    around[rows, columns] = picture[rows, columns]
    assert (fit(around, cut(32, 32), mode) == (7, 8, 9)).all()


@pytest.mark.parametrize(
    ("config", "height", "width", "box"),
    [
        (cut(10, None), 30, 50, (0, 0, 50, 30)),
        (cut(10, 10), 20, 40, (10, 0, 30, 20)),
        (cut(10, 10), 40, 20, (0, 10, 20, 30)),
        (cut(10, 10), 20, 20, (0, 0, 20, 20)),
        (cut(10, 20), 40, 60, (20, 10, 40, 30)),
        # 10 x 15.5 becomes 10 x 15; of the 5 beyond the square, 2 are above it.
        (cut(10, 10), 31, 20, (0, 2 * 31 / 15, 20, 12 * 31 / 15)),
    ],
)
def test_the_part_that_is_shown(
    config: ImageConfig, height: int, width: int, box: tuple[float, float, float, float]
) -> None:
    assert shown(config, height, width) == pytest.approx(box)
