"""Pictures of teams: what is where, in which colour, and nothing breaks at the edges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from siglip_serve_client import Teams
from siglip_serve_client.commands.teams.contact_sheet import contact_sheet
from siglip_serve_client.commands.teams.files import short_names
from siglip_serve_client.commands.teams.labelled import OUTLIERS, Labelled, team_name
from siglip_serve_client.commands.teams.labelled_frame import labelled_frame
from siglip_serve_client.commands.teams.scatter_plot import _Scale, scatter_plot

BLUE, ORANGE, GREY, INK = (0, 114, 178), (230, 159, 0), (150, 150, 150), (34, 34, 34)
GRASS, RED = (58, 130, 62), (200, 30, 40)


def labelled(
    labels: list[int], outliers: tuple[int, ...] = (), coordinates: list[list[float]] | None = None
) -> Labelled:
    count = len(labels)
    scores = np.ones(count, np.float32)
    scores[list(outliers)] = 3
    spread = np.linspace((-1, -1), (1, 1), count) if coordinates is None else coordinates
    teams = Teams(
        labels=np.array(labels, np.int32),
        margin=np.linspace(1, 0, count, dtype=np.float32),
        outlier_score=scores,
        coordinates=np.array(spread, np.float32).reshape(-1, 2),
        region_fallback=np.zeros(count, np.bool_),
    )
    return Labelled(teams, [str(row) for row in range(count)])


def count(image: Image.Image, color: tuple[int, int, int]) -> int:
    return int((np.asarray(image) == color).all(axis=-1).sum())


def grass(width: int = 640, height: int = 360) -> Image.Image:
    return Image.new("RGB", (width, height), GRASS)


def test_team_names() -> None:
    names = [team_name(number) for number in (-1, 0, 1, OUTLIERS)]
    assert names == ["unassigned", "team 0", "team 1", "outliers"]


def test_outliers_are_a_group_of_their_own() -> None:
    players = labelled([0, 1, 0, -1, 1], (2, 3, 4))
    players.teams.outlier_score[4] = 5
    assert players.numbers == [0, 1, OUTLIERS, -1]
    # The least like any team first. A player without a team is no outlier of one.
    groups = {number: players.of(number).tolist() for number in players.numbers}
    assert groups == {0: [0], 1: [1], OUTLIERS: [4, 2], -1: [3]}


def test_boxes_have_their_teams_colour() -> None:
    boxes = [[100, 100, 140, 190], [300, 100, 340, 190], [500, 100, 540, 190]]
    frame = grass()
    picture = labelled_frame(frame, boxes, labelled([0, 1, -1]))
    assert picture.size == frame.size
    for (x0, y0, x1, y1), color in zip(boxes, (BLUE, ORANGE, GREY), strict=True):
        assert picture.getpixel((x0, y1 - 9)) == color
        assert picture.getpixel((x1, y0 + 30)) == color
        assert picture.getpixel(((x0 + x1) // 2, (y0 + y1) // 2)) == GRASS
    assert count(frame, GRASS) == 640 * 360  # the caller's image is as it was


def test_outliers_have_a_dark_edge() -> None:
    box = [[300, 100, 340, 190]]
    plain, marked = (labelled_frame(grass(), box, labelled([0], outliers)) for outliers in ((), (0,)))
    assert plain.getpixel((299, 180)) == (255, 255, 255)
    assert marked.getpixel((299, 180)) == INK
    assert plain.getpixel((300, 180)) == BLUE
    assert marked.getpixel((300, 180)) == (255, 255, 255)


def test_players_in_front_are_drawn_over_the_others() -> None:
    behind, front = [300, 100, 340, 190], [300, 110, 340, 200]
    for boxes, labels in (([behind, front], [0, 1]), ([front, behind], [1, 0])):
        assert labelled_frame(grass(), boxes, labelled(labels)).getpixel((300, 150)) == ORANGE


@pytest.mark.parametrize(
    "box",
    [
        [-50, -50, 30, 40],
        [620, 340, 900, 900],
        [-1e9, -1e9, 1e9, 1e9],
        [0, 0, 640, 360],
        [5, 5, 6, 6],
        [700, 100, 740, 200],
        [30, 30, 10, 10],
        [np.nan, 0, 10, 10],
        [0, 0, np.inf, 10],
    ],
)
def test_boxes_may_lie_anywhere(box: list[float]) -> None:
    assert labelled_frame(grass(), [box], labelled([0])).size == (640, 360)


@pytest.mark.parametrize(
    ("mode", "size"), [("L", (640, 360)), ("RGBA", (640, 360)), ("RGB", (1, 1)), ("P", (3840, 20))]
)
def test_frames_of_every_kind(mode: str, size: tuple[int, int]) -> None:
    picture = labelled_frame(Image.new(mode, size), [[0, 0, 20, 20]], labelled([1]))
    assert (picture.mode, picture.size) == ("RGB", size)


def test_a_frame_without_players() -> None:
    assert labelled_frame(grass(), np.zeros((0, 4)), labelled([])).size == (640, 360)


def test_a_sheet_shows_the_crops_by_team() -> None:
    crops = [Image.new("RGB", (20, 40), (10 * row, 0, 0)) for row in range(6)]
    sheet = contact_sheet(crops, labelled([1, 0, 1, 0, -1, 1]), "six crops")
    pixels = np.asarray(sheet).reshape(-1, sheet.width, 3)

    def first_row(color: tuple[int, int, int]) -> int:
        # Edges of letters have all shades of grey, in a few pixels of a row.
        return int(np.flatnonzero((pixels == color).all(axis=-1).sum(axis=1) > 10)[0])

    order = [first_row(color) for color in (BLUE, (10, 0, 0), ORANGE, (20, 0, 0), GREY, (40, 0, 0))]
    assert order == sorted(order)
    assert first_row((0, 0, 0)) == first_row((20, 0, 0)) == first_row((50, 0, 0))


def test_a_sheet_shows_outliers_below_the_teams() -> None:
    crops = [Image.new("RGB", (20, 40), (10 * row, 0, 0)) for row in range(4)]
    pixels = np.asarray(contact_sheet(crops, labelled([0, 0, 1, 1], (0, 3)), ""))
    below = [int(np.argwhere((pixels == (10 * row, 0, 0)).all(axis=-1))[0][0]) for row in range(4)]
    assert below[0] == below[3] > below[2] > below[1]
    # In a frame of the nearest team's colour, and under a heading of their own.
    assert (pixels[below[0] - 20 :] == BLUE).all(axis=-1).any()
    assert (pixels[below[0] - 20 :] == ORANGE).all(axis=-1).any()
    assert (pixels[below[2] + 60 : below[0]] == INK).all(axis=-1).sum() > 10_000


def test_a_sheet_identifies_each_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    drawn = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, place: Any, text: str, *given: Any, **named: Any) -> None:
        texts.append(text)
        drawn(self, place, text, *given, **named)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    players = labelled([0] * 2 + [1] * 9, (1,))
    names = [f"a_very_long_name_of_a_clip_frame{row:04}" for row in range(11)]
    contact_sheet([grass(20, 40)] * 11, replace(players, names=names, tracks=["7", *[""] * 10]), "")
    assert texts.count("#0 t7") == texts.count("#1") == texts.count("#10") == 1
    shown = next(text for text in texts if text.endswith("0010"))
    assert shown.startswith("..")
    assert "frame0010" in shown
    assert texts.count("3.0") == 1  # the outlier's score, not its margin
    assert texts[-1] == "3.0"


def test_names_of_crops_leave_out_what_all_share() -> None:
    assert short_names(["a/b/1.png", "a/b/2.x.jpg"]) == ["1", "2.x"]
    assert short_names(["a/b/1.png", "a/c/1.png", "/a/1.png"]) == ["a/b/1", "a/c/1", "/a/1"]
    assert short_names(["a/b/1.png", "a/1.png"]) == ["b/1", "1"]
    assert short_names([]) == []


def test_a_sheet_of_very_many_crops_shows_some() -> None:
    crop = Image.new("RGB", (10, 20), RED)
    few, many = (contact_sheet([crop] * n, labelled([0] * n), "") for n in (84, 3000))
    assert few.size == many.size
    assert count(few, RED) == count(many, RED)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2000, 3000)])
def test_crops_of_every_shape_fit(size: tuple[int, int]) -> None:
    sheet = contact_sheet([Image.new("RGB", size, RED)], labelled([0], (0,)), "")
    assert count(sheet, RED) > 0
    assert sheet.width < 2000


def test_a_sheet_reads_files_upright(tmp_path: Path) -> None:
    path = tmp_path / "crop.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (80, 20), RED).save(path, exif=exif)
    sheet = np.asarray(contact_sheet([path], labelled([0]), "")).astype(int)
    red = np.argwhere(np.abs(sheet - RED).max(axis=-1) < 12)
    height, width = np.ptp(red, axis=0)
    assert height > 3 * width


def test_a_sheet_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        contact_sheet([tmp_path / "gone.jpg"], labelled([0]), "")


def test_a_sheet_without_crops_is_drawn() -> None:
    assert contact_sheet([], labelled([]), "nothing").width > 0


def test_a_plot_has_every_point_in_its_teams_colour() -> None:
    players = labelled(
        [0] * 30 + [1] * 20 + [-1] * 5, coordinates=[[row % 11, row // 11] for row in range(55)]
    )
    plot = scatter_plot(players, "Teams")
    areas = {color: count(plot, color) for color in (BLUE, ORANGE, GREY)}
    assert areas[BLUE] > 31 * 60  # of about 130 pixels each, one of them in the legend
    assert areas[ORANGE] > 21 * 60
    assert areas[GREY] > 6 * 20


def test_a_plot_keeps_directions_and_proportions() -> None:
    plot = np.asarray(scatter_plot(labelled([0, 1], coordinates=[[0, 0], [2, 1]]), ""))[:, :800]
    low, high = (np.argwhere((plot == color).all(axis=-1)).mean(axis=0) for color in (BLUE, ORANGE))
    down, right = high - low
    assert right > 0 > down
    assert right / -down == pytest.approx(2, rel=0.02)


def test_outliers_are_ringed() -> None:
    plain, ringed = (scatter_plot(labelled([0, 1], outliers), "") for outliers in ((), (1,)))
    assert count(ringed, INK) > count(plain, INK) + 50


def test_outliers_do_not_squash_the_others() -> None:
    near = [[row % 5 / 5, row // 5 / 5] for row in range(25)]
    teams = [0] * 25 + [1] * 5

    def spread(far: float) -> int:
        """Width in pixels of what is drawn in the first team's colour."""
        coordinates = near + [[0.5, far + row] for row in range(5)]
        players = labelled(teams, (25, 26, 27, 28, 29), coordinates)
        plot = np.asarray(scatter_plot(players, ""))[:, :800]
        return int(np.ptp(np.argwhere((plot == BLUE).all(axis=-1))[:, 1]))

    assert spread(1000) == spread(100) > 250


