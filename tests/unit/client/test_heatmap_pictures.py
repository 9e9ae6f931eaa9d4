"""The grid of `siglip-serve explain`: panels, titles, scores and colour bars, on maps known by eye."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from siglip_serve_client import Explanation
from siglip_serve_client.commands.drawing import drawable
from siglip_serve_client.commands.explain.heatmap_grid import _grid, _lines, _ticks, heatmap_grid

COLORS = [(255, 0, 255), (0, 255, 255), (255, 255, 0), (40, 90, 200), (200, 90, 40), (90, 200, 40), (9, 9, 9)]
LONG = (
    "a photo of a very long prompt that nobody would ever write, and that does not fit two lines of a panel"
)


def explanation(count: int, size: tuple[int, int] = (320, 240), prompts: tuple[str, ...] = ()) -> Explanation:
    maps = np.zeros((count, 2, 2), dtype=np.float32)
    for number in range(count):
        maps[number, 0, 1], maps[number, 1, 0] = 0.01 * (number + 1), -0.01
    return Explanation(
        prompts or tuple(f"prompt {number}" for number in range(count)),
        heatmaps=maps,
        scores=np.arange(count, dtype=np.float32) / 10,
        patch_maps=maps,
        unattributed=np.zeros(count, dtype=np.float32),
        overlays=tuple(Image.new("RGB", size, COLORS[number]) for number in range(count)),
    )


def boxes(sheet: Image.Image, colors: list[tuple[int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of all that has exactly one of the colours."""
    pixels = np.asarray(sheet)
    found = []
    for color in colors:
        rows, columns = np.nonzero((pixels == color).all(axis=2))
        found.append((int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1))
    return found


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("size", [(320, 240), (240, 320), (512, 60), (60, 512)], ids=str)
def test_panels_are_whole_and_in_even_rows(count: int, size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size, (1, 2, 3))
    sheet = heatmap_grid(picture, explanation(count, size))
    assert sheet.mode == "RGB"
    found = boxes(sheet, [(1, 2, 3), *COLORS[:count]])
    assert {(right - left, bottom - top) for left, top, right, bottom in found} == {size}
    tops = sorted({top for _, top, _, _ in found})
    lefts = sorted({left for left, _, _, _ in found})
    for positions in (tops, lefts):
        assert len({b - a for a, b in itertools.pairwise(positions)}) <= 1
    # In reading order, the picture first.
    assert [(top, left) for left, top, _, _ in found] == sorted((top, left) for left, top, _, _ in found)
    assert len(tops) * len(lefts) - (count + 1) < len(lefts)  # no row is empty
    assert all(right + 40 < sheet.width for _, _, right, _ in found)  # the numbers of the bar have room


def test_small_maps_are_enlarged_and_thin_ones_stay_small() -> None:
    sheet = heatmap_grid(Image.new("RGB", (4, 3)), explanation(1, (4, 3)))
    left, top, right, bottom = boxes(sheet, COLORS[:1])[0]
    assert (right - left, bottom - top) == (240, 180)
    thin = heatmap_grid(Image.new("RGB", (1, 512)), explanation(3, (1, 512)))
    assert thin.width * thin.height < 2**21


def ink(sheet: Image.Image, box: tuple[int, int, int, int]) -> NDArray[np.bool_]:
    """Where something is written on the paper."""
    return np.asarray(sheet.crop(box).convert("L")) < 200


