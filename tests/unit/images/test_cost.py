"""Which files are decoded in the process itself: none that could keep it busy for long."""

from __future__ import annotations

import io
import struct
import time

import images
import numpy as np
import pytest
from PIL import Image

from siglip_serve.errors import ImageCostError, ImageError
from siglip_serve.images.cost import inspect
from siglip_serve.images.decode import decode_file
from siglip_serve.images.formats import ImageLimits
from siglip_serve.images.jpeg import read_header

LIMITS = ImageLimits()
PROGRESSIVE = images.encode(images.photo(90, 60), "JPEG", progressive=True)
FIRST, LAST = PROGRESSIVE.index(b"\xff\xda"), PROGRESSIVE.rindex(b"\xff\xda")
SCAN = PROGRESSIVE[LAST:-2]
OWN_SCANS = PROGRESSIVE.count(b"\xff\xda")


def is_cheap(data: bytes, kind: str) -> bool:
    return inspect(data, kind, LIMITS).cheap


def with_scans(count: int, before: bytes = b"") -> bytes:
    """A progressive file with `count` scans, of which the repeated ones stand behind other bytes."""
    return PROGRESSIVE[:-2] + before + SCAN * (count - OWN_SCANS) + b"\xff\xd9"


@pytest.mark.parametrize(
    "before",
    [b"", b"\xff\xfe\0\4\xff\xd9", b"\xff\xe5\0\6\xff\xd9\xff\xd8", b"\xff\xd0", b"\xff" * 50, b"\xff\1"],
    ids=["plain", "comment", "application segment", "restart marker", "fill", "empty marker"],
)
def test_counts_the_scans_of_a_jpeg_wherever_they_stand(before: bytes) -> None:
    assert read_header(with_scans(50, before)).scans == 50
    with pytest.raises(ImageError, match="51 or more scans, expected at most 50"):
        read_header(with_scans(51, before))


def test_counts_no_scans_behind_the_end_or_within_a_segment() -> None:
    assert read_header(PROGRESSIVE + SCAN * 60).scans == OWN_SCANS
    comment = b"\xff\xfe" + struct.pack(">H", 2 + 3 * 60) + b"\xff\xda." * 60
    assert read_header(with_scans(OWN_SCANS, comment)).scans == OWN_SCANS


def test_reads_the_frame_of_a_jpeg() -> None:
    header = read_header(PROGRESSIVE)
    assert header.frame[:6] == b"\xc2\x08" + struct.pack(">HH", 60, 90)
    assert read_header(images.encode(images.photo(90, 60), "JPEG")).scans == 1


def test_refuses_many_segments_between_scans() -> None:
    many = with_scans(OWN_SCANS, b"\xff\xfe\0\2" * 11_000 + SCAN * 60)
    with pytest.raises(ImageError, match="more than 10000 segments in the image data"):
        read_header(many)


def resized(data: bytes, width: int, height: int, marker: int = 0xC2) -> bytes:
    """Declare another size in the frame of a JPEG."""
    frame = data.index(bytes([0xFF, marker]))
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


def test_refuses_a_progressive_jpeg_that_needs_too_much_memory() -> None:
    full = images.encode(images.photo(90, 60), "JPEG", progressive=True, subsampling="4:4:4")
    with pytest.raises(ImageCostError, match="8000x8000 pixels needs 576 MB, at most 512 are allowed"):
        inspect(resized(full, 8000, 8000), "JPEG", LIMITS)
    sampled = images.encode(images.photo(90, 60), "JPEG", progressive=True, subsampling="4:2:0")
    assert not is_cheap(resized(sampled, 8000, 8000), "JPEG")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("jpeg 4:2:0", "JPEG"),
        ("jpeg progressive", "JPEG"),
        ("png rgb", "PNG"),
        ("png palette", "PNG"),
        ("webp lossy", "WebP"),
    ],
)
def test_decodes_ordinary_files_in_the_process(name: str, kind: str) -> None:
    assert is_cheap(images.image_files()[name], kind)


@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
def test_decodes_formats_whose_headers_bound_nothing_elsewhere(kind: str) -> None:
    assert not is_cheap(images.encode(images.photo(60, 40), kind), kind)


