"""Which JPEGs may go to a decoder that judges nothing: what it is told of them is what they hold."""

from __future__ import annotations

import io
import random
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from images import encode, exif, image_files, malformed_files, mutations, oriented_files, photo
from PIL import Image

from siglip_serve.images.formats import ImageLimits, plain_jpeg
from siglip_serve.images.jpeg import PlainFrame, plain_frame

PLAIN = encode(photo(70, 50), "JPEG", subsampling="4:2:0")
RESTARTS = encode(photo(70, 50), "JPEG", subsampling="4:2:0", restart_marker_blocks=1)
GREY = encode(photo(70, 50).convert("L"), "JPEG")


@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_reads_the_frame_of_a_plain_colour_file(sampling: str) -> None:
    data = encode(photo(77, 51), "JPEG", subsampling=sampling)
    assert plain_frame(data) == (51, 77, sampling)


@pytest.mark.parametrize(
    "data",
    [RESTARTS, encode(photo(70, 50), "JPEG", optimize=True), encode(photo(70, 50), "JPEG", exif=exif(1))],
    ids=["restart markers", "own tables", "upright"],
)
def test_ignores_segments_that_do_not_change_the_picture(data: bytes) -> None:
    assert plain_frame(data) == (50, 70, "4:2:0")


def test_reads_the_frame_of_a_plain_grey_file() -> None:
    assert plain_frame(GREY) == (50, 70, "gray")


def test_accepts_only_plain_files_among_all_kinds() -> None:
    files = {**image_files(), **oriented_files()}
    plain = {name for name, data in files.items() if plain_frame(data)}
    assert plain == {
        *(f"jpeg {name}" for name in ("4:4:4", "4:2:2", "4:2:0", "odd 4:2:0", "odd 4:2:2")),
        *(f"jpeg {name}" for name in ("grey", "low quality", "large", "restart", "metadata")),
        "jpeg orientation 1",
    }


def test_accepts_no_malformed_file() -> None:
    for name, data in malformed_files().items():
        assert plain_frame(data) is None, name


def segment(data: bytes, marker: int) -> tuple[int, int]:
    """First byte and end of the first segment with this marker."""
    start = data.index(bytes([0xFF, marker]))
    return start, start + 2 + int.from_bytes(data[start + 2 : start + 4])


def without(marker: int) -> bytes:
    start, end = segment(PLAIN, marker)
    return PLAIN[:start] + PLAIN[end:]


def with_byte(data: bytes, marker: int, offset: int, value: int) -> bytes:
    """Another value at an offset behind a segment's length."""
    place = segment(data, marker)[0] + 4 + offset
    return data[:place] + bytes([value]) + data[place + 1 :]


def twice(marker: int) -> bytes:
    start, end = segment(PLAIN, marker)
    return PLAIN[:end] + PLAIN[start:end] + PLAIN[end:]


def in_image_data(inserted: bytes) -> bytes:
    start = segment(PLAIN, 0xDA)[1]
    return PLAIN[: start + 40] + inserted + PLAIN[start + 40 :]


