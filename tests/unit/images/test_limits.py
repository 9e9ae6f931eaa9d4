"""Limits of image files and base64 text, each on both sides, with the message that names it."""

from __future__ import annotations

import base64
from typing import get_args

import images
import numpy as np
import pytest
from PIL import Image

from siglip_serve.checkpoint.model_config import ImageConfig
from siglip_serve.errors import ImageTooLargeError, InvalidInputError
from siglip_serve.images.formats import ImageLimits, decode_base64, plain_jpeg
from siglip_serve.images.preprocess import Preprocessor
from siglip_serve.images.resize import Mode

CONFIG = ImageConfig(size=8, resample="bicubic", rescale=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3)

every_mode = pytest.mark.parametrize("mode", get_args(Mode))


def picture(kind: str, width: int = 20, height: int = 10) -> bytes:
    """A grey picture as a file."""
    return images.encode(Image.new("RGB", (width, height), (90, 90, 90)), kind)


@every_mode
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_accepts_an_image_of_exactly_the_most_pixels(mode: Mode, kind: str) -> None:
    data = picture(kind)
    assert Preprocessor(CONFIG, mode, ImageLimits(max_pixels=200))(data).shape == (8, 8, 3)
    with pytest.raises(ImageTooLargeError, match="20x10 pixels, at most 199 are allowed"):
        Preprocessor(CONFIG, mode, ImageLimits(max_pixels=199))(data)


@every_mode
def test_accepts_a_file_of_exactly_the_most_bytes(mode: Mode) -> None:
    data = picture("PNG")
    assert Preprocessor(CONFIG, mode, ImageLimits(max_bytes=len(data)))(data).shape == (8, 8, 3)
    with pytest.raises(ImageTooLargeError, match=f"{len(data)} bytes, at most {len(data) - 1} are allowed"):
        Preprocessor(CONFIG, mode, ImageLimits(max_bytes=len(data) - 1))(data)


@every_mode
@pytest.mark.parametrize("size", [(65_535, 1), (1, 65_535)])
def test_refuses_a_side_of_more_than_65535_pixels(mode: Mode, size: tuple[int, int]) -> None:
    assert Preprocessor(CONFIG, mode)(picture("PNG", *size)).shape == (8, 8, 3)
    longer = (size[0] + (size[0] > 1), size[1] + (size[1] > 1))
    with pytest.raises(ImageTooLargeError, match="pixels, at most 65535 a side are allowed"):
        Preprocessor(CONFIG, mode)(picture("PNG", *longer))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 100])
def test_accepts_base64_of_exactly_the_most_bytes(count: int) -> None:
    limits = ImageLimits(max_bytes=count)
    data = bytes(range(count))
    assert decode_base64(base64.b64encode(data), limits) == data
    longer = base64.b64encode(bytes(-(-count // 3) * 3 + 1))
    with pytest.raises(
        ImageTooLargeError, match=f"{len(longer)} characters of base64, at most {count} bytes"
    ):
        decode_base64(longer, limits)


def test_counts_no_whitespace_of_base64_as_characters() -> None:
    assert decode_base64(b" Q U\r\nJ\tD ", ImageLimits(max_bytes=3)) == b"ABC"
    with pytest.raises(InvalidInputError, match=r"^empty, expected base64 text"):
        decode_base64(b" \n", ImageLimits(max_bytes=3))
    with pytest.raises(InvalidInputError, match="not base64: character 2 is b'-'"):
        decode_base64(b"A B-C", ImageLimits())


def test_leaves_jpegs_beyond_the_limits_to_the_other_readers() -> None:
    data = images.encode(images.photo(70, 50), "JPEG")
    assert plain_jpeg(data, ImageLimits(max_bytes=len(data), max_pixels=3500)) is not None
    assert plain_jpeg(data, ImageLimits(max_bytes=len(data) - 1)) is None
    assert plain_jpeg(data, ImageLimits(max_pixels=3499)) is None
    assert plain_jpeg(picture("PNG")) is None


def test_turns_pixels_of_any_aspect_into_a_square() -> None:
    pixels = np.zeros((3, 50, 3), np.uint8)
    assert Preprocessor(CONFIG, "pil").resize(pixels).shape == (8, 8, 3)
