"""Kinds of TIFF files that Pillow misreads, corrected or refused, and names of those that it cannot read."""

from __future__ import annotations

import ctypes
import io
import logging

import numpy as np
from PIL import Image, TiffImagePlugin, _imaging

from siglip_serve.errors import ImageError

__all__ = ["grey_range", "load_tiff", "name_unread_tiff", "silence_tiff"]

_BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 258, 259, 262, 266
_SAMPLES, _PLANES, _EXTRA, _SAMPLE_FORMAT, _SUBSAMPLING = 277, 284, 338, 339, 530
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _PALETTE, _YCBCR, _CIELAB = 0, 1, 3, 6, 8
_SIGNED = 2
_PHOTOMETRICS = {
    0: "WhiteIsZero",
    1: "BlackIsZero",
    2: "RGB",
    3: "palette",
    4: "transparency mask",
    5: "CMYK",
    6: "YCbCr",
    8: "CIELab",
    9: "ICCLab",
    10: "ITULab",
    32803: "colour filter array",
    32844: "LogL",
    32845: "LogLuv",
    34892: "LinearRaw",
}
_FORMATS = {1: "unsigned", 2: "signed", 3: "floating-point"}
_COMPRESSIONS = {
    33003: "JPEG 2000",
    33005: "JPEG 2000",
    34712: "JPEG 2000",
    50002: "JPEG XL",
    52546: "JPEG XL",
}
_EXPECTED = "expected 1, 2, 4, 8, 12 or 16 bits of grey, 8 or 16 of RGB or CMYK, 8 of YCbCr, or a palette"

# Pillow decodes these kinds, but its table of kinds lacks them. It gives the values as stored.
for _order in (b"II", b"MM"):
    _grey16 = "I;16" if _order == b"II" else "I;16B"
    for _zero in (_WHITE_IS_ZERO, _BLACK_IS_ZERO):
        TiffImagePlugin.OPEN_INFO.setdefault((_order, _zero, (1,), 1, (12,), ()), ("I;16", "I;12"))
        TiffImagePlugin.OPEN_INFO.setdefault((_order, _zero, (1,), 1, (16,), ()), (_grey16, _grey16))


def load_tiff(image: TiffImagePlugin.TiffImageFile) -> None:
    """Decode an opened TIFF, or refuse it if its kind would be decoded to wrong pixels.

    Raises:
        ImageError: names the kind.
    """
    _check_kind(image)
    try:
        image.load()
    except ValueError as error:
        if "raw mode" not in str(error):
            raise
        raise ImageError(f"{_name(image.tag_v2)} is not served, {_EXPECTED}") from error
    # Pillow reads negative values of 8 bits as 128 and more.
    signed = image.mode == "L" and _first(image.tag_v2.get(_SAMPLE_FORMAT, 1)) == _SIGNED
    if signed and np.asarray(image).max() > 127:
        raise ImageError("grey values below 0, expected 0 to 127 of 8 bits with a sign")


def _check_kind(image: TiffImagePlugin.TiffImageFile) -> None:
    tags = image.tag_v2
    raw = tags.get(_COMPRESSION, 1) == 1
    bits, photometric = _first(tags.get(_BITS, 1)), tags.get(_PHOTOMETRIC, _WHITE_IS_ZERO)
    if photometric == _CIELAB:
        raise ImageError(f"TIFF of CIELab colours is not served, {_EXPECTED}")
    if raw and tags.get(_PLANES, 1) == 2 and tags.get(_SAMPLES, 1) == 1:
        # Pillow would decode each plane by one letter of the raw mode's name.
        kind = tags.get(_SAMPLE_FORMAT, (1,))[:1], tags.get(_FILL_ORDER, 1), (bits,), ()
        raw_mode = TiffImagePlugin.OPEN_INFO[(tags.prefix, photometric, *kind)][1]
        image.tile = [tile._replace(args=(raw_mode, *tuple(tile.args or ())[1:])) for tile in image.tile]
    elif tags.get(_PLANES, 1) == 2 and image.mode not in ("1", "L", "P", "I;16", "I;16B", "I", "F"):
        few = photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _PALETTE)
        if few or (raw and (bits > 8 or tags.get(_FILL_ORDER, 1) == 2)):
            raise ImageError(f"{_name(tags)} is not served, expected the samples of a pixel side by side")
    if raw and photometric == _YCBCR and image.mode == "YCbCr":
        sampling = tags.get(_SUBSAMPLING, (1, 1))
        if tuple(sampling) != (1, 1):
            raise ImageError(
                "TIFF of uncompressed subsampled YCbCr is not served, expected a sampling of 1, 1"
            )


def name_unread_tiff(data: bytes) -> ImageError | None:
    """Name the kind of a TIFF that Pillow does not open, or return None if its tags are broken too."""
    tags = TiffImagePlugin.ImageFileDirectory_v2(data[:16] if data[2:4] in (b"+\0", b"\0+") else data[:8])
    file = io.BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    if not {256, 257, _PHOTOMETRIC} <= set(tags):
        return None
    return ImageError(f"{_name(tags)} is not served, {_EXPECTED}")


def _name(tags: TiffImagePlugin.ImageFileDirectory_v2) -> str:
    """The kind of a TIFF in words, such as `TIFF of 6-bit unsigned RGB`."""
    kind = _first(tags.get(_SAMPLE_FORMAT, 1))
    photometric = tags.get(_PHOTOMETRIC, _WHITE_IS_ZERO)
    name = f"TIFF of {_first(tags.get(_BITS, 1))}-bit {_FORMATS.get(kind, f'sample format {kind}')} "
    name += _PHOTOMETRICS.get(photometric, f"photometric interpretation {photometric}")
    if extra := tags.get(_EXTRA, ()):
        name += " with an extra sample" if len(extra) == 1 else f" with {len(extra)} extra samples"
    if tags.get(_PLANES, 1) == 2:
        name += " in separate planes"
    if tags.get(_FILL_ORDER, 1) != 1:
        name += " with reversed bits"
    compression = tags.get(_COMPRESSION, 1)
    if compression not in TiffImagePlugin.COMPRESSION_INFO:
        name += f" compressed by {_COMPRESSIONS.get(compression, f'method {compression}')}"
    return name


def grey_range(image: Image.Image) -> tuple[int, bool]:
    """The value of full brightness (or with True of black) in a loaded image of more than 8 bits of grey."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0xFFFF, False
    tags = image.tag_v2
    full = 0xFFF if _first(tags.get(_BITS, 1)) == 12 else 0xFFFF
    return full, tags.get(_PHOTOMETRIC, _WHITE_IS_ZERO) == _WHITE_IS_ZERO


def silence_tiff() -> None:
    """Keep complaints of libtiff and Pillow about files off standard error, which is the server's log."""
    logging.getLogger(TiffImagePlugin.__name__).addHandler(logging.NullHandler())
    # Pillow's own module gives the functions of the libtiff that it was linked to.
    pillow = ctypes.CDLL(_imaging.__file__)
    for name in ("TIFFSetWarningHandler", "TIFFSetErrorHandler"):
        function = getattr(pillow, name, None)  # hidden where libtiff is a part of Pillow's module
        if function is not None:
            function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
            function(None)


def _first(values: int | tuple[int, ...]) -> int:
    return values[0] if isinstance(values, tuple) else values
