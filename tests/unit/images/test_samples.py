"""PNG and TIFF of each bit depth give the value that their samples stand for, or are refused by name."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import images
import numpy as np
import pytest
from numpy.typing import NDArray
from readers import reader
from samples import BLACK_IS_ZERO, CMYK, PALETTE, RGB, WHITE_IS_ZERO, YCBCR, Tiff, png_of

from siglip_serve.checkpoint.model_config import ImageConfig
from siglip_serve.errors import ImageError
from siglip_serve.images.resize import Mode

CONFIG = ImageConfig(size=8, resample="bicubic", rescale=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3)
CIELAB = 8
# Pillow keeps the upper 8 of 16 bits of colours, as transformers' own preprocessing does. With
# transparency that rounding can add up to three levels.
ROUNDING, ROUNDING_16 = 1.3, 3

every_mode = pytest.mark.parametrize("mode", get_args(Mode))
every_layout = pytest.mark.parametrize(
    ("order", "reversed_bits", "deflate"),
    [(order, back, packed) for order in ("II", "MM") for back in (False, True) for packed in (False, True)],
)


def decode(data: bytes, mode: Mode = "pil") -> NDArray[np.float64]:
    return reader(CONFIG, mode).decode(data).astype(np.float64)


def refusal(data: bytes) -> str:
    with pytest.raises(ImageError) as refused:
        decode(data)
    return str(refused.value)


def draw(bits: int, channels: int) -> NDArray[np.int64]:
    """Random samples [7, 13, channels]; with 13 columns no row of 1 to 4 bits ends with a byte."""
    return np.random.default_rng(bits * 10 + channels).integers(0, 2**bits, (7, 13, channels))


def grey(samples: NDArray[Any], bits: int) -> NDArray[np.float64]:
    """Levels 0 to 255 [H, W, 3] of samples [H, W, 1]."""
    return np.repeat(samples * 255 / (2**bits - 1), 3, axis=2)


def on_white(colors: NDArray[Any], opacity: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(colors * opacity + 255 * (1 - opacity), dtype=np.float64)


# ---- PNG


@every_mode
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_png_grey_has_its_value_and_its_transparent_value(mode: Mode, bits: int) -> None:
    samples = draw(bits, 1)
    np.testing.assert_allclose(decode(png_of(samples, bits, 0), mode), grey(samples, bits), atol=0.51)
    for value in {0, 1, 2**bits - 1, int(samples[3, 3, 0])}:
        expected = np.where(samples == value, 255, grey(samples, bits))
        for stored in {value, value | 1 << 15 if bits < 16 else value}:  # bits above the depth mean nothing
            data = png_of(samples, bits, 0, (b"tRNS", struct.pack(">H", stored)))
            np.testing.assert_allclose(decode(data, mode), expected, atol=0.51)


@every_mode
@pytest.mark.parametrize("bits", [8, 16])
def test_png_rgb_has_its_value_and_its_transparent_color(mode: Mode, bits: int) -> None:
    samples = draw(bits, 3)
    samples[0, :2] = samples[3, 3]
    samples[0, 1, 2] ^= 1  # another colour, though the same in its upper bits
    levels = samples * 255 / (2**bits - 1)
    np.testing.assert_allclose(decode(png_of(samples, bits, 2), mode), levels, atol=ROUNDING)
    data = png_of(samples, bits, 2, (b"tRNS", struct.pack(">3H", *samples[3, 3].tolist())))
    transparent = (samples == samples[3, 3]).all(axis=2, keepdims=True)
    assert transparent.sum() == 2
    np.testing.assert_allclose(decode(data, mode), np.where(transparent, 255, levels), atol=ROUNDING)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("opacities", [[0], [255, 0], [255, 0, 10], [0, 10], [7, 80, 0], [], [255]])
def test_png_palette_has_the_opacity_of_each_color(bits: int, opacities: list[int]) -> None:
    samples, palette = draw(bits, 1), draw(8, 300)[0].reshape(-1, 3)[: 2**bits]
    palette = np.resize(palette, (2**bits, 3))
    opacity = np.full(2**bits, 255)
    opacities = opacities[: 2**bits]
    opacity[: len(opacities)] = opacities
    chunks = [(b"PLTE", palette.astype(np.uint8).tobytes()), (b"tRNS", bytes(opacities))]
    data = png_of(samples, bits, 3, *chunks[: 2 if opacities else 1])
    expected = on_white(palette[samples[..., 0]], opacity[samples] / 255)
    np.testing.assert_allclose(decode(data), expected, atol=ROUNDING)


@pytest.mark.parametrize("bits", [8, 16])
def test_png_alpha_is_put_on_white(bits: int) -> None:
    for kind, channels in ((4, 2), (6, 4)):
        samples = draw(bits, channels)
        opacity = samples[..., -1:] / (2**bits - 1)
        colors = np.broadcast_to(samples[..., :-1] * 255 / (2**bits - 1), (7, 13, 3))
        np.testing.assert_allclose(
            decode(png_of(samples, bits, kind)), on_white(colors, opacity), atol=ROUNDING_16
        )


# ---- TIFF


@every_layout
@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("photometric", [WHITE_IS_ZERO, BLACK_IS_ZERO])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_tiff_grey_has_its_value(
    bits: int, photometric: int, planes: bool, order: str, reversed_bits: bool, deflate: bool
) -> None:
    samples = draw(bits, 1)
    data = Tiff(samples, bits, photometric, order, reversed_bits, planes, deflate).file()
    zero = "WhiteIsZero" if photometric == WHITE_IS_ZERO else "BlackIsZero"
    # Pillow has no decoder of these.
    if reversed_bits and (
        bits == 12
        or (bits == 16 and (photometric == WHITE_IS_ZERO or order == "MM"))
        or (bits == 8 and photometric == WHITE_IS_ZERO and not deflate)
    ):
        assert refusal(data).startswith(f"TIFF of {bits}-bit unsigned {zero}")
        return
    expected = grey(samples, bits)
    expected = 255 - expected if photometric == WHITE_IS_ZERO else expected
    np.testing.assert_allclose(decode(data), expected, atol=0.51)


@every_mode
@pytest.mark.parametrize("value", [0, 1, 300, 32768, 60000, 65535])
def test_tiff_of_16_bits_is_scaled_in_both_directions(mode: Mode, value: int) -> None:
    samples = np.full((9, 9, 1), value)
    for photometric, expected in ((BLACK_IS_ZERO, value / 257), (WHITE_IS_ZERO, 255 - value / 257)):
        for order in ("II", "MM"):
            data = Tiff(samples, 16, photometric, order).file()
            np.testing.assert_allclose(decode(data, mode), expected, atol=0.51)


@every_layout
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_tiff_palette_has_its_colors(bits: int, order: str, reversed_bits: bool, deflate: bool) -> None:
    samples = draw(bits, 1)
    palette = np.resize(draw(16, 300)[0].reshape(-1, 3), (2**bits, 3)).astype(np.uint16)
    tiff = Tiff(samples, bits, PALETTE, order, reversed_bits, False, deflate, palette=palette)
    if reversed_bits and not deflate and bits < 8:
        assert refusal(tiff.file()).startswith(f"TIFF of {bits}-bit unsigned palette with reversed bits")
        return
    np.testing.assert_allclose(decode(tiff.file()), palette[samples[..., 0]] / 257, atol=ROUNDING)


@pytest.mark.parametrize("order", ["II", "MM"])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_tiff_colors_have_their_value_or_are_refused(
    bits: int, planes: bool, deflate: bool, order: str
) -> None:
    full = 2**bits - 1
    three, four = draw(bits, 3), draw(bits, 4)
    levels, opacity = four[..., :3] * 255 / full, four[..., 3:] / full
    premultiplied = np.concatenate([four[..., :3] * opacity, four[..., 3:]], axis=2).astype(np.int64)
    ink = four * 255 / full
    kinds: dict[str, tuple[Tiff, NDArray[Any]]] = {
        "RGB": (Tiff(three, bits, RGB), three * 255 / full),
        "unspecified": (Tiff(four, bits, RGB, extra=(0,)), levels),
        "premultiplied": (
            Tiff(premultiplied, bits, RGB, extra=(1,)),
            premultiplied[..., :3] * 255 / full + 255 * (1 - opacity),
        ),
        "alpha": (Tiff(four, bits, RGB, extra=(2,)), on_white(levels, opacity)),
        "CMYK": (Tiff(four, bits, CMYK), (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255),
    }
    for name, (tiff, expected) in kinds.items():
        data = Tiff(**{**vars(tiff), "planes": planes, "deflate": deflate, "order": order}).file()
        if planes and not deflate and (bits == 16 or name in ("premultiplied", "unspecified")):
            assert "in separate planes is not served" in refusal(data), name
            continue
        atol = ROUNDING if bits == 8 or name == "RGB" else ROUNDING_16
        np.testing.assert_allclose(decode(data), expected, atol=atol, err_msg=name)


@pytest.mark.parametrize("deflate", [False, True])
def test_tiff_ycbcr_has_its_value(deflate: bool) -> None:
    samples = draw(8, 3)
    y, blue, red = (samples[..., index].astype(float) for index in range(3))
    expected = np.stack(
        [
            y + 1.402 * (red - 128),
            y - 0.344136 * (blue - 128) - 0.714136 * (red - 128),
            y + 1.772 * (blue - 128),
        ],
        axis=2,
    ).clip(0, 255)
    data = Tiff(samples, 8, YCBCR, deflate=deflate, more=[(530, (1, 1))]).file()
    np.testing.assert_allclose(decode(data), expected, atol=ROUNDING)


def test_tiff_with_a_sign_has_its_value_or_is_refused() -> None:
    for bits in (8, 16):
        positive = draw(bits, 1) // 2
        data = Tiff(positive, bits, BLACK_IS_ZERO, sample_format=2).file()
        np.testing.assert_allclose(decode(data), grey(positive, bits), atol=0.51)
        data = Tiff(positive + 2 ** (bits - 1), bits, BLACK_IS_ZERO, sample_format=2).file()
        assert refusal(data).startswith("grey values ")


@pytest.mark.parametrize(
    ("tiff", "message"),
    [
        (Tiff(draw(6, 1), 6, BLACK_IS_ZERO), "TIFF of 6-bit unsigned BlackIsZero is not served, expected "),
        (Tiff(draw(10, 3), 10, RGB), "TIFF of 10-bit unsigned RGB is not served"),
        (Tiff(draw(4, 1), 32, WHITE_IS_ZERO), "TIFF of 32-bit unsigned WhiteIsZero is not served"),
        (Tiff(draw(8, 3), 8, CIELAB), "TIFF of CIELab colours is not served"),
        (Tiff(draw(8, 1), 8, 32803), "TIFF of 8-bit unsigned colour filter array is not served"),
        (Tiff(draw(8, 1), 8, 77), "TIFF of 8-bit unsigned photometric interpretation 77 is not served"),
        (Tiff(draw(16, 1), 16, BLACK_IS_ZERO, sample_format=3), "TIFF of 16-bit floating-point BlackIsZero"),
        (Tiff(draw(16, 2), 16, BLACK_IS_ZERO, extra=(2,)), "BlackIsZero with an extra sample is not served"),
        (Tiff(draw(8, 2), 8, BLACK_IS_ZERO, planes=True, deflate=True, extra=(2,)), "separate planes is not"),
        (Tiff(draw(8, 3), 8, RGB, planes=True, reversed_bits=True), "planes with reversed bits is not"),
        (Tiff(draw(8, 3), 8, YCBCR, more=[(530, (2, 2))]), "TIFF of uncompressed subsampled YCbCr is not"),
    ],
)  # fmt: skip
def test_tiff_that_pillow_would_misread_is_refused_by_name(tiff: Tiff, message: str) -> None:
    assert message in refusal(tiff.file())


@pytest.mark.parametrize(
    ("compression", "name"),
    [(34712, "JPEG 2000"), (50002, "JPEG XL"), (12345, "method 12345")],
)
def test_tiff_of_an_unknown_compression_is_refused_by_name(compression: int, name: str) -> None:
    whole = Tiff(draw(8, 1), 8, BLACK_IS_ZERO).file()
    entry = struct.pack("<HHI", 259, 3, 1)
    data = whole.replace(entry + b"\1\0", entry + struct.pack("<H", compression))
    assert data != whole
    assert refusal(data).startswith(f"TIFF of 8-bit unsigned BlackIsZero compressed by {name} is not served")


def test_nothing_is_written_to_the_log(tmp_path: Path) -> None:
    """Neither libtiff's warnings and errors about a file, nor those of Pillow."""
    whole = Tiff(draw(8, 1), 8, BLACK_IS_ZERO, deflate=True, more=[(65000, (1,))]).file()
    samples = struct.pack("<HHI", 277, 3, 1)
    files = {
        "unknown tag": whole,
        "broken data": whole[:8] + bytes(50) + whole[58:],
        "many samples": whole.replace(samples + b"\1", samples + b"\x63"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from siglip_serve.errors import ImageError\n"
        "from siglip_serve.images.decode import decode_file\n"
        "from siglip_serve.images.formats import ImageLimits\n"
        "for file in sys.argv[1:]:\n"
        "    try:\n"
        "        print(decode_file(Path(file).read_bytes(), 'TIFF', 'fast', ImageLimits()).shape)\n"
        "    except ImageError as error:\n"
        "        print(error)\n"
    )
    command = [sys.executable, "-c", program, *(str(tmp_path / name) for name in files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    read, broken, many = done.stdout.splitlines()
    assert read == "(7, 13, 3)"
    assert broken.startswith("broken TIFF: ")
    assert "TIFF" in many
    assert done.stderr == ""


# ---- formats that are not served


@every_mode
@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\xff\x0a" + bytes(50), "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "JPEG XL"),
        (b"\xff\x4f\xff\x51" + bytes(50), "JPEG 2000"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(50), "JPEG 2000"),
        (b"II\xbc\x01" + bytes(50), "JPEG XR"),
        (b"\xff\xd8\xff\xf7" + bytes(50), "JPEG-LS"),
        (b"%PDF-1.7\n", "PDF"),
    ],
)
def test_formats_that_are_not_served_are_named(mode: Mode, data: bytes, name: str) -> None:
    with pytest.raises(ImageError, match=f"^not a decodable image: {name} is not served; expected JPEG, PNG"):
        decode(data, mode)


@every_mode
def test_jpeg_of_12_bits_is_named(mode: Mode) -> None:
    whole = images.encode(images.photo(40, 30), "JPEG")
    frame = whole.index(b"\xff\xc0\0\x11\x08")
    data = whole[: frame + 1] + b"\xc1\0\x11\x0c" + whole[frame + 5 :]
    with pytest.raises(ImageError, match=r"^JPEG of 12 bits per sample is not served, expected 8$"):
        decode(data, mode)


@pytest.mark.skipif(not images.HAS_AVIF, reason="this Pillow reads no AVIF")
def test_avif_of_a_general_brand_is_read() -> None:
    whole = images.encode(images.photo(40, 30), "AVIF")
    assert whole[8:12] == b"avif"
    general = whole[:8] + b"mif1" + whole[12:]
    np.testing.assert_array_equal(decode(general), decode(whole))