def test_points_beyond_the_axes_are_drawn_at_the_border_with_an_arrow() -> None:
    near = [[row % 5 / 5, row // 5 / 5] for row in range(25)]
    plots = [
        np.asarray(scatter_plot(labelled([0] * 25 + [1], (25,), [*near, far]), ""))
        for far in ([0.5, 50], [0.5, -50], [50, 0.5], [-50, 0.5])
    ]
    border = [(64, 0), (600, 0), (800, 1), (84, 1)]  # top, bottom, right, left
    for plot, (edge, axis) in zip(plots, border, strict=True):
        inside = plot[64:600, 84:800]
        orange = np.add(np.argwhere((inside == ORANGE).all(axis=-1)).mean(axis=0), (64, 84))
        assert abs(orange[axis] - edge) == pytest.approx(14, abs=2)
        assert (plot[:, 810:] == INK).all(axis=-1).sum() > 100  # the legend says so


def test_no_point_is_beyond_the_axes_without_outliers() -> None:
    players = labelled([0] * 200, coordinates=[[row % 20, row // 20] for row in range(200)])
    scale = _Scale.of(*[players.teams.coordinates.astype(np.float64)] * 2)
    assert not any(any(scale.within(point)[1]) for point in players.teams.coordinates)


@pytest.mark.parametrize(
    "points",
    [
        [],
        [[0.3, 0.3]],
        [[5, 5], [5, 5], [5, 5]],
        [[np.nan, 0], [1, 1]],
        [[np.nan, np.nan]],
        [[1e-9, 0], [-1e-9, 0]],
        [[1e6, 0], [-1e6, 3]],
    ],
)
def test_any_coordinates_can_be_plotted(points: list[list[float]]) -> None:
    plot = scatter_plot(labelled([0] * len(points), coordinates=points), "")
    assert plot.size == (1000, 680)


def test_eight_teams_differ_in_colour() -> None:
    players = labelled(list(range(8)) * 2)
    colors = np.unique(np.asarray(scatter_plot(players, "")).reshape(-1, 3), axis=0, return_counts=True)
    plain = [tuple(color) for color, area in zip(*colors, strict=True) if area > 150 and np.ptp(color) > 20]
    assert len(plain) == 7  # and the eighth is nearly black
