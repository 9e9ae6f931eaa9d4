"""Maps over pictures: where each patch lies, on maps whose answer is known by eye."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from siglip_serve.heatmaps.picture import (
    COLORMAPS,
    MOST_VALUES,
    View,
    color_scale,
    default_size,
    normalize,
    overlay,
)

GRID = np.arange(6, dtype=np.float32).reshape(1, 2, 3)


def whole(width: int, height: int, covered: float = 1.0) -> View:
    return View(width, height, (0.0, 0.0, width, height), covered)


def test_map_of_the_grids_size_equals_the_grid() -> None:
    np.testing.assert_allclose(whole(640, 480).place(GRID, 2, 3), GRID, atol=1e-6)


def test_interpolates_between_patch_centres_and_is_flat_beyond_them() -> None:
    steps = whole(8, 8).place(np.array([[[0.0, 4.0]]], dtype=np.float32), 1, 8)[0, 0]
    np.testing.assert_allclose(steps, [0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4], atol=1e-6)


def test_pixels_beyond_the_last_patch_continue_it() -> None:
    # Two patches cover 8 of 10 pixels: their centres lie at 2 and 6.
    steps = whole(10, 10, covered=0.8).place(np.array([[[0.0, 4.0]]], dtype=np.float32), 1, 10)[0, 0]
    np.testing.assert_allclose(steps, [0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4, 4, 4], atol=1e-6)


def test_cropped_pixels_are_zero() -> None:
    view = View(8, 4, (2.0, 0.0, 6.0, 4.0))
    placed = view.place(np.ones((1, 2, 2), dtype=np.float32), 4, 8)
    assert placed[0, :, 2:6].min() == 1
    assert not placed[0, :, :2].any()
    assert not placed[0, :, 6:].any()
    np.testing.assert_array_equal(view.seen(4, 8)[0], [False] * 2 + [True] * 4 + [False] * 2)


def test_single_patch_fills_the_map() -> None:
    assert (whole(5, 7).place(np.full((1, 1, 1), 3.0, np.float32), 7, 5) == 3).all()


@pytest.mark.parametrize(
    ("size", "prompts", "expected"),
    [
        ((400, 300), 3, (300, 400)),
        ((4000, 3000), 3, (384, 512)),
        ((300, 6000), 1, (512, 26)),
        ((1, 60_000), 1, (512, 1)),
        ((512, 512), 256, (256, 256)),
    ],
)
def test_default_size_is_that_of_the_picture_within_bounds(
    size: tuple[int, int], prompts: int, expected: tuple[int, int]
) -> None:
    assert default_size(whole(*size), prompts) == expected


def test_default_size_never_exceeds_what_a_request_may_have() -> None:
    rng = np.random.default_rng(0)
    for _ in range(3000):
        width, height = (int(side) for side in np.exp(rng.uniform(0, np.log(8000), 2)))
        prompts = int(rng.integers(1, 1025))
        rows, columns = default_size(whole(width, height), prompts)
        assert min(rows, columns) >= 1
        assert prompts * rows * columns <= MOST_VALUES


def test_normalization_keeps_maps_flat_that_differ_by_rounding_only() -> None:
    noise = np.array([[[0.25, 0.25 + 3e-8]]], dtype=np.float32)
    assert np.ptp(normalize(noise, "prompt")) < 0.1
    assert np.ptp(normalize(noise * 1000, "prompt")) == pytest.approx(1)


def test_normalizes_per_prompt_or_jointly() -> None:
    maps = np.array([[[0.0, 2.0]], [[-1.0, 3.0]]], dtype=np.float32)
    np.testing.assert_array_equal(normalize(maps, "none"), maps)
    np.testing.assert_allclose(normalize(maps, "prompt"), [[[0, 1]], [[0, 1]]])
    np.testing.assert_allclose(normalize(maps, "joint"), [[[0.25, 0.75]], [[0.0, 1.0]]])
    assert not normalize(np.ones((1, 2, 2), dtype=np.float32), "prompt").any()


def test_diverging_scale_has_zero_in_the_middle() -> None:
    maps = np.array([[[0.0, 2.0]], [[-4.0, 3.0]]], dtype=np.float32)
    shared = [[[0.5, 0.75]], [[0.0, 0.875]]]
    np.testing.assert_allclose(color_scale(maps, "joint"), shared)
    np.testing.assert_allclose(color_scale(maps, "none"), shared)
    np.testing.assert_allclose(color_scale(maps, "prompt"), [[[0.5, 1.0]], [[0.0, 0.875]]])
    np.testing.assert_array_equal(color_scale(np.zeros((1, 2, 2), np.float32), "prompt"), 0.5)


def test_sequential_scale_runs_from_least_to_largest() -> None:
    maps = np.array([[[0.0, 2.0]], [[-4.0, 4.0]]], dtype=np.float32)
    for how in ("joint", "none"):
        np.testing.assert_allclose(color_scale(maps, how, "viridis"), [[[0.5, 0.75]], [[0.0, 1.0]]])
    np.testing.assert_allclose(color_scale(maps, "prompt", "jet"), [[[0, 1]], [[0, 1]]])


def test_default_colormap_is_blue_white_red() -> None:
    heat = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    drawn = overlay(Image.new("RGB", (3, 1)), heat, np.ones((1, 3), dtype=np.bool_), opacity=1.0)
    assert np.asarray(drawn).tolist() == [[[0, 0, 255], [255, 255, 255], [255, 0, 0]]]


def test_picture_under_a_diverging_map_has_no_colour_of_its_own() -> None:
    picture, seen = Image.new("RGB", (2, 1), (255, 0, 0)), np.array([[True, False]])
    level = np.full((1, 2), 0.5, dtype=np.float32)
    under, unseen = np.asarray(overlay(picture, level, seen))[0].tolist()
    assert len(set(under)) == 1
    assert unseen == [255, 0, 0]
    assert np.asarray(overlay(picture, level, seen, opacity=0.0))[0, 0].tolist() == [255, 0, 0]
    red, green, _ = np.asarray(overlay(picture, level, seen, "viridis"))[0, 0].tolist()
    assert red > green  # the picture's red is left


@pytest.mark.parametrize("colormap", COLORMAPS)
def test_overlay_mixes_picture_and_colours(colormap: str) -> None:
    picture = Image.new("RGB", (8, 8), (100, 100, 100))
    heat = np.zeros((4, 4), dtype=np.float32)
    heat[0, 0] = 1
    seen = np.ones((4, 4), dtype=np.bool_)
    seen[3] = False
    pixels = np.asarray(overlay(picture, heat, seen, colormap, 0.5)).astype(int)
    assert pixels.shape == (4, 4, 3)
    assert (pixels[3] == 100).all()
    assert tuple(pixels[0, 0]) != tuple(pixels[1, 1])
    plain = np.asarray(overlay(picture, heat, seen, colormap, 0.0))
    assert (plain == 100).all()


def test_jet_runs_from_blue_to_red() -> None:
    picture, seen = Image.new("RGB", (2, 1)), np.ones((1, 2), dtype=np.bool_)
    pixels = np.asarray(overlay(picture, np.array([[0, 1]], dtype=np.float32), seen, "jet", 1.0)).astype(int)
    assert pixels[0, 0].argmax() == 2
    assert pixels[0, 1].argmax() == 0