WRONG: dict[str, Callable[[], bytes]] = {
    "two frames": lambda: twice(0xC0),
    "no frame": lambda: without(0xC0),
    "no Huffman table": lambda: without(0xC4),
    "no quantisation table": lambda: without(0xDB),
    "a quantisation table of 16 bits": lambda: with_byte(PLAIN, 0xDB, 0, 0x10),
    "a quantisation table that no component has": lambda: with_byte(PLAIN, 0xDB, 0, 2),
    "12 bits a sample": lambda: with_byte(PLAIN, 0xC0, 0, 12),
    "two components": lambda: with_byte(PLAIN, 0xC0, 5, 2),
    "other ids": lambda: with_byte(PLAIN, 0xC0, 6, 7),
    "another component in the scan": lambda: with_byte(PLAIN, 0xDA, 1, 3),
    "a scan of some coefficients": lambda: with_byte(PLAIN, 0xDA, 8, 5),
    "a Huffman table that is not whole": lambda: with_byte(PLAIN, 0xC4, 16, 255),
    "codes that do not exist": lambda: with_byte(with_byte(PLAIN, 0xC4, 1, 3), 0xC4, 3, 0),
    "a DC symbol of 16 bits": lambda: with_byte(PLAIN, 0xC4, 17, 16),
    "colours that are RGB": lambda: PLAIN[:2] + b"\xff\xee\0\x0eAdobe" + bytes(7) + PLAIN[2:],
    "a gap between segments": lambda: PLAIN[:2] + b"\0\0\0" + PLAIN[2:],
    "fill before a segment": lambda: PLAIN[:2] + b"\xff" + PLAIN[2:],
    "another image behind": lambda: PLAIN + PLAIN,
    "bytes behind": lambda: PLAIN + b"\0",
    "no end": lambda: PLAIN[:-2],
    "image data cut off": lambda: RESTARTS[:-100] + b"\xff\xd9",
    "a frame in the image data": lambda: in_image_data(PLAIN[slice(*segment(PLAIN, 0xC0))]),
    "a scan in the image data": lambda: in_image_data(PLAIN[slice(*segment(PLAIN, 0xDA))]),
    "a restart that was not announced": lambda: in_image_data(b"\xff\xd0"),
    "restarts out of turn": lambda: RESTARTS.replace(b"\xff\xd1", b"\xff\xd2", 1),
    "more segments than anybody writes": lambda: PLAIN[:2] + b"\xff\xfe\0\2" * 10_000 + PLAIN[2:],
    "a segment that is shorter than its length": lambda: PLAIN[:2] + b"\xff\xfe\0\1" + PLAIN[2:],
    "tiny": lambda: encode(photo(15, 40), "JPEG"),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_refuses_files_that_only_libjpeg_can_judge(change: Callable[[], bytes]) -> None:
    assert plain_frame(change()) is None


def test_accepts_a_table_that_is_sent_again() -> None:
    assert plain_frame(twice(0xC4)) == plain_frame(twice(0xDB)) == (50, 70, "4:2:0")


SEARCHED_AT_ONCE = 2**18  # bytes of image data


@pytest.fixture(scope="module")
def long() -> tuple[bytes, int]:
    """A plain file whose image data are searched in three parts, and where they begin."""
    noise = np.random.default_rng(0).integers(0, 256, (720, 720, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), "JPEG", quality=95, subsampling="4:2:0")
    start = segment(data, 0xDA)[1]
    assert 2 * SEARCHED_AT_ONCE < len(data) - start < 3 * SEARCHED_AT_ONCE
    return data, start


@pytest.mark.parametrize("part", [1, 2])
@pytest.mark.parametrize("shift", [-2, -1, 0, 1])
def test_finds_a_marker_wherever_the_search_is_divided(
    long: tuple[bytes, int], part: int, shift: int
) -> None:
    data, start = long
    place = start + part * SEARCHED_AT_ONCE + shift
    before, after = data[: place - 1], data[place + 3 :]  # neighbours that make no marker with the two bytes
    assert plain_frame(before + b"\1\xff\0\1" + after) == (720, 720, "4:2:0")
    assert plain_frame(before + b"\1\xff\xd8\1" + after) is None


def test_counts_restarts_over_all_parts_of_the_search(long: tuple[bytes, int]) -> None:
    with Image.open(io.BytesIO(long[0])) as image:
        data = encode(image, "JPEG", quality=95, subsampling="4:2:0", restart_marker_blocks=3)
    assert plain_frame(data) == (720, 720, "4:2:0")
    last = data.rindex(b"\xff\xd1")
    assert plain_frame(data[:last] + b"\xff\xd2" + data[last + 2 :]) is None


def test_a_file_of_markers_takes_no_more_memory_than_a_few_copies(long: tuple[bytes, int]) -> None:
    data, start = long
    hostile = data[:start] + b"\xff" * 2**22 + data[-2:]
    tracemalloc.start()
    try:
        assert plain_frame(hostile) is None
        assert tracemalloc.get_traced_memory()[1] < 4 * len(hostile)
    finally:
        tracemalloc.stop()


def test_agrees_with_libjpeg_on_hostile_headers() -> None:
    """Whatever a byte of the header is changed to: no frame, or the one that libjpeg reads as well."""
    seen = set()
    end = segment(PLAIN, 0xDA)[1]
    for position in range(end):
        for value in (0, 1, 0x11, 0x7F, 0xDA, 0xFF):
            seen.add(shared(PLAIN[:position] + bytes([value]) + PLAIN[position + 1 :]))
    rng = random.Random(0)
    seen |= {shared(mutations(data, rng)) for data in (PLAIN, RESTARTS, GREY) for _ in range(300)}
    assert seen >= {None, (50, 70, "4:2:0"), (50, 70, "gray")}


def shared(data: bytes) -> PlainFrame | None:
    frame = plain_frame(data)
    if frame is not None:
        with Image.open(io.BytesIO(data)) as image:
            assert (image.height, image.width) == (frame.height, frame.width)
            assert (image.mode == "L") == (frame.sampling == "gray")
            image.draft("YCbCr", image.size)
            assert np.asarray(image).shape[:2] == (frame.height, frame.width)
    return frame


def test_limits_hold() -> None:
    assert plain_jpeg(PLAIN) is not None
    assert plain_jpeg(PLAIN, ImageLimits(max_pixels=70 * 50 - 1)) is None
    assert plain_jpeg(PLAIN, ImageLimits(max_bytes=len(PLAIN) - 1)) is None
    assert plain_jpeg(b"") is None
