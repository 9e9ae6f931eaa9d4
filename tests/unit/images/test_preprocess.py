"""Image files become pixels; what is no image becomes an error that says so."""

from __future__ import annotations

import base64
import binascii
import random
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import images
import numpy as np
import pytest
from PIL import Image
from readers import reader

from siglip_serve.checkpoint.model_config import ImageConfig
from siglip_serve.errors import ImageError, ImageTooLargeError, InvalidInputError, SettingsError
from siglip_serve.images.formats import ImageLimits, decode_base64
from siglip_serve.images.preprocess import Preprocessor
from siglip_serve.images.resize import Mode

SIZE = 32
CONFIG = ImageConfig(size=SIZE, resample="bicubic", rescale=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3)
MODES: tuple[Mode, ...] = get_args(Mode)
WHITE = (255, 255, 255)
FILES = {**images.image_files(), **images.oriented_files()}
EXTRA_SCANS = 60

every_mode = pytest.mark.parametrize("mode", MODES)


def preprocessor(mode: Mode, **limits: int) -> Preprocessor:
    return reader(CONFIG, mode, ImageLimits(**limits))


def flat(color: tuple[int, ...] | int, mode: str = "RGB", size: tuple[int, int] = (20, 10)) -> Image.Image:
    return Image.new(mode, size, color)


@every_mode
def test_every_kind_of_file_gives_contiguous_rgb(mode: Mode) -> None:
    process = preprocessor(mode)
    for name, data in FILES.items():
        pixels = process(data)
        assert pixels.shape == (SIZE, SIZE, 3), name
        assert pixels.dtype == np.uint8, name
        assert pixels.flags.c_contiguous, name
        assert pixels.std() > 1 or name == "png 1x1", name


@every_mode
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_few_rows_are_not_channels(mode: Mode, rows: int) -> None:
    pixels = preprocessor(mode)(images.encode(flat((10, 120, 240), size=(50, rows)), "PNG"))
    assert (pixels == (10, 120, 240)).all()


@every_mode
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (1, 65_535), (65_535, 1)])
def test_resizes_extreme_shapes(mode: Mode, size: tuple[int, int]) -> None:
    assert (preprocessor(mode)(images.encode(flat((7, 8, 9), size=size), "PNG")) == (7, 8, 9)).all()


@every_mode
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_turns_the_picture_upright(mode: Mode, kind: str, orientation: int) -> None:
    upright = np.zeros((40, 80, 3), np.uint8)
    upright[:20, :40], upright[:20, 40:] = (255, 0, 0), (0, 255, 0)
    upright[20:, :40], upright[20:, 40:] = (0, 0, 255), WHITE
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    image = Image.fromarray(np.ascontiguousarray(stored))
    pixels = preprocessor(mode)(images.encode(image, kind, exif=images.exif(orientation)))
    corners = [pixels[4, 4], pixels[4, -5], pixels[-5, 4], pixels[-5, -5]]
    np.testing.assert_allclose(corners, [(255, 0, 0), (0, 255, 0), (0, 0, 255), WHITE], atol=12)


@every_mode
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0",
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0",
    ],
)
def test_a_broken_exif_block_is_ignored(mode: Mode, kind: str, block: bytes) -> None:
    photo = images.photo(60, 40)
    process = preprocessor(mode)
    plain, broken = images.encode(photo, kind), images.encode(photo, kind, exif=block)
    np.testing.assert_array_equal(process(broken), process(plain))


@every_mode
@pytest.mark.skipif(not images.HAS_AVIF, reason="this Pillow reads no AVIF")
def test_a_broken_exif_block_in_avif_is_ignored(mode: Mode) -> None:
    whole = images.encode(images.photo(90, 60), "AVIF", exif=images.exif(6))
    broken = whole.replace(b"MM\0*", b"????").replace(b"II*\0", b"????")
    assert broken != whole
    np.testing.assert_array_equal(preprocessor(mode)(broken), preprocessor(mode)(whole))


@every_mode
@pytest.mark.parametrize(
    ("image", "options"),
    [
        (flat((9, 9, 9, 0), "RGBA"), {}),
        (flat((9, 0), "LA"), {}),
        (flat((9, 9, 9)), {"transparency": (9, 9, 9)}),
        (flat(9, "L"), {"transparency": 9}),
        (flat((9, 9, 9)).quantize(2), {"transparency": 0}),
        (flat((9, 9, 9)).quantize(2), {"transparency": bytes(1)}),
        (flat(0, "1"), {"transparency": 0}),
        (flat(900, "I;16"), {"transparency": 900}),
    ],
)
def test_transparency_becomes_white(mode: Mode, image: Image.Image, options: dict[str, object]) -> None:
    assert (preprocessor(mode)(images.encode(image, "PNG", **options)) == 255).all()


