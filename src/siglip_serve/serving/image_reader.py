"""Read the images of requests on the CPU: base64 or raw, decoded as the settings say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TypeVar

from siglip_serve.config import PreprocessMode
from siglip_serve.images.formats import ImageLimits, decode_base64
from siglip_serve.images.preprocess import Fitted, Preprocessor
from siglip_serve.images.resize import Pixels
from siglip_serve.images.watched import Watch
from siglip_serve.serving.context import Context, open_places
from siglip_serve.serving.decode_budget import DecodeBudget
from siglip_serve.serving.request import Request

__all__ = ["ImageReader"]

_T = TypeVar("_T")


class ImageReader:
    """Decodes image files within the limits of the settings.

    Args:
        context: of the model.
        mode: how to decode and resize, in place of the settings'. For `gpu` it is `fast`, which is nearest.

    Attributes:
        limits: most bytes and pixels of an image.
        preprocess: decodes and resizes.
    """

    def __init__(self, context: Context, mode: PreprocessMode | None = None) -> None:
        from PIL import AvifImagePlugin, Image

        settings = context.settings
        mode = mode or settings.preprocess
        mode = "fast" if mode == "gpu" else mode
        if mode != "pil":
            import torch

            torch.set_num_threads(1)  # the other cores belong to the other instances
        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
        Image.MAX_IMAGE_PIXELS = None  # our own limit stands in its place, at the same point: the header
        self.limits = ImageLimits.of(settings)
        self._slow_places = open_places(context, context.processes - 1)
        self._alone = context.processes == 1
        self._quick = settings.slow_request_seconds
        self.preprocess = Preprocessor(context.config.image, mode, self.limits, settings.color)

    def unpacker(self, request: Request) -> Callable[[bytes], bytes]:
        """Make the function that turns a row of the request into a file, from base64 if it says so."""
        return partial(decode_base64, limits=self.limits) if request.flag("base64_encoded") else bytes

    def decoder(self, request: Request) -> AbstractContextManager[Callable[[bytes], Pixels]]:
        """Give the function that decodes a row of the request into upright pixels [H, W, 3].

        It counts CPU time until its next call, so what happens to the pixels in between is counted as well.
        """
        return self._within_budget(request, self.preprocess.decode)

    def reader(self, request: Request) -> AbstractContextManager[Callable[[bytes], Fitted]]:
        """Give the function that makes of a row what the checkpoint takes. Otherwise like `decoder`."""
        return self._within_budget(request, self.preprocess.read)

    @contextmanager
    def _within_budget(
        self, request: Request, read: Callable[[bytes, Watch], _T]
    ) -> Iterator[Callable[[bytes], _T]]:
        unpack = self.unpacker(request)
        with DecodeBudget(self._slow_places, self._alone, self._quick, self.limits.max_seconds) as budget:

            def within(row: bytes) -> _T:
                budget.next_image(len(row))
                return read(unpack(row), budget.watch)

            yield within

    def close(self) -> None:
        """End what decodes for this reader."""
        self.preprocess.close()
        self._slow_places.close()
