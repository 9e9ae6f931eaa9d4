"""CLIP's preprocessing against transformers: exact pixels by Pillow, close ones by the fast way."""

from __future__ import annotations

import io
import warnings
from typing import get_args

import images
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps
from readers import reader
from transformers import CLIPImageProcessorPil

from siglip_serve.checkpoint.model_config import ImageConfig
from siglip_serve.images.resize import Mode, Resample, fit

# Side of the square, and what the shortest side is resized to before it is cut out.
SQUARES = [(224, 224), (336, 336), (64, 64), (224, 256), (63, 65)]
ASPECTS = [
    (375, 500),
    (500, 375),
    (224, 225),
    (64, 128),
    (63, 65),
    (65, 500),
    (500, 65),
    (17, 272),
    (1000, 100),
    (1, 1),
    (1, 5),
    (7, 3),
]
EXTREMES = [(20, 330), (330, 20), (40, 1200), (1500, 50), (300, 5000), (1, 40), (40, 1)]
FILES = {**images.image_files(), **images.oriented_files()}
RESAMPLES: tuple[Resample, ...] = get_args(Resample)


def image_config(size: int, shortest: int, resample: Resample = "bicubic") -> ImageConfig:
    return ImageConfig(size, resample, 1 / 255, (0.5,) * 3, (0.5,) * 3, shortest)


def reference_pixels(image: Image.Image, config: ImageConfig) -> NDArray[np.uint8]:
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": config.shortest_edge},
        crop_size={"height": config.size, "width": config.size},
        resample=Image.Resampling[config.resample.upper()],
        do_rescale=False,
        do_normalize=False,
    )
    planes = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
    assert planes.dtype == np.uint8
    return planes.transpose(1, 2, 0)


def pictures(width: int, height: int) -> list[Image.Image]:
    """A photo, and random black and white: that clips in every pass, so that a wrong order of them shows."""
    noise = np.random.default_rng(width).integers(0, 2, (height, width, 3)).astype(np.uint8) * 255
    return [images.photo(width, height, width), Image.fromarray(noise)]


@pytest.mark.parametrize("resample", RESAMPLES)
@pytest.mark.parametrize(("width", "height"), ASPECTS)
def test_pixels(width: int, height: int, resample: Resample) -> None:
    for image in pictures(width, height):
        for size, shortest in SQUARES:
            config = image_config(size, shortest, resample)
            expected = reference_pixels(image, config)
            np.testing.assert_array_equal(fit(np.array(image), config, "pil"), expected)
            difference = np.abs(fit(np.array(image), config, "fast").astype(int) - expected)
            assert difference.max() <= 2
            assert difference.mean() <= 0.1


@pytest.mark.parametrize(("width", "height"), EXTREMES)
def test_pixels_of_long_pictures(width: int, height: int) -> None:
    """Parts that are cut off before the resize do not count."""
    for image in pictures(width, height):
        for size, shortest in SQUARES:
            config = image_config(size, shortest)
            expected = reference_pixels(image, config).astype(int)
            for mode in get_args(Mode):
                assert np.abs(fit(np.array(image), config, mode) - expected).max() <= 2


@pytest.mark.parametrize("name", FILES)
def test_pixels_of_files(name: str) -> None:
    """Upright and without alpha before they are cut."""
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(FILES[name])) as image:
        config = image_config(64, 72)
        expected = reference_pixels(ImageOps.exif_transpose(image), config)
        long = max(image.size) > 16 * min(image.size)
    exact = reader(config, "pil")(FILES[name])
    assert np.abs(exact.astype(int) - expected).max() <= (1 if long else 0)
    assert np.abs(reader(config, "fast")(FILES[name]).astype(int) - expected).max() <= 2