def test_bounds_the_visits_of_blocks_by_scans() -> None:
    base = images.encode(Image.new("L", (2400, 2400), 90), "JPEG", progressive=True)
    end = base.rindex(b"\xff\xda")
    assert is_cheap(base, "JPEG")
    assert not is_cheap(base[:-2] + base[end:-2] * 40 + b"\xff\xd9", "JPEG")


@pytest.mark.parametrize("marker", [0xC9, 0xCA, 0xC3])
def test_decodes_other_codings_of_jpeg_elsewhere(marker: int) -> None:
    data = images.encode(images.photo(90, 60), "JPEG")
    assert not is_cheap(data.replace(b"\xff\xc0", bytes([0xFF, marker]), 1), "JPEG")


def test_bounds_the_pixels_of_files_decoded_in_the_process() -> None:
    baseline = images.encode(images.photo(90, 60), "JPEG")
    assert is_cheap(resized(baseline, 4000, 4000, 0xC0), "JPEG")
    assert not is_cheap(resized(baseline, 4001, 4000, 0xC0), "JPEG")
    assert is_cheap(images.png(2800, 2800, rows=b""), "PNG")
    assert not is_cheap(images.png(3000, 3000, rows=b""), "PNG")
    webp = bytearray(images.encode(images.photo(90, 60), "WEBP"))
    struct.pack_into("<HH", webp, 26, 1500, 1400)
    assert is_cheap(bytes(webp), "WebP")
    struct.pack_into("<HH", webp, 26, 1501, 1400)
    assert not is_cheap(bytes(webp), "WebP")


def test_bounds_the_chunks_of_a_png() -> None:
    assert is_cheap(images.png(9, 9, *[(b"tIME", b"")] * 1_000), "PNG")
    assert not is_cheap(images.png(9, 9, *[(b"tIME", b"")] * 2_000), "PNG")
    assert is_cheap(images.png(9, 9, *[(b"zTXt", b"")] * 20), "PNG")
    assert not is_cheap(images.png(9, 9, *[(b"zTXt", b"")] * 21), "PNG")


def test_decodes_animations_and_run_lengths_elsewhere() -> None:
    frames = [images.photo(40, 30, seed) for seed in range(2)]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    assert not is_cheap(file.getvalue(), "WebP")
    bmp = bytearray(images.encode(images.photo(40, 30), "BMP"))
    assert is_cheap(bytes(bmp), "BMP")
    struct.pack_into("<I", bmp, 30, 1)
    assert not is_cheap(bytes(bmp), "BMP")


def test_pads_the_rows_of_run_lengths_at_once() -> None:
    width, height = 65_535, 300
    runs = b"\1\7\0\0" * height
    head = b"BM" + struct.pack("<IHHI", 54 + 1024 + len(runs), 0, 0, 54 + 1024)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    palette = bytes(4 * 7) + b"\x10\x20\x30\0" + bytes(1024 - 4 * 8)
    begin = time.process_time()
    pixels = decode_file(head + info + palette + runs, "BMP", "pil", LIMITS)
    assert time.process_time() - begin < 2
    assert (pixels[:, 0] == (0x30, 0x20, 0x10)).all()
    assert not pixels[:, 1:].any()


def test_run_lengths_give_the_pixels_of_the_picture() -> None:
    # Runs, literals of odd length, a jump and a missing end of line, 6 x 3 from below.
    runs = b"\3\1\0\3\2\3\4\0\0\0" + b"\0\2\2\0\2\5\2\6\0\0" + b"\6\7\0\1"
    head = b"BM" + struct.pack("<IHHI", 54 + 1024 + len(runs), 0, 0, 54 + 1024)
    info = struct.pack("<IiiHHIIiiII", 40, 6, 3, 1, 8, 1, len(runs), 0, 0, 256, 0)
    palette = b"".join(bytes([level, level, level, 0]) for level in range(256))
    pixels = decode_file(head + info + palette + runs, "BMP", "pil", LIMITS)
    expected = [[7] * 6, [0, 0, 5, 5, 6, 6], [1, 1, 1, 2, 3, 4]]
    np.testing.assert_array_equal(pixels[:, :, 0], expected)
