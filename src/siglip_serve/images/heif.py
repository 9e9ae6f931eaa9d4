"""HEIC, in which iPhones store photographs, read by the extra `heif` where it is installed."""

from __future__ import annotations

import io
from functools import cache
from importlib.util import find_spec

from PIL import Image, ImageFile

__all__ = ["HEIF_HINT", "HEIF_INSTALLED", "open_heif"]

HEIF_INSTALLED = find_spec("pillow_heif") is not None
HEIF_HINT = "HEIC needs the extra heif (`.venv/bin/pip install -e '.[heif]'` in the checkout of the server)"


def open_heif(data: bytes) -> ImageFile.ImageFile:
    """The main picture of a file, whose pixels are decoded when it is loaded, and then upright.

    Orientation is a property of the picture itself: libheif applies it, and readers are to ignore EXIF's.
    Deeper colours than 8 bits come as 8 bits, and deeper grey as 16.

    Raises:
        UnidentifiedImageError: the header is broken.
    """
    _register()
    image = Image.open(io.BytesIO(data), formats=("HEIF",))
    for key in ("exif", "xmp"):
        image.info.pop(key, None)
    return image


@cache
def _register() -> None:
    import pillow_heif

    # One thread, because the other cores belong to other images, and nothing but the main picture.
    pillow_heif.register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)
