"""Boundaries of states, regions, frames and boxes, each on both sides, with the message that names it."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from siglip_serve.errors import ImageTooLargeError, InvalidInputError, SettingsError, StateError
from siglip_serve.images.formats import ImageLimits
from siglip_serve.teams.clustering import predict
from siglip_serve.teams.jersey import cut_box, jersey_roi, parse_region, rgb_frame
from siglip_serve.teams.state import MOST_STATE_BYTES, TeamState

STAMP = {"version": "1"}


def state(width: int = 16, nuisances: int = 3) -> TeamState:
    """A valid state of two teams."""
    ones = np.ones((2, 4), np.float32)
    return TeamState(
        STAMP,
        np.zeros(width, np.float32),
        np.zeros((nuisances, width), np.float32),
        np.zeros((4, width), np.float32),
        ones,
        np.eye(3, 4, dtype=np.float32),
        np.ones(4, np.float32),
        np.ones(2, np.float32),
        ones,
    )


def one_of(*shape: int, at: int, value: float) -> NDArray[np.float32]:
    """Zeros, but for one value."""
    array = np.zeros(shape, np.float32)
    array.flat[at] = value
    return array


def with_stamp(stamp: bytes) -> bytes:
    """A valid state whose stamp is written in these bytes."""
    member, buffer = io.BytesIO(), io.BytesIO()
    np.save(member, np.frombuffer(stamp, np.uint8))
    with zipfile.ZipFile(io.BytesIO(state().to_bytes())) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, member.getvalue() if name == "stamp.npy" else old.read(name))
    return buffer.getvalue()


def test_refuses_a_valid_state_of_more_than_a_mebibyte() -> None:
    largest = state(1024, 249).to_bytes()
    assert 0.95 * MOST_STATE_BYTES < len(largest) <= MOST_STATE_BYTES
    assert TeamState.from_bytes(largest, STAMP).nuisances.shape == (249, 1024)
    larger = state(1024, 290).to_bytes()
    with pytest.raises(StateError, match=f"^{len(larger)} bytes, at most 1048576 are allowed"):
        TeamState.from_bytes(larger, STAMP)


@pytest.mark.parametrize("size", [4096, 4097])
def test_refuses_a_stamp_of_more_than_4096_bytes(size: int) -> None:
    data = with_stamp(json.dumps(STAMP).encode().ljust(size))
    if size <= 4096:
        assert TeamState.from_bytes(data, STAMP).stamp == STAMP
        return
    with pytest.raises(StateError, match=r"no state of fit_teams \(the stamp has 4097 bytes\)"):
        TeamState.from_bytes(data, STAMP)


def test_refuses_a_stamp_with_a_further_entry() -> None:
    data = replace(state(), stamp={**STAMP, "pooling": "max"}).to_bytes()
    with pytest.raises(
        StateError, match="made with pooling 'max', this server has None: fit the teams again"
    ):
        TeamState.from_bytes(data, STAMP)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"nuisances": np.zeros((3, 15), np.float32)},
            r"nuisances has the shape \[3, 15\], expected \[3, 16\]",
        ),
        ({"components": np.zeros((4, 15), np.float32)}, r"components has the shape \[4, 15\], expected"),
        ({"centroids": np.zeros((3, 4), np.float32)}, r"centroids has the shape \[3, 4\], expected \[2, 4\]"),
        ({"view": np.zeros((3, 4), np.float32)}, r"view has the shape \[3, 4\], expected \[2, 4\]"),
        ({"axes": np.zeros((3, 5), np.float32)}, r"axes has the shape \[3, 5\], expected \[3, 4\]"),
        ({"spreads": np.ones(3, np.float32)}, r"spreads has the shape \[3\], expected \[4\]"),
        ({"spreads": one_of(4, at=2, value=1) + 1e-8}, r"spreads\[0\] is 1e-08, expected at least 1e-07"),
        ({"scales": np.array([1, 0], np.float32)}, "2 teams, or a scale that is not positive"),
        ({"scales": np.array([1, -1], np.float32)}, "2 teams, or a scale that is not positive"),
        ({"origin": np.full(16, np.inf, np.float32)}, "origin has .* numbers that are not finite"),
        ({"origin": one_of(16, at=5, value=1e30)}, r"origin\[5\] is 1e\+30, expected -100 to 100"),
        ({"nuisances": one_of(3, 16, at=17, value=-101)}, r"nuisances\[1, 1\] is -101, expected -100 to 100"),
        ({"scales": np.array([1, 1e-30], np.float32)}, r"scales\[1\] is 1e-30, expected at least 1e-07"),
    ],
)
def test_names_the_array_that_does_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(StateError, match=message):
        TeamState.from_bytes(replace(state(), **fields).to_bytes(), STAMP)


@pytest.mark.filterwarnings("error")
def test_predicts_finite_values_with_the_largest_state() -> None:
    largest = {
        name: np.full_like(getattr(state(1024), name), 100) for name in ("origin", "nuisances", "view")
    }
    hundreds = ("components", "centroids", "axes")
    largest |= {name: np.full_like(getattr(state(1024), name), -100) for name in hundreds}
    small = {name: np.full_like(getattr(state(), name), 1e-7) for name in ("spreads", "scales")}
    data = replace(state(1024), **largest, **small).to_bytes()
    teams = predict(TeamState.from_bytes(data, STAMP), np.eye(3, 1024, dtype=np.float32))
    for array in (teams.margin, teams.outlier_score, teams.coordinates):
        assert np.isfinite(array).all()


@pytest.mark.parametrize("text", ["0,0,2,1", "0,0,1,2", "-0.1,0,1,1", "0,-0.1,1,1", "0.5,0,0.5,1", "0,1,1,1"])
def test_refuses_a_region_that_is_not_inside_the_crop(text: str) -> None:
    with pytest.raises(SettingsError, match=f"jersey_region: got '{text}', expected 0 <= left < right <= 1"):
        parse_region(text)


def test_accepts_the_whole_crop_as_region() -> None:
    pixels = np.zeros((7, 5, 3), np.uint8)
    assert jersey_roi(pixels, parse_region("0,0,1,1"))[0].shape == (7, 5, 3)


@pytest.mark.parametrize(("height", "width", "rows", "columns"), [(7, 8, 2, 4), (9, 7, 3, 4), (5, 3, 1, 2)])
def test_cuts_the_bounds_of_a_region_to_the_upper_left(
    height: int, width: int, rows: int, columns: int
) -> None:
    roi, whole = jersey_roi(np.zeros((height, width, 3), np.uint8), parse_region("0.25,0.2,0.75,0.5"))
    assert (roi.shape[:2], whole) == ((rows, columns), False)


def test_accepts_frames_of_exactly_the_most_pixels() -> None:
    frame = np.zeros((4, 6, 3), np.uint8)
    assert rgb_frame(frame, "RGB", ImageLimits(max_pixels=24)).shape == (4, 6, 3)
    with pytest.raises(ImageTooLargeError, match="6x4 pixels, at most 23 are allowed"):
        rgb_frame(frame, "RGB", ImageLimits(max_pixels=23))


@pytest.mark.parametrize("box", [(-5, 0, 0, 5), (0, -5, 5, 0), (20, 0, 25, 5), (0, 10, 5, 15)])
def test_refuses_a_box_that_only_touches_the_frame(box: tuple[float, ...]) -> None:
    with pytest.raises(InvalidInputError, match="outside the frame of 20x10 pixels"):
        cut_box(np.zeros((10, 20, 3), np.uint8), np.array(box, np.float32))


@pytest.mark.parametrize("box", [(-5, 0, 0.5, 5), (0, -5, 5, 0.5), (19.5, 0, 25, 5), (0, 9.5, 5, 15)])
def test_accepts_a_box_with_one_row_or_column_inside(box: tuple[float, ...]) -> None:
    cut = cut_box(np.zeros((10, 20, 3), np.uint8), np.array(box, np.float32))
    assert min(cut.shape[:2]) == 1
    assert max(cut.shape[:2]) == 5