@every_mode
def test_reads_premultiplied_grey(mode: Mode) -> None:
    # Tag 338 (ExtraSamples) 2 is straight alpha, 1 is premultiplied.
    straight = images.encode(flat((100, 128), "LA"), "TIFF")
    entry = struct.pack("<HHI", 338, 3, 1)
    premultiplied = straight.replace(entry + b"\2", entry + b"\1")
    assert premultiplied != straight
    np.testing.assert_allclose(preprocessor(mode)(straight), 100 * 128 / 255 + 127, atol=1)
    np.testing.assert_allclose(preprocessor(mode)(premultiplied), 100 + 127, atol=1)


@every_mode
def test_scales_sixteen_bit_grey_to_eight_bits(mode: Mode) -> None:
    for value, expected in ((0, 0), (128, 0), (129, 1), (32768, 128), (65535, 255)):
        assert (preprocessor(mode)(images.encode(flat(value, "I;16"), "PNG")) == expected).all()


@every_mode
def test_reads_the_first_frame_of_an_animation(mode: Mode) -> None:
    frames = [flat(color) for color in ((250, 0, 0), (0, 250, 0))]
    data = images.encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (preprocessor(mode)(data) == (250, 0, 0)).all()


@every_mode
@pytest.mark.parametrize("name", images.malformed_files())
def test_malformed_input_is_an_image_error(mode: Mode, name: str) -> None:
    with pytest.raises(ImageError) as caught:
        preprocessor(mode)(images.malformed_files()[name])
    message = str(caught.value)
    assert "0x" not in message
    assert "\n" not in message
    assert str(caught.value.at("INPUT_IMAGE", 3)) == f"INPUT_IMAGE[3]: {message}"


@every_mode
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", r"^empty, expected the bytes of an image file$"),
        (
            "text",
            r"^not a decodable image: 5 bytes that begin with 68656c6c6f; "
            r"expected JPEG, PNG, WebP, GIF, BMP",
        ),
        ("jpeg without image data", r"^truncated JPEG: its 300 bytes hold no image data$"),
        ("jpeg cut in half", r"^truncated JPEG: image file is truncated"),
        ("png cut in half", r"^truncated PNG: "),
        ("png wrong checksum", r"^broken PNG: the header of its \d+ bytes cannot be read$"),
        ("tiff float", r"^floating-point pixels"),
        ("tiff grey beyond 16 bit", r"^grey values from 70000 to 70000, expected 0 to 65535$"),
    ],
)
def test_messages_name_the_fault_of_the_file(mode: Mode, name: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        preprocessor(mode)(images.malformed_files()[name])


@every_mode
def test_refuses_more_bytes_than_the_limit(mode: Mode) -> None:
    data = images.encode(flat(WHITE), "PNG")
    assert preprocessor(mode, max_bytes=len(data))(data).all()
    with pytest.raises(
        ImageTooLargeError, match=rf"^{len(data)} bytes, at most {len(data) - 1} are allowed$"
    ):
        preprocessor(mode, max_bytes=len(data) - 1)(data)


@every_mode
def test_too_many_pixels_are_refused_before_decoding(mode: Mode) -> None:
    # Without rows: that it is not "truncated" shows that nothing was decoded.
    with pytest.raises(ImageTooLargeError, match=r"^12000x9000 pixels, at most 64000000 are allowed$"):
        preprocessor(mode)(images.png(12000, 9000, rows=b""))
    with pytest.raises(ImageTooLargeError, match=r"^50000x50000 pixels, at most 64000000 are allowed$"):
        preprocessor(mode)(images.png(50000, 50000, rows=b""))
    for name, data in images.image_files().items():
        if name not in ("png 1x1", "jpeg tiny"):
            with pytest.raises(ImageTooLargeError, match=r"at most 89( pixels)? are allowed"):
                preprocessor(mode, max_pixels=89)(data)


@every_mode
def test_pillows_pixel_limit_raises_the_same_error(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageTooLargeError, match="at most 64000000 pixels are allowed"):
        preprocessor(mode)(images.encode(flat(WHITE, size=(20, 20)), "PNG"))
    assert preprocessor(mode)(images.encode(flat(WHITE, size=(10, 15)), "PNG")).all()


@every_mode
def test_a_jpeg_with_faults_that_pillow_forgives_is_accepted(mode: Mode) -> None:
    whole = images.encode(images.photo(90, 60), "JPEG")
    tables = whole.index(b"\xff\xdb")
    faulty = whole[:tables] + b"\x12\x34" + whole[tables:]
    expected = preprocessor("pil")(whole)
    np.testing.assert_array_equal(preprocessor("pil")(faulty), expected)
    np.testing.assert_allclose(preprocessor(mode)(faulty), expected, atol=2)


def test_a_jpeg_of_unusual_sampling_is_left_to_pillow() -> None:
    data = images.encode(images.photo(90, 60), "JPEG", subsampling="4:2:0")
    brightness = data.index(b"\xff\xc0") + 11
    file = data[:brightness] + b"\x14" + data[brightness + 1 :]  # 1 by 4, for which simplejpeg has no name
    np.testing.assert_allclose(preprocessor("fast")(file), preprocessor("pil")(file), atol=2)


@every_mode
@pytest.mark.parametrize("name", ["jpeg segments", "jpeg scans", "png text", "jpeg exif pieces", "jpeg fill"])
def test_reads_or_refuses_time_bombs_quickly(mode: Mode, name: str) -> None:
    jpeg = images.encode(images.photo(90, 60), "JPEG", progressive=True)
    last, end = jpeg.rindex(b"\xff\xda"), jpeg.rindex(b"\xff\xd9")
    exif = b"\xff\xe1\0\x0bExif\0\0\0\0\0"
    text = zlib.compress(bytes(2**20))
    data, expected = {
        "jpeg segments": (jpeg[:2] + b"\xff\xfe\0\x03." * 20_000 + jpeg[2:], "more than 10000 segments"),
        "jpeg scans": (jpeg[:end] + jpeg[last:end] * EXTRA_SCANS + jpeg[end:], "scans, expected at most"),
        "png text": (images.png(9, 9, *[(b"zTXt", b"a\0\0" + text)] * 99), "text chunks"),
        "jpeg exif pieces": (jpeg[:2] + exif * 9_900 + jpeg[2:], None),
        "jpeg fill": (jpeg[:2] + b"\xff" * 2**20 + jpeg[2:], None),
    }[name]
    if expected is None:
        assert preprocessor(mode)(data).any()
    else:
        with pytest.raises(ImageError, match=expected):
            preprocessor(mode)(data)


def test_mutated_files_give_pixels_or_an_input_error() -> None:
    rng = random.Random(2024)
    files = [data for data in FILES.values() if len(data) < 60_000]
    outcomes = {"pixels": 0, "error": 0}
    readers = [preprocessor(mode, max_pixels=2_000_000) for mode in MODES]
    for _ in range(1500):
        data = images.mutations(rng.choice(files), rng)
        results: list[object] = []
        for read in readers:
            try:
                results.append(read(data).shape)
            except InvalidInputError as error:
                results.append(type(error))
        assert results[0] == results[1]
        outcomes["pixels" if results[0] == (SIZE, SIZE, 3) else "error"] += 1
    assert min(outcomes.values()) > 300


def test_threads_share_a_preprocessor_and_leave_warnings_alone() -> None:
    process = preprocessor("fast")
    names = ["png palette", "tiff", "jpeg cmyk", "jpeg 4:2:0", "gif"] * 10
    filters = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda name: process(FILES[name]), names))
    assert warnings.filters == filters
    for name, pixels in zip(names, results, strict=True):
        np.testing.assert_array_equal(pixels, process(FILES[name]))


