"""Large JPEGs at a fraction of their size, against means over the pixels of the whole picture, and Pillow."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import simplejpeg
from images import encode, exif, image_files, mutations, oriented_files, photo
from numpy.typing import NDArray
from PIL import Image, ImageCms
from readers import reader

from siglip_serve.checkpoint.model_config import ImageConfig, NaflexImageConfig
from siglip_serve.errors import ImageTooLargeError, InvalidInputError, SettingsError
from siglip_serve.images import scaled as package
from siglip_serve.images.formats import ImageLimits
from siglip_serve.images.jpeg import plain_scan
from siglip_serve.images.preprocess import Preprocessor
from siglip_serve.images.scaled import check_numba
from siglip_serve.images.scaled.reader import Scaled, read_scaled, scaled_side

HOW: dict[str, Any] = {"rescale": 1 / 255, "mean": (0.5,) * 3, "std": (0.5,) * 3}
CONFIG = ImageConfig(size=32, resample="bicubic", **HOW)
CLIP = ImageConfig(size=24, resample="bicubic", **HOW, shortest_edge=32)
NAFLEX = NaflexImageConfig(size=32, resample="bilinear", **HOW, patch_size=8, max_patches=16)
SAMPLINGS = ["4:4:4", "4:2:2", "4:2:0"]
SIDES = [1, 2, 4]


def jpeg(width: int, height: int, seed: int = 0, **options: Any) -> bytes:
    return encode(photo(width, height, seed), "JPEG", **{"quality": 90, "subsampling": "4:2:0", **options})


def read(data: bytes, side: int) -> Scaled | None:
    scan = plain_scan(data)
    assert scan is not None
    return read_scaled(data, scan, side)


def distance(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> tuple[int, float]:
    assert first.shape == second.shape
    levels = np.abs(first.astype(int) - second)
    return int(levels.max()), float(levels.mean())


def sharpened_means(data: bytes, step: int) -> NDArray[np.float64]:
    """Means over step x step pixels, less a 24th of their second differences."""
    whole = simplejpeg.decode_jpeg(data, "RGB").astype(float)
    height, width = (side // step * step for side in whole.shape[:2])
    means = whole[:height, :width].reshape(height // step, step, width // step, step, 3).mean((1, 3))
    padded = np.pad(means, [(1, 1), (1, 1), (0, 0)], mode="edge")
    around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    return np.clip(means + (4 * means - around) / 24, 0, 255)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_samples_are_sharpened_means_of_the_pixels(sampling: str, side: int) -> None:
    # A soft picture, in which the lowest frequencies of a block are all.
    picture = photo(40, 30).resize((328, 248), Image.Resampling.BICUBIC)
    data = encode(picture, "JPEG", quality=97, subsampling=sampling)
    scaled = read(data, side)
    assert scaled is not None
    assert scaled.extent == (31.0 * side, 41.0 * side)
    levels = np.abs(scaled.pixels - sharpened_means(data, 8 // side))[2:-2, 2:-2]
    # At half the picture's size, colour of half the size is not reduced any more.
    assert levels.mean() < (2 if sampling == "4:4:4" or side < 4 else 4)


@pytest.mark.parametrize("side", SIDES)
def test_grey_is_read_as_three_equal_channels(side: int) -> None:
    data = encode(photo(160, 120).convert("L"), "JPEG", quality=90)
    scaled = read(data, side)
    assert scaled is not None
    assert (scaled.pixels == scaled.pixels[..., :1]).all()
    assert np.abs(scaled.pixels - sharpened_means(data, 8 // side))[1:-1, 1:-1].mean() < 3


def test_a_line_of_one_block_becomes_stronger_by_a_24th_of_its_second_difference() -> None:
    grey = np.full((40, 56), 64, np.uint8)
    grey[:, 24:32] = 160
    scaled = read(encode(Image.fromarray(grey), "JPEG", quality=100), 1)
    assert scaled is not None
    assert np.abs(scaled.pixels[2, :, 0] - np.array([64.0, 64, 60, 168, 60, 64, 64])).max() <= 1


def test_an_eighth_holds_the_means_of_the_blocks_exactly() -> None:
    # A flat picture of blocks: libjpeg's own eighth is their means, and there is nothing to sharpen.
    grey = np.repeat(np.arange(0, 256, 5, dtype=np.uint8), 8)[None].repeat(64, 0)
    data = encode(Image.fromarray(grey), "JPEG", quality=100)
    scaled, libjpeg = read(data, 1), simplejpeg.decode_jpeg(data, "RGB", min_height=1, min_width=1)
    assert scaled is not None
    np.testing.assert_array_equal(scaled.pixels, libjpeg)


@pytest.mark.parametrize(("width", "height"), [(161, 121), (168, 128), (175, 135), (16, 300), (300, 17)])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_extent_of_sides_that_are_no_multiple_of_a_block(sampling: str, width: int, height: int) -> None:
    scaled = read(jpeg(width, height, subsampling=sampling), 2)
    assert scaled is not None
    assert scaled.extent == (height / 4, width / 4)
    assert scaled.pixels.shape == (-(-height // 4), -(-width // 4), 3)


def test_padding_beyond_the_edge_does_not_shift_the_picture() -> None:
    # 7 of the last 8 columns are padding. Taken for the picture's, they would move its edge by half a pixel.
    picture = Image.new("RGB", (1017, 1017), "white")
    picture.paste((0, 0, 0), (900, 0, 1017, 1017))
    data = encode(picture, "JPEG", quality=95)
    most, _ = distance(reader(CONFIG, "scaled")(data), reader(CONFIG, "pil")(data))
    assert most <= 6


@pytest.mark.parametrize("options", [{"restart_marker_rows": 1}, {"restart_marker_blocks": 3}])
@pytest.mark.parametrize("side", SIDES)
def test_restart_markers_change_nothing(side: int, options: dict[str, int]) -> None:
    plain, marked = read(jpeg(330, 250), side), read(jpeg(330, 250, **options), side)
    assert plain is not None
    assert marked is not None
    np.testing.assert_array_equal(plain.pixels, marked.pixels)


@pytest.mark.parametrize("quality", [5, 50, 95])
@pytest.mark.parametrize("optimize", [False, True])
def test_reads_codes_of_all_lengths(quality: int, optimize: bool) -> None:
    noise = np.random.default_rng(quality).normal(128, 70, (160, 200, 3))
    picture = Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))
    data = encode(picture, "JPEG", quality=quality, optimize=optimize, subsampling="4:4:4")
    for side in SIDES:
        scaled = read(data, side)
        assert scaled is not None
        mean = np.abs(scaled.pixels - sharpened_means(data, 8 // side)).mean()
        assert mean < (1.5 if side == 1 else 20)  # noise has most of its power in what is left out


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_pictures_become_upright(orientation: int) -> None:
    data = jpeg(483, 363, exif=exif(orientation))
    scaled, exact = reader(CONFIG, "scaled").read(data), reader(CONFIG, "pil").read(data)
    assert scaled.size == exact.size == ((363, 483) if orientation < 5 else (483, 363))
    most, mean = distance(scaled.pixels, exact.pixels)
    assert 0 < mean < 1.5
    assert most < 24


@pytest.mark.parametrize("config", [CLIP, NAFLEX], ids=["clip", "naflex"])
@pytest.mark.parametrize(("width", "height"), [(481, 365), (365, 481), (1000, 401)])
def test_checkpoints_that_keep_the_aspect_ratio(config: ImageConfig, width: int, height: int) -> None:
    for data in (jpeg(width, height), jpeg(width, height, exif=exif(6))):
        scaled, exact = reader(config, "scaled").read(data), reader(config, "pil").read(data)
        assert scaled.size == exact.size
        _, mean = distance(scaled.pixels, exact.pixels)
        assert 0 < mean < 2


def test_size_is_that_of_the_file() -> None:
    data = jpeg(700, 500)
    assert reader(CONFIG, "scaled").read(data).size == (500, 700)
    assert reader(CONFIG, "scaled").decode(data).shape == (500, 700, 3)


@pytest.mark.parametrize(
    ("size", "side"),
    [
        ((384, 384), 1),
        ((384, 383), 2),
        ((308, 5000), 1),
        ((307, 5000), 2),
        ((154, 5000), 2),
        ((153, 5000), 4),
        ((96, 96), 4),
        ((95, 96), None),
    ],
)
def test_the_smallest_scale_leaves_pixels_to_spare(size: tuple[int, int], side: int | None) -> None:
    assert scaled_side(size, (32, 32)) == side


def others() -> Iterator[tuple[str, bytes]]:
    yield from ((name, data) for name, data in image_files().items() if not name.startswith(("jpeg", "mpo")))
    large = photo(500, 400)
    yield "progressive", encode(large, "JPEG", progressive=True)
    yield "CMYK", encode(large.convert("CMYK"), "JPEG")
    yield "PNG", encode(large, "PNG")
    yield "RGB", encode(large, "JPEG", keep_rgb=True)
    yield "small", jpeg(94, 94)
    yield "long", jpeg(1700, 100)


@pytest.mark.parametrize(
    ("name", "data"), list(others()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_everything_else_is_read_as_in_fast(name: str, data: bytes) -> None:
    config = CLIP if name == "long" else ImageConfig(size=64, resample="bicubic", **HOW)
    np.testing.assert_array_equal(reader(config, "scaled")(data), reader(config, "fast")(data))


def test_a_profile_is_applied_to_the_whole_picture() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    data = jpeg(500, 400, icc_profile=profile)
    scaled = Preprocessor(CONFIG, "scaled", color="srgb")(data)
    np.testing.assert_array_equal(scaled, Preprocessor(CONFIG, "fast", color="srgb")(data))
    assert distance(reader(CONFIG, "scaled")(data), scaled)[1] > 0


def test_what_follows_the_picture_is_ignored() -> None:
    data = jpeg(400, 300)
    expected = read(data, 2)
    for rest in (b"\0", b"MPF" + data, b"\xff\xd9"):
        found = read(data + rest, 2)
        assert expected is not None
        assert found is not None
        np.testing.assert_array_equal(found.pixels, expected.pixels)


def damages(data: bytes) -> Iterator[bytes]:
    """Files that end early, or whose image data are too long, too short or of another order."""
    start = data.rindex(b"\xff\xda") + 14
    end = data.rindex(b"\xff\xd9")
    yield data[:-2]
    yield data[: len(data) // 2]
    yield data[: len(data) // 2] + b"\xff\xd9"
    yield data[:end] + b"\x55" * 40 + data[end:]
    yield data[:start] + data[start + 1000 :]
    yield data[:start] + b"\xff\xd9"
    yield data[:start] + bytes([0xAA]) * 5000 + b"\xff\xd9"
    yield data[:end] + b"\xff\xd3" + data[end:]


@pytest.mark.parametrize("restarts", [0, 1])
def test_damaged_image_data_are_left_to_the_whole_decoder(restarts: int) -> None:
    data = jpeg(320, 240, restart_marker_rows=restarts)
    for number, damaged in enumerate(damages(data)):
        if plain_scan(damaged) is not None:
            assert read(damaged, 1) is None, number
        assert outcome("scaled", damaged) == outcome("fast", damaged), number


def test_restart_markers_out_of_order_are_left_to_the_whole_decoder() -> None:
    data = jpeg(320, 240, restart_marker_rows=1)
    assert read(data, 1) is not None
    assert read(data.replace(b"\xff\xd2", b"\xff\xd3", 1), 1) is None


def outcome(mode: Any, data: bytes) -> bytes | str:
    try:
        return bytes(reader(CONFIG, mode)(data).data)
    except InvalidInputError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_mutated_files_stay_within_memory(sampling: str) -> None:
    whole = jpeg(260, 200, subsampling=sampling, restart_marker_rows=random.Random(sampling).randint(0, 1))
    for seed in range(150):
        data = mutations(whole, random.Random(seed))
        scan = plain_scan(data)
        for side in SIDES if scan else ():
            assert scan is not None
            scaled = read_scaled(data, scan, side)
            if scaled is not None:
                height, width, _ = scan.frame
                assert scaled.pixels.shape == (-(-height * side // 8), -(-width * side // 8), 3)
        answer = outcome("scaled", data)
        if scan is None:
            assert answer == outcome("fast", data)


def test_flipped_bits_of_image_data_stay_within_memory() -> None:
    whole = bytearray(jpeg(260, 200))
    start = whole.rindex(b"\xff\xda") + 14
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = whole.copy()
        for place in rng.integers(start, len(data) - 2, rng.integers(1, 20)):
            data[place] = rng.integers(0, 256)
        for side in SIDES:
            read(bytes(data), side)


def test_limits_hold() -> None:
    limited = Preprocessor(CONFIG, "scaled", ImageLimits(max_pixels=500 * 400 - 1))
    with pytest.raises(ImageTooLargeError, match="500x400 pixels, at most 199999 are allowed"):
        limited(jpeg(500, 400))


def test_oriented_files_of_every_kind_are_read() -> None:
    for name, data in oriented_files().items():
        _, mean = distance(reader(CONFIG, "scaled")(data), reader(CONFIG, "pil")(data))
        assert mean < 2.5, name


def test_without_numba_the_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "find_spec", lambda _: None)
    with pytest.raises(SettingsError, match="preprocess scaled: needs the extra scaled"):
        check_numba()
    with pytest.raises(SettingsError, match="preprocess scaled: needs the extra scaled"):
        Preprocessor(CONFIG, "scaled")
