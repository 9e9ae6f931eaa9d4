"""uint8 RGB pixels `[S, S, 3]` from the bytes of an image file, in the size that the checkpoint wants.

The file is checked (`formats`, `cost`), decoded upright (`decode`, in a process of its own by `watched` if
it may be costly) and resized (`resize`), for NaFlex to patches (`patches`). `pil` mode gives the pixels of
transformers' `SiglipImageProcessorPil`, `CLIPImageProcessorPil` and `Siglip2ImageProcessorPil`. `fast` mode
gives the same within two levels in about half the time. `scaled` mode reads large JPEGs at a fraction of
their size (`scaled`), and everything else as `fast` mode does.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Literal, NamedTuple, get_args

import numpy as np

from siglip_serve.checkpoint.model_config import ImageConfig, NaflexImageConfig
from siglip_serve.config import Color
from siglip_serve.errors import SettingsError
from siglip_serve.images.color import jpeg_profile
from siglip_serve.images.cost import MOST_BYTES, Inspected, inspect
from siglip_serve.images.decode import decode_file
from siglip_serve.images.formats import DEFAULT_LIMITS, ImageLimits, check_size, identify
from siglip_serve.images.jpeg import plain_scan, read_orientation
from siglip_serve.images.paint import SWAPPED_AXES, TURNED, orient
from siglip_serve.images.patches import cut_patches, lay_patches, patched_size
from siglip_serve.images.resize import Mode, Pixels, cut_square, fit, is_long, resize, target_size
from siglip_serve.images.scaled import check_numba
from siglip_serve.images.watched import Watch, WatchedDecoder

__all__ = ["Fitted", "Preprocessor", "ReadMode"]

ReadMode = Literal["fast", "scaled", "pil"]


class Fitted(NamedTuple):
    """A picture as the checkpoint takes it.

    Attributes:
        pixels: uint8 RGB `[S, S, 3]`, 0 to 255, contiguous, for NaFlex `[T, 3 P P]` as of `cut_patches`.
        size: height and width of the file's upright picture.
    """

    pixels: Pixels
    size: tuple[int, int]


class Preprocessor:
    """Conversion of image files to the pixels that the checkpoint takes, before its normalisation.

    Safe to call from several threads. `fast` mode needs torch and simplejpeg, `scaled` mode Numba as
    well, and `pil` mode none of them.

    Args:
        image: the checkpoint's preprocessing.
        mode: of decoding and resizing.
        limits: of one image.
        color: `stored` takes samples as they are, `srgb` converts them by the file's ICC profile.

    Attributes:
        size: S, the side of the pixels.

    Raises:
        SettingsError: there is no such mode, or Numba is missing.
    """

    def __init__(
        self,
        image: ImageConfig,
        mode: ReadMode = "fast",
        limits: ImageLimits = DEFAULT_LIMITS,
        color: Color = "stored",
    ) -> None:
        if mode not in get_args(ReadMode):
            raise SettingsError(
                f"preprocessing mode is {mode!r}, expected one of {', '.join(get_args(ReadMode))}"
            )
        if mode != "pil":
            # Now and not with the first image: torch takes seconds, and a missing package fails the start.
            import_module("simplejpeg")
            import_module("torch")
        self.size = image.size
        self._image = image
        self._mode: Mode = "pil" if mode == "pil" else "fast"
        self._scaled = _open_scaled() if mode == "scaled" else None
        self._limits = limits
        self._color = color
        self._watched = WatchedDecoder(self._mode, limits, color)

    def __call__(self, data: bytes) -> Pixels:
        """Pixels of the file's first frame, upright, on white, fitted to the square whatever its aspect.

        Args:
            data: a whole JPEG, PNG, WebP, GIF, BMP, TIFF, HEIC or AVIF file.

        Returns:
            The pixels of `Fitted`.

        Raises:
            ImageError: not a decodable image.
            ImageTooLargeError: more bytes or pixels than the limits allow.
            ImageCostError: decoding takes more CPU time or memory than the limits allow.
        """
        return self.read(data).pixels

    def read(self, data: bytes, watch: Watch | None = None) -> Fitted:
        """The file's first frame, fitted, and its size. Takes and raises the same as `decode`."""
        kind = identify(data, self._limits)
        file = inspect(data, kind, self._limits)
        if self._scaled is not None and (fitted := self._read_scaled(data, file)):
            return fitted
        picture = self._decode(data, file, watch)
        return Fitted(self.resize(picture), (picture.shape[0], picture.shape[1]))

    def decode(self, data: bytes, watch: Watch | None = None) -> Pixels:
        """The file's first frame, upright, on white: uint8 RGB `[H, W, 3]`. Raises as a call does.

        Args:
            data: the file.
            watch: called with the CPU seconds that another process has spent on the file, if one decodes it.
        """
        kind = identify(data, self._limits)
        return self._decode(data, inspect(data, kind, self._limits), watch)

    def close(self) -> None:
        """End the process that decodes costly files. The next such file would start another."""
        self._watched.close()

    def resize(self, pixels: Pixels) -> Pixels:
        """uint8 RGB `[H, W, 3]` -> `[S, S, 3]`, for NaFlex `[T, 3 P P]`, contiguous, whatever the aspect.

        Raises:
            ImageError: a picture too thin for NaFlex.
        """
        if isinstance(self._image, NaflexImageConfig):
            return cut_patches(pixels, self._image, self._mode)
        return fit(pixels, self._image, self._mode)

    def _decode(self, data: bytes, file: Inspected, watch: Watch | None) -> Pixels:
        if file.cheap:
            return decode_file(data, file.kind, self._mode, self._limits, file.header, color=self._color)
        return self._watched(data, file.kind, watch)

    def _read_scaled(self, data: bytes, file: Inspected) -> Fitted | None:
        """Read a JPEG at a fraction of its size, or return None for a file that has to be read whole."""
        if self._scaled is None or file.header is None or len(data) > MOST_BYTES:
            return None
        if self._color == "srgb" and jpeg_profile(data):
            return None
        scan = plain_scan(data)
        if scan is None:
            return None
        height, width, _ = scan.frame
        check_size(width, height, self._limits)
        orientation = read_orientation(file.header.exif, file.header.xmp)
        turned = orientation in SWAPPED_AXES
        size = (width, height) if turned else (height, width)
        if is_long(self._image, *size):
            return None
        rows, columns = self._target(*size)
        target = (columns, rows) if turned else (rows, columns)  # of the picture as it is stored
        side = self._scaled.scaled_side((height, width), target)
        scaled = self._scaled.read_scaled(data, scan, side) if side else None
        if scaled is None:
            return None
        resized = resize(scaled.pixels, target, self._image.resample, self._mode, scaled.extent)
        if orientation in TURNED:
            resized = orient(resized, orientation, np.empty)
        return Fitted(self._cut(resized), size)

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self._image, NaflexImageConfig):
            return patched_size(self._image, height, width)
        return target_size(self._image, height, width)

    def _cut(self, resized: Pixels) -> Pixels:
        if isinstance(self._image, NaflexImageConfig):
            return lay_patches(resized, self._image)
        return cut_square(resized, self._image)


def _open_scaled() -> ModuleType:
    check_numba()
    from siglip_serve.images.scaled import reader

    reader.warm_up()  # now, since compiling takes seconds
    return reader
