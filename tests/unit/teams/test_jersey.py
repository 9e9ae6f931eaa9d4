"""Where the jersey is, in crops, boxes and raw frames."""

from __future__ import annotations

import numpy as np
import pytest

from siglip_serve.errors import ImageError, ImageTooLargeError, InvalidInputError, SettingsError
from siglip_serve.images.formats import ImageLimits
from siglip_serve.teams.jersey import cut_box, jersey_roi, parse_region, rgb_frame

REGION = parse_region("0.25,0.2,0.75,0.5")
LIMITS = ImageLimits()


def numbered(height: int, width: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Each pixel holds its row and its column."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, 0 * rows], axis=2).astype(np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "corners"),
    [(100, 40, (20, 10, 49, 29)), (128, 64, (25, 16, 63, 47)), (10, 4, (2, 1, 4, 2)), (5, 3, (1, 0, 1, 1))],
)
def test_the_region_is_20_to_50_percent_down_and_25_to_75_across(
    height: int, width: int, corners: tuple[int, ...]
) -> None:
    roi, whole = jersey_roi(numbered(height, width), REGION)
    assert (not whole, (*roi[0, 0, :2], *roi[-1, -1, :2])) == (True, corners)


@pytest.mark.parametrize(("height", "width"), [(1, 20), (20, 1), (1, 1), (3, 1)])
def test_an_empty_region_becomes_the_whole_crop(height: int, width: int) -> None:
    roi, whole = jersey_roi(numbered(height, width), REGION)
    assert (whole, roi.shape) == (True, (height, width, 3))


@pytest.mark.parametrize("height", [6, 8, 10])
def test_regions_of_few_rows_keep_their_axes(height: int) -> None:
    roi, _ = jersey_roi(numbered(height, 40), REGION)  # 2 to 3 rows: no channel axis is guessed from that
    assert roi.shape == (int(height * 0.5) - int(height * 0.2), 20, 3)


def test_region_survives_as_text() -> None:
    assert str(REGION) == "0.25,0.2,0.75,0.5"


@pytest.mark.parametrize(
    "text", ["", "a", "0,0,1", "0,0,1,1,1", "0.5,0,0.5,1", "0,0.6,1,0.5", "-1,0,1,1", "0,0,1,2"]
)
def test_refuses_text_that_is_no_region(text: str) -> None:
    with pytest.raises(SettingsError, match="jersey_region"):
        parse_region(text)


def test_reads_frames_in_the_named_colour_order() -> None:
    frame = numbered(4, 6)
    assert (rgb_frame(frame, "RGB", LIMITS) == frame).all()
    assert (rgb_frame(frame[:, :, ::-1], "BGR", LIMITS) == frame).all()
    alpha = np.concatenate([frame, np.full((4, 6, 1), 9, np.uint8)], axis=2)
    assert (rgb_frame(alpha, "RGB", LIMITS) == frame).all()
    assert (rgb_frame(alpha[:, :, [2, 1, 0, 3]], "BGR", LIMITS) == frame).all()
    assert (rgb_frame(frame[:, :, :1], "RGB", LIMITS) == frame[:, :, :1]).all()


@pytest.mark.parametrize("shape", [(4, 6, 2), (4, 6, 5), (0, 6, 3), (4, 0, 3), (3, 4, 600)])
def test_refuses_frames_of_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match="expected"):
        rgb_frame(np.zeros(shape, np.uint8), "RGB", LIMITS)


def test_refuses_a_frame_of_too_many_pixels() -> None:
    with pytest.raises(ImageTooLargeError, match="at most 10 are allowed"):
        rgb_frame(np.zeros((4, 6, 3), np.uint8), "RGB", ImageLimits(max_pixels=10))


@pytest.mark.parametrize(
    ("box", "corners"),
    [
        ((2, 3, 5, 7), (3, 2, 6, 4)),
        ((2.4, 3.6, 4.1, 6.2), (3, 2, 6, 4)),
        ((-10, -10, 3, 3), (0, 0, 2, 2)),
        ((15, 8, 100, 100), (8, 15, 9, 19)),
        ((0.2, 0.2, 0.3, 0.3), (0, 0, 0, 0)),
    ],
)
def test_a_box_is_clipped_to_the_frame(box: tuple[float, ...], corners: tuple[int, ...]) -> None:
    cut = cut_box(numbered(10, 20), np.array(box, np.float32))
    assert (*cut[0, 0, :2], *cut[-1, -1, :2]) == corners


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((5, 3, 2, 7), "left < right"),
        ((2, 7, 5, 7), "top < bottom"),
        ((20, 0, 30, 5), "outside the frame of 20x10 pixels"),
        ((0, -5, 3, 0), "outside the frame"),
        ((0, 0, np.nan, 5), "finite"),
        ((0, 0, np.inf, 5), "finite"),
    ],
)
def test_refuses_wrong_boxes(box: tuple[float, ...], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        cut_box(numbered(10, 20), np.array(box, np.float32))
