"""Images of the caller, as files, PIL images or arrays, become bytes that the server reads."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from siglip_serve_client._operations.requests import refuse_single

__all__ = ["ColorOrder", "ImageLike", "encoded", "on_white", "raw", "refuse_one_image"]

ColorOrder: TypeAlias = Literal["RGB", "BGR"]
ImageLike: TypeAlias = bytes | str | Path | Image.Image | NDArray[np.uint8]

_EIGHT_BITS = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}


def refuse_one_image(argument: str, images: object) -> None:
    """Check that an argument is not one image in place of several.

    An array [H, W, 1, 3 or 4] is one image, whose rows would be taken for images.

    Raises:
        TypeError: one path, str, bytes, PIL image or array of one image.
    """
    refuse_single(argument, images, "images")
    one = isinstance(images, np.ndarray) and (
        images.ndim < 3 or (images.ndim == 3 and images.shape[2] in (1, 3, 4))
    )
    if one or isinstance(images, Image.Image):
        raise TypeError(f"{argument}: one {type(images).__name__}, expected several images")


def encoded(
    image: ImageLike, name: str, color_order: ColorOrder | None, container: Literal["PNG", "BMP"] = "PNG"
) -> bytes:
    """The bytes of an image file: as given or read. Arrays and PIL images become one without loss.

    Args:
        image: arrays are uint8 [H, W] or [H, W, C] with C of 1, 3 or 4. A fourth channel is left out.
        name: name of the argument in messages.
        color_order: of an array with colours. Other images need none.
        container: for arrays and PIL images. PNG is small, and BMP is quick to write and read.

    Raises:
        OSError: the path cannot be read.
        TypeError, ValueError: not an image of these kinds.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        return Path(image).read_bytes()
    pixels, order = raw(image, name, color_order)
    pixels = pixels[:, :, 0] if order is None else pixels[:, :, :3] if order == "RGB" else pixels[:, :, 2::-1]
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    file = io.BytesIO()
    picture.save(file, container, **({"compress_level": 1} if container == "PNG" else {}))
    return file.getvalue()


def raw(
    image: Image.Image | NDArray[np.uint8], name: str, color_order: ColorOrder | None
) -> tuple[NDArray[np.uint8], ColorOrder | None]:
    """Pixels, uint8 [H, W, C] with C of 1, 3 or 4, and the order of their colours, None for grey.

    PIL images are taken as they lie (an EXIF orientation is not applied), transparency on white.

    Raises:
        TypeError, ValueError: as for `encoded`.
    """
    if isinstance(image, Image.Image):
        if image.mode not in _EIGHT_BITS or 0 in image.size:
            width, height = image.size
            raise ValueError(
                f"{name}: PIL image of mode {image.mode} and {width}x{height} pixels, "
                "expected 8 bits a channel and at least 1x1"
            )
        return np.asarray(on_white(image)), "RGB"
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f"{name}: {type(image).__name__}, expected bytes, a path, a PIL image or a NumPy array"
        )
    if image.dtype != np.uint8:
        raise TypeError(f"{name}: array of {image.dtype}, expected uint8 (0 to 255)")
    pixels = image[:, :, None] if image.ndim == 2 else image
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or 0 in pixels.shape:
        raise ValueError(f"{name}: array of shape {list(image.shape)}, expected [H, W] or [H, W, 1, 3 or 4]")
    if pixels.shape[2] == 1:
        return pixels, None
    if color_order not in ("RGB", "BGR"):
        raise ValueError(
            f"color_order: {color_order!r}, expected 'RGB' or 'BGR' with arrays; OpenCV's are 'BGR'"
        )
    return pixels, color_order


def on_white(image: Image.Image) -> Image.Image:
    """Mode RGB, transparency on white."""
    if image.has_transparency_data:
        visible = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), visible)
    return image.convert("RGB")
