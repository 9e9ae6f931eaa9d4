"""HEIC files, with the extra `heif` and without. pillow-heif itself writes them."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from typing import Any, get_args

import numpy as np
import pillow_heif
import pytest
from images import photo
from numpy.typing import NDArray
from PIL import Image, ImageOps
from readers import reader

from siglip_serve.checkpoint.model_config import ImageConfig
from siglip_serve.errors import ImageError, ImageTooLargeError
from siglip_serve.images.decode import decode_file
from siglip_serve.images.formats import ImageLimits
from siglip_serve.images.resize import Mode

CONFIG = ImageConfig(size=8, resample="bicubic", rescale=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3)
LOSS = 12  # levels that the encoder may change; it reaches 8
every_mode = pytest.mark.parametrize("mode", get_args(Mode))


def heic(image: Image.Image, **options: Any) -> bytes:
    """The image as a file of good quality."""
    pillow_heif.register_heif_opener()
    file = io.BytesIO()
    image.save(file, "HEIF", **{"quality": 97, "chroma": 444, **options})
    return file.getvalue()


def decode(data: bytes, mode: Mode = "fast", limits: ImageLimits | None = None) -> NDArray[np.int64]:
    """RGB [H, W, 3] of a file."""
    return reader(CONFIG, mode, limits).decode(data).astype(np.int64)


def close(found: NDArray[np.int64], expected: Image.Image | NDArray[Any]) -> None:
    """Compare within the encoder's loss."""
    wanted = np.asarray(expected).astype(np.int64)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= LOSS


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x112] = orientation
    return block.tobytes()


@every_mode
def test_reads_the_pixels(mode: Mode) -> None:
    picture = photo(70, 46)
    close(decode(heic(picture), mode), picture)
    picture = photo(10, 6).resize((70, 46))
    data = heic(picture, chroma=420)  # as telephones store it, with fewer pixels of colour
    assert data[8:12] == b"heic"
    assert np.abs(decode(data, mode) - np.asarray(picture)).mean() < 3
    assert reader(CONFIG, mode)(data).shape == (8, 8, 3)


def test_reads_a_grid_of_tiles() -> None:
    """Telephones store a photograph as tiles."""
    picture = photo(300, 200)
    data = heic(picture, tile_size=128)
    assert b"grid" in data
    close(decode(data), picture)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turns_a_picture_upright_once(orientation: int) -> None:
    """The orientation is there twice, as telephones write it: in EXIF, and as a property of the picture."""
    stored = photo(64, 40)
    stored.getexif()[0x112] = orientation
    upright = ImageOps.exif_transpose(stored)
    data = heic(photo(64, 40), exif=exif(orientation))
    assert (b"irot" in data or b"imir" in data) == (orientation > 1)
    close(decode(data), upright)


def test_puts_transparency_on_white() -> None:
    picture = photo(64, 40)
    picture.putalpha(Image.linear_gradient("L").resize((64, 40)))
    white = Image.new("RGBA", picture.size, "white")
    close(decode(heic(picture)), Image.alpha_composite(white, picture).convert("RGB"))


def test_scales_deep_grey() -> None:
    values = np.linspace(0, 65535, 64 * 40).reshape(40, 64).astype(np.uint16)
    found = decode(heic(Image.fromarray(values)))
    close(found, np.repeat((values // 257)[..., np.newaxis], 3, axis=2))


def test_reads_deep_colours() -> None:
    picture = photo(64, 40)
    deep = np.asarray(picture).astype(np.uint16) << 8
    file = io.BytesIO()
    made = pillow_heif.from_bytes(mode="RGB;16", size=(64, 40), data=deep.tobytes())
    made.save(file, quality=97, chroma=444)
    assert file.getvalue()[8:12] == b"heix"
    close(decode(file.getvalue()), picture)


@every_mode
def test_refuses_too_many_pixels_before_they_are_decoded(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic(photo(64, 40))

    def load(_image: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(pillow_heif.HeifImageFile, "load", load)
    with pytest.raises(ImageTooLargeError, match="64x40 pixels, at most 2000 are allowed"):
        decode_file(data, "HEIC", mode, ImageLimits(max_pixels=2000))


def test_names_broken_files() -> None:
    whole = heic(photo(64, 40))
    for size in (12, 40, 200, len(whole) // 2, len(whole) - 5):
        with pytest.raises(ImageError, match=r"^(broken|truncated) HEIC: "):
            decode(whole[:size])
    box = b"ftypmif1" + bytes(4) + b"mif1heic"
    with pytest.raises(ImageError, match=r"^broken HEIC: the header of its 124 bytes cannot be read"):
        decode(struct.pack(">I", len(box) + 4) + box + bytes(100))


def test_without_the_extra_it_says_how_to_install_it() -> None:
    code = f"""
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "pillow_heif" else find(name, *rest)
from siglip_serve.images.formats import ImageLimits, identify
try:
    identify({heic(photo(32, 32))!r}, ImageLimits())
except Exception as error:
    sys.exit(str(error))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.startswith("not a decodable image: HEIC is not served; expected JPEG, PNG")
    assert "HEIC," not in done.stderr
    assert "`.venv/bin/pip install -e '.[heif]'` in the checkout of the server" in done.stderr
