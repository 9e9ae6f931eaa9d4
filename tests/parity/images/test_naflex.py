"""NaFlex preprocessing against transformers: exact patches by Pillow, close ones by the fast way."""

from __future__ import annotations

from typing import get_args

import images
import numpy as np
import pytest
from PIL import Image
from transformers import Siglip2ImageProcessorPil

from siglip_serve.checkpoint.model_config import NaflexImageConfig
from siglip_serve.errors import ImageError
from siglip_serve.images.patches import cut_patches, patch_grid
from siglip_serve.images.resize import Resample

SIZES = [
    (375, 500),
    (500, 375),
    (64, 512),
    (512, 64),
    (16, 16),
    (1, 1),
    (3, 200),
    (640, 80),
    (33, 31),
    (1000, 1500),
]


def image_config(most: int = 256, patch: int = 16, resample: Resample = "bilinear") -> NaflexImageConfig:
    half = (0.5,) * 3
    return NaflexImageConfig(256, resample, 1 / 255, half, half, patch_size=patch, max_patches=most)


@pytest.mark.parametrize("resample", get_args(Resample))
@pytest.mark.parametrize(("most", "patch"), [(256, 16), (60, 14), (1024, 16)])
def test_patches(most: int, patch: int, resample: Resample) -> None:
    config = image_config(most, patch, resample)
    processor = Siglip2ImageProcessorPil(
        patch_size=patch,
        max_num_patches=most,
        do_rescale=False,
        do_normalize=False,
        resample=Image.Resampling[resample.upper()],
    )
    for width, height in SIZES:
        if max(width, height) > most * min(width, height):
            continue
        picture = images.photo(width, height, width)
        expected = processor(picture, return_tensors="np")
        assert patch_grid(config, height, width) == tuple(expected["spatial_shapes"][0])
        exact = cut_patches(np.array(picture), config, "pil")
        np.testing.assert_array_equal(exact, expected["pixel_values"][0])
        fast = cut_patches(np.array(picture), config, "fast").astype(int)
        assert np.abs(fast - exact).max() <= 2


def test_grids_of_many_sizes() -> None:
    """The precision of the search shows at large pictures."""
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

    config, random = image_config(), np.random.default_rng(0)
    for height, width in random.integers(1, [[12_000, 12_000]] * 1000).tolist():
        if max(width, height) <= 256 * min(width, height):
            expected = get_image_size_for_max_num_patches(height, width, 16, 256)
            rows, columns = patch_grid(config, height, width)
            assert (16 * rows, 16 * columns) == expected, (height, width)
            assert rows * columns <= 256


def test_refuses_pictures_that_no_grid_has_the_aspect_of() -> None:
    assert patch_grid(image_config(), 2, 512) == (1, 256)
    with pytest.raises(
        ImageError, match="picture of 513x2 pixels is too thin: expected sides of at most 256:1"
    ):
        patch_grid(image_config(), 2, 513)