def test_pil_mode_needs_neither_torch_nor_simplejpeg() -> None:
    program = (
        "import sys\n"
        "from siglip_serve.checkpoint.config import ImageConfig\n"
        "from siglip_serve.images.preprocess import Preprocessor\n"
        "config = ImageConfig(8, 'bilinear', 1 / 255, (0.5,) * 3, (0.5,) * 3)\n"
        "assert Preprocessor(config, 'pil')(sys.stdin.buffer.read()).shape == (8, 8, 3)\n"
        "assert not {'torch', 'simplejpeg'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], input=FILES["jpeg 4:2:0"], check=True)


def test_refuses_an_unknown_mode() -> None:
    with pytest.raises(SettingsError, match="'turbo', expected one of fast, scaled, pil"):
        Preprocessor(CONFIG, "turbo")  # type: ignore[arg-type]


def test_decodes_base64() -> None:
    data = bytes(range(256))
    assert decode_base64(base64.b64encode(data)) == data
    assert decode_base64(base64.encodebytes(data)) == data
    assert decode_base64(b" \r\n\t AA==\n") == b"\0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", r"^empty, expected base64 text$"),
        (b" \n", r"^empty, expected base64 text$"),
        (b"data:image/png;base64,AA==", r"^not base64: character 4 is b':', expected only A-Z"),
        (b"AA-_", r"^not base64: character 2 is b'-'"),
        (b"\xff\xd8\xff\xe0", r"^not base64: character 0 is b'\\xff'"),
        (b"AAA", r"^not base64: 3 characters, incorrect padding; expected a multiple of 4"),
        (b"AA==AA==", r"^not base64: 8 characters, .*padding"),
        (b"=AAA", r"^not base64: 4 characters, .*padding"),
    ],
)
def test_refuses_text_that_is_not_base64(text: bytes, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        decode_base64(text)


def test_takes_the_base64_that_python_takes_strictly() -> None:
    draw = random.Random(7)
    for _ in range(20_000):
        text = bytes(draw.choice(b"ABab01+/=-_!\x00\xff") for _ in range(draw.randrange(1, 13)))
        try:
            expected: bytes | None = binascii.a2b_base64(text, strict_mode=True)
        except binascii.Error:
            expected = None
        try:
            found: bytes | None = decode_base64(text)
        except InvalidInputError:
            found = None
        assert found == expected, text


def test_refuses_base64_of_more_bytes_than_the_limit() -> None:
    limits = ImageLimits(max_bytes=3)
    assert decode_base64(b"A A A A", limits) == bytes(3)
    with pytest.raises(ImageTooLargeError, match="8 characters of base64, at most 3 bytes are allowed"):
        decode_base64(b"AAAAAAA=", limits)