def test_titles_are_above_their_panels_and_end_at_the_same_height() -> None:
    sheet = heatmap_grid(Image.new("RGB", (320, 240)), explanation(3, prompts=("dog", LONG, "größer")))
    for left, top, _, _ in boxes(sheet, COLORS[:3]):
        assert ink(sheet, (left, top - 24, left + 120, top)).any()  # the score
        assert ink(sheet, (left, top - 44, left + 120, top - 24)).any()  # the prompt
    (left, top, _, _), (_, above, _, _) = boxes(sheet, COLORS[1:3])
    assert ink(sheet, (left, top - 64, left + 120, top - 44)).any()  # its first line
    assert above - top in (0, sheet.height // 2 - 7)


def test_another_prompt_or_score_is_another_picture() -> None:
    plain = heatmap_grid(Image.new("RGB", (320, 240)), explanation(2))
    other = heatmap_grid(Image.new("RGB", (320, 240)), explanation(2, prompts=("prompt 0", "prompt l")))
    assert plain.size == other.size
    assert plain.tobytes() != other.tobytes()


def test_long_titles_are_wrapped_and_then_cut() -> None:
    assert _lines("dog", 180) == ["dog"]
    assert _lines("", 180) == [""]
    assert _lines("two\n lines \t here", 180) == ["two lines here"]
    two = _lines(LONG[:45], 220)
    assert " ".join(two) == LONG[:45]
    cut = _lines(LONG, 220)
    assert len(cut) == 2
    assert cut[1].endswith("…")
    assert LONG.startswith(f"{cut[0]} {cut[1][:-1]}")
    font = drawable("x", 16)[1]
    assert all(font.getlength(line) <= 220 for line in cut)
    word = _lines("x" * 200, 180)
    assert len(word) == 2
    assert all(font.getlength(line) <= 180 for line in word)


def test_letters_that_no_font_has_are_escaped() -> None:
    text, font = drawable("a \U0001f436\U0010fffd", 16)
    assert text.startswith("a ")
    assert "\\U0010fffd" in text
    missing = bytes(font.getmask("\uffff"))
    assert all(letter == " " or bytes(font.getmask(letter)) != missing for letter in text)


def bar(sheet: Image.Image, panel: tuple[int, int, int, int]) -> NDArray[np.int64]:
    _, top, right, bottom = panel
    return np.asarray(sheet.crop((right + 4, top, right + 16, bottom)), dtype=np.int64)


def zero(sheet: Image.Image, panel: tuple[int, int, int, int]) -> list[int]:
    """Rows of a colour bar with the mark of zero."""
    return list((bar(sheet, panel) == 34).all(axis=(1, 2)).nonzero()[0].tolist())


def test_panels_share_one_scale_whose_zero_is_white_and_in_the_middle() -> None:
    sheet = heatmap_grid(Image.new("RGB", (320, 240)), explanation(2))
    panels = boxes(sheet, COLORS[:2])
    for panel in panels:
        colors, height = bar(sheet, panel), panel[3] - panel[1]
        assert colors[0, 5].tolist() == [255, 0, 0]
        assert colors[-1, 5].tolist() == [0, 0, 255]
        assert zero(sheet, panel) == [height // 2]
        assert colors[height // 2 + 1, 5].min() > 245
    first, second = [
        np.asarray(sheet.crop((right + 18, top, right + 80, bottom))) for _, top, right, bottom in panels
    ]
    np.testing.assert_array_equal(first, second)


def test_scale_per_prompt_has_the_limits_of_its_own_map() -> None:
    sheet = heatmap_grid(Image.new("RGB", (320, 240)), explanation(2), joint=False)
    panels = boxes(sheet, COLORS[:2])
    first, second = (
        np.asarray(sheet.crop((right + 18, top, right + 80, top + 14))) for _, top, right, _ in panels
    )
    assert (first != second).any()  # +0.0100 and +0.0200
    assert all(zero(sheet, panel) == [(panel[3] - panel[1]) // 2] for panel in panels)


def test_sequential_colormap_runs_from_the_least_to_the_largest_value() -> None:
    sheet = heatmap_grid(Image.new("RGB", (320, 240)), explanation(2), "jet", joint=True)
    panel = boxes(sheet, COLORS[:1])[0]
    colors, height = bar(sheet, panel), panel[3] - panel[1]
    assert colors[2, 5].argmax() == 0  # red on top,
    assert colors[-3, 5].argmax() == 2  # blue at the bottom
    assert zero(sheet, panel) == [round(height * 2 / 3)]  # 0 lies between -0.01 and +0.02


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((-0.0001, 0.0242), ("-0.0001", "+0.0242")),
        ((-0.00001, 0.0242), ("+0.0000", "+0.0242")),
        ((-0.000312, 0.0001), ("-0.000312", "+0.000100")),
        ((-1.5, 2.0), ("-1.50", "+2.00")),
        ((0.0, 0.0), ("+0", "+0")),
    ],
)
def test_a_colour_bar_has_three_digits(limits: tuple[float, float], expected: tuple[str, str]) -> None:
    assert _ticks(*limits) == expected


@pytest.mark.parametrize(
    ("count", "cell", "expected"),
    [(2, (400, 300), (2, 1)), (4, (392, 478), (2, 2)), (8, (574, 378), (3, 3)), (8, (372, 418), (4, 2))],
)
def test_the_grid_is_about_as_wide_as_a_screen(
    count: int, cell: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert _grid(count, cell) == expected


def test_an_explanation_without_overlays_is_refused() -> None:
    maps, scores = np.zeros((1, 2, 2), dtype=np.float32), np.zeros(1, dtype=np.float32)
    bare = Explanation(("a",), maps, scores, maps, scores)
    with pytest.raises(ValueError, match="overlays=True"):
        heatmap_grid(Image.new("RGB", (4, 4)), bare)
