"""Our pixels against transformers' PIL processor, on files of every kind that both of us read."""

from __future__ import annotations

import functools
import io
import warnings
from typing import Literal

import images
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from siglip_serve.checkpoint.model_config import ImageConfig
from siglip_serve.images.preprocess import Preprocessor
from siglip_serve.images.resize import Mode

Resample = Literal["bilinear", "bicubic"]
CONFIGS: list[tuple[int, Resample]] = [
    (224, "bicubic"),
    (384, "bicubic"),
    (64, "bicubic"),
    (224, "bilinear"),
    (384, "bilinear"),
    (64, "bilinear"),
]
# Where the two sizes are in a ratio such as 7:2, one bilinear result in twenty lies exactly between two
# levels. Pillow and torch quantise their weights differently, so that such ties go either way.
MEAN = {"bicubic": 0.02, "bilinear": 0.08}
FILES = {**images.image_files(), **images.oriented_files()}
ASPECTS = [
    (375, 500),
    (500, 375),
    (300, 200),
    (200, 300),
    (64, 128),
    (63, 65),
    (224, 500),
    (9, 400),
    (400, 9),
]


def reference(image: Image.Image, size: int, resample: Resample) -> NDArray[np.uint8]:
    processor = SiglipImageProcessorPil(
        size={"height": size, "width": size},
        resample=Image.Resampling[resample.upper()],
        do_rescale=False,
        do_normalize=False,
    )
    planes = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
    assert planes.dtype == np.uint8
    return planes.transpose(1, 2, 0)


@functools.cache
def processor(size: int, resample: Resample, mode: Mode) -> Preprocessor:
    config = ImageConfig(size=size, resample=resample, rescale=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3)
    return Preprocessor(config, mode)


def check(data: bytes, image: Image.Image, size: int, resample: Resample, mean: float | None = None) -> None:
    expected = reference(image, size, resample)
    np.testing.assert_array_equal(processor(size, resample, "pil")(data), expected)
    fast = processor(size, resample, "fast")(data)
    difference = np.abs(fast.astype(int) - expected)
    assert difference.max() <= 2
    assert difference.mean() <= (MEAN[resample] if mean is None else mean)


def upright(data: bytes) -> Image.Image:
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
        return ImageOps.exif_transpose(image)


@pytest.mark.parametrize("name", FILES)
def test_pixels_of_every_kind_of_file_equal_transformers(name: str) -> None:
    image = upright(FILES[name])
    for size, resample in CONFIGS:
        check(FILES[name], image, size, resample)


@pytest.mark.parametrize("name", images.sixteen_bit_files())
def test_sixteen_bit_grey_is_its_eight_bit_image(name: str) -> None:
    data, grey = images.sixteen_bit_files()[name]
    for size, resample in CONFIGS:
        check(data, Image.fromarray(grey), size, resample)


@pytest.mark.parametrize(("width", "height"), ASPECTS)
def test_order_of_passes_on_saturated_edges(width: int, height: int) -> None:
    # Random black and white makes every pass clip: the wrong order is off by twenty levels, 2 on average.
    values = np.random.default_rng(width).integers(0, 2, (height, width, 3)).astype(np.uint8) * 255
    image = Image.fromarray(values)
    for size, resample in CONFIGS:
        check(images.encode(image, "PNG"), image, size, resample, mean=0.1)


@pytest.mark.parametrize("seed", range(8))
def test_pixels_of_random_jpegs_are_close_to_transformers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    width, height = (int(value) for value in rng.integers(2, 700, 2))
    options = {"quality": int(rng.integers(20, 100)), "subsampling": int(rng.integers(0, 3))}
    data = images.encode(
        images.photo(width, height, seed), "JPEG", progressive=bool(rng.integers(0, 2)), **options
    )
    for size, resample in CONFIGS:
        check(data, upright(data), size, resample)
