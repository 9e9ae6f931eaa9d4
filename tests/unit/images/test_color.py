"""Colours by ICC profiles: what `color` srgb makes of them, compared with the formulas of the standards."""

from __future__ import annotations

import io
import struct
from typing import Any, get_args

import numpy as np
import pillow_heif
import pytest
from images import HAS_AVIF, encode, photo
from numpy.typing import NDArray
from PIL import Image, ImageCms
from profiles import (
    ADOBE_RGB,
    DISPLAY_P3,
    PRESS,
    PRESS_LAB,
    adobe_rgb,
    display_p3,
    grey_profile,
    lab_in_srgb,
)
from readers import reader

from siglip_serve.checkpoint.model_config import ImageConfig
from siglip_serve.config import Color, load_settings
from siglip_serve.errors import SettingsError
from siglip_serve.images.color import jpeg_profile, to_srgb
from siglip_serve.images.preprocess import Preprocessor
from siglip_serve.images.resize import Mode

CONFIG = ImageConfig(size=8, resample="bicubic", rescale=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3)
every_mode = pytest.mark.parametrize("mode", get_args(Mode))
both_spaces = pytest.mark.parametrize(
    ("profile", "formula"), [(DISPLAY_P3, display_p3), (ADOBE_RGB, adobe_rgb)], ids=["P3", "Adobe RGB"]
)


def decode(data: bytes, mode: Mode = "fast", color: Color = "srgb") -> NDArray[np.int64]:
    """RGB [H, W, 3] of a file."""
    return reader(CONFIG, mode, color=color).decode(data).astype(np.int64)


def close(found: NDArray[np.int64], expected: NDArray[Any], levels: float = 1.6) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= levels


@every_mode
@both_spaces
def test_converts_to_srgb(profile: bytes, formula: Any, mode: Mode) -> None:
    picture = photo(64, 40)
    expected = formula(np.asarray(picture))
    assert np.abs(expected - np.asarray(picture)).mean() > 2  # or this test shows nothing
    close(decode(encode(picture, "PNG", icc_profile=profile), mode), expected)


@every_mode
def test_leaves_samples_as_they_are_stored_by_default(mode: Mode) -> None:
    picture = photo(64, 40)
    with_profile, without = encode(picture, "PNG", icc_profile=ADOBE_RGB), encode(picture, "PNG")
    np.testing.assert_array_equal(decode(with_profile, mode, "stored"), np.asarray(picture))
    np.testing.assert_array_equal(decode(without, mode, "srgb"), np.asarray(picture))
    np.testing.assert_array_equal(Preprocessor(CONFIG, mode).decode(with_profile), np.asarray(picture))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("WebP", {"lossless": True}),
        ("TIFF", {}),
        pytest.param(
            "AVIF", {"quality": 95}, marks=pytest.mark.skipif(not HAS_AVIF, reason="this Pillow has no AVIF")
        ),
        ("HEIF", {"quality": 97, "chroma": 444}),
    ],
)
def test_converts_files_of_every_format_with_profiles(kind: str, options: dict[str, Any]) -> None:
    pillow_heif.register_heif_opener()
    picture = photo(64, 40)
    data = encode(picture, kind, icc_profile=ADOBE_RGB, **options)
    close(decode(data), adobe_rgb(decode(data, "pil", "stored")))


@pytest.mark.parametrize("orientation", [1, 6])
@every_mode
def test_converts_jpegs_and_turns_them_upright(mode: Mode, orientation: int) -> None:
    block = Image.Exif()
    block[0x112] = orientation
    data = encode(photo(64, 40), "JPEG", icc_profile=DISPLAY_P3, exif=block)
    close(decode(data, mode), display_p3(decode(data, "pil", "stored")))


def test_jpegs_without_a_profile_are_decoded_as_fast_as_before() -> None:
    data = encode(photo(64, 40), "JPEG")
    np.testing.assert_array_equal(decode(data, "fast", "srgb"), decode(data, "fast", "stored"))


def test_puts_converted_colours_on_white() -> None:
    picture = photo(64, 40)
    alpha = np.asarray(Image.linear_gradient("L").resize((64, 40)))
    expected = adobe_rgb(np.asarray(picture)) * (alpha / 255)[..., None] + 255 * (1 - alpha / 255)[..., None]
    picture.putalpha(Image.fromarray(alpha))
    close(decode(encode(picture, "PNG", icc_profile=ADOBE_RGB)), expected, levels=2.6)


