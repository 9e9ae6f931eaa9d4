"""uint8 RGB pixels `[S, S, 3]` from the bytes of an image file, in the size that the checkpoint wants.

The file is checked (`formats`, `cost`), decoded upright (`decode`, in a process of its own by `watched` if
it may be costly) and resized (`resize`), for NaFlex to patches (`patches`). `pil` mode gives the pixels of
transformers' `SiglipImageProcessorPil`, `CLIPImageProcessorPil` and `Siglip2ImageProcessorPil`. `fast` mode
gives the same within two levels in about half the time.
"""

from __future__ import annotations

from importlib import import_module

from siglip_serve.checkpoint.model_config import ImageConfig, NaflexImageConfig
from siglip_serve.config import Color
from siglip_serve.errors import SettingsError
from siglip_serve.images.cost import inspect
from siglip_serve.images.decode import decode_file
from siglip_serve.images.formats import DEFAULT_LIMITS, ImageLimits, identify
from siglip_serve.images.patches import cut_patches
from siglip_serve.images.resize import Mode, Pixels, fit
from siglip_serve.images.watched import Watch, WatchedDecoder

__all__ = ["Preprocessor"]


class Preprocessor:
    """Conversion of image files to the pixels that the checkpoint takes, before its normalisation.

    Safe to call from several threads. `fast` mode needs torch and simplejpeg, `pil` mode neither.

    Args:
        image: the checkpoint's preprocessing.
        mode: of decoding and resizing.
        limits: of one image.
        color: `stored` takes samples as they are, `srgb` converts them by the file's ICC profile.

    Attributes:
        size: S, the side of the pixels.

    Raises:
        SettingsError: `mode` is neither `fast` nor `pil`.
    """

    def __init__(
        self,
        image: ImageConfig,
        mode: Mode = "fast",
        limits: ImageLimits = DEFAULT_LIMITS,
        color: Color = "stored",
    ) -> None:
        if mode not in ("fast", "pil"):
            raise SettingsError(f"preprocessing mode is {mode!r}, expected 'fast' or 'pil'")
        if mode == "fast":
            # Now and not with the first image: torch takes seconds, and a missing package fails the start.
            import_module("simplejpeg")
            import_module("torch")
        self.size = image.size
        self._image = image
        self._mode = mode
        self._limits = limits
        self._color = color
        self._watched = WatchedDecoder(mode, limits, color)

    def __call__(self, data: bytes) -> Pixels:
        """Pixels of the file's first frame, upright, on white, fitted to the square whatever its aspect.

        Args:
            data: a whole JPEG, PNG, WebP, GIF, BMP, TIFF, HEIC or AVIF file.

        Returns:
            uint8 RGB `[S, S, 3]`, 0 to 255, contiguous, for NaFlex `[T, 3 P P]` as of `cut_patches`.

        Raises:
            ImageError: not a decodable image.
            ImageTooLargeError: more bytes or pixels than the limits allow.
            ImageCostError: decoding takes more CPU time or memory than the limits allow.
        """
        return self.resize(self.decode(data))

    def decode(self, data: bytes, watch: Watch | None = None) -> Pixels:
        """The file's first frame, upright, on white: uint8 RGB `[H, W, 3]`. Raises as a call does.

        Args:
            data: the file.
            watch: called with the CPU seconds that another process has spent on the file, if one decodes it.
        """
        kind = identify(data, self._limits)
        file = inspect(data, kind, self._limits)
        if file.cheap:
            return decode_file(data, kind, self._mode, self._limits, file.header, color=self._color)
        return self._watched(data, kind, watch)

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