def test_converts_palettes_with_and_without_transparency() -> None:
    palette = photo(64, 40).quantize(16)
    expected = adobe_rgb(np.asarray(palette.convert("RGB")))
    close(decode(encode(palette, "PNG", icc_profile=ADOBE_RGB)), expected)
    data = encode(palette, "PNG", icc_profile=ADOBE_RGB, transparency=3)
    close(decode(data), np.where(np.asarray(palette)[..., None] == 3, 255, expected))


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_converts_grey(mode: str) -> None:
    """The samples are light itself, so the middle of the scale is bright in sRGB."""
    picture = photo(64, 40).convert("L").convert(mode)
    data = encode(picture, "PNG", icc_profile=grey_profile(1.0))
    light = np.asarray(picture.convert("L")) / 255
    expected = 255 * np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    close(decode(data), np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_converts_inks(kind: str) -> None:
    inks = {0: (0, 0, 0, 0), 8: (255, 0, 0, 0), 4: (0, 255, 0, 0), 2: (0, 0, 255, 0)}
    for corner, samples in inks.items():
        data = encode(Image.new("CMYK", (16, 16), samples), kind, icc_profile=PRESS)
        close(decode(data)[8, 8], lab_in_srgb(PRESS_LAB[corner]), levels=4)  # of the 8 bits of Lab
    plain = decode(encode(Image.new("CMYK", (16, 16), inks[8]), kind, icc_profile=PRESS), color="stored")
    assert plain[8, 8].tolist() == [0, 255, 255]


@every_mode
@pytest.mark.parametrize(
    "profile",
    [
        b"broken",
        ADOBE_RGB[:200],
        ADOBE_RGB[:128] + bytes(len(ADOBE_RGB) - 128),
        grey_profile(1.0),
        PRESS,
        ADOBE_RGB + bytes(2**22),
    ],
    ids=["text", "cut", "empty", "of grey", "of inks", "huge"],
)
def test_ignores_profiles_that_do_not_help(profile: bytes, mode: Mode) -> None:
    for kind in ("TIFF",) if len(profile) > 2**20 else ("PNG", "JPEG"):
        picture = photo(64, 40)
        with_profile = encode(picture, kind, icc_profile=profile)
        np.testing.assert_array_equal(
            decode(with_profile, mode), decode(encode(picture, kind), "pil", "stored")
        )


def test_ignores_profiles_of_srgb_itself() -> None:
    picture = photo(64, 40)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert to_srgb(picture, profile) is picture


def test_leaves_deep_grey_alone() -> None:
    values = np.linspace(0, 65535, 64 * 40).reshape(40, 64).astype(np.uint16)
    data = encode(Image.fromarray(values), "PNG", icc_profile=grey_profile(1.0))
    np.testing.assert_array_equal(decode(data), decode(data, color="stored"))


def test_reads_profiles_of_several_segments() -> None:
    profile = bytes(range(256)) * 600
    data = encode(photo(16, 16), "JPEG", icc_profile=profile)
    assert jpeg_profile(data) == profile
    second = data.index(b"ICC_PROFILE\0\x02")
    assert jpeg_profile(data[: second + 12] + b"\x01" + data[second + 13 :]) == b""  # the first one twice
    for size in range(0, 400):
        jpeg_profile(data[:size])


def test_reads_no_profile_behind_the_start_of_the_image_data() -> None:
    data = encode(photo(16, 16), "JPEG")
    assert jpeg_profile(data) == b""
    segment = b"ICC_PROFILE\0\x01\x01" + ADOBE_RGB
    late = data[:-2] + b"\xff\xe2" + struct.pack(">H", len(segment) + 2) + segment + data[-2:]
    assert jpeg_profile(late) == b""
    with Image.open(io.BytesIO(late)) as image:
        assert "icc_profile" not in image.info


def test_gpu_and_srgb_exclude_each_other() -> None:
    given = {"SIGLIP_SERVE_CHECKPOINT": "a", "SIGLIP_SERVE_COLOR": "srgb"}
    assert load_settings(given).color == "srgb"
    with pytest.raises(SettingsError, match="color srgb: preprocess gpu applies no ICC profiles"):
        load_settings({**given, "SIGLIP_SERVE_PREPROCESS": "gpu"})
