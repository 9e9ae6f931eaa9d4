"""How the Triton models read images: on the CPU one after the other, or those of many requests by the GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from siglip_serve.config import PreprocessMode
from siglip_serve.errors import InvalidInputError
from siglip_serve.serving.counters import ReadMeter
from siglip_serve.serving.respond import (
    Context,
    Outputs,
    Request,
    Row,
    log_fault,
    map_rows,
    readable_start,
    respond_each,
    respond_together,
)

if TYPE_CHECKING:
    from siglip_serve.engine.passes import Batch
    from siglip_serve.images.nvjpeg.reader import Decoded, GpuJpegReader
    from siglip_serve.images.preprocess import ImageLimits, Preprocessor

__all__ = ["ImageReader", "image_reader"]


class ImageReader:
    """`siglip_vision_process`: INPUT_IMAGE [n, 1] BYTES -> PIXEL_VALUES [n, S, S, 3] UINT8.

    IMAGE_SIZE [n, 2] INT32 are height and width of the upright images.
    """

    def __init__(self, context: Context) -> None:
        from siglip_serve.images.preprocess import decode_base64

        self._refusals = context.refusals
        self._preprocess, limits = image_reader(context)
        self._decode_base64 = partial(decode_base64, limits=limits)
        self._embed_models = context.settings.embed_models
        self._meter = ReadMeter(context.model)
        self._gpu = _gpu_reader(context, limits) if context.settings.preprocess == "gpu" else None
        self._count = 0

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        """One response a request; on a GPU, all of their files are decoded together."""
        if self._gpu is None:
            return respond_each(requests, self._read, self._refusals)
        self._count = 0
        begin = time.perf_counter()
        responses = respond_together(requests, self._files, self._decode, self._finish, self._refusals)
        if self._count:
            # Once for all: each call is a message to the server and back.
            self._meter.add(self._count, time.perf_counter() - begin)
        return responses

    def _read(self, request: Request) -> Outputs:
        begin = time.perf_counter()
        outputs = self._pixels(request, [(file, None) for file in self._files(request)])
        self._meter.add(len(outputs["IMAGE_SIZE"]), time.perf_counter() - begin)
        return outputs

    def _files(self, request: Request) -> list[bytes]:
        request.choice("embed_model", self._embed_models)
        request.flag("base64_encoded")
        return request.strings("INPUT_IMAGE")

    def _decode(self, parts: Sequence[list[bytes]], requests: Sequence[Request]) -> Batch:
        """Each file, and what the GPU has decoded of it; None where it has not, for whatever reason."""
        from siglip_serve.engine.passes import Batch, end_if_lost

        files: list[bytes] = []
        for request, part in zip(requests, parts, strict=True):
            files.extend(map(self._unpacked, part) if request.flag("base64_encoded") else part)
        decoded: Sequence[Decoded | None] = [None] * len(files)
        if self._gpu is not None:
            try:
                decoded = self._gpu(files)
            except RuntimeError as error:  # the CPU reads these files, and all if the GPU is lost
                end_if_lost()
                log_fault(error)
        rows: Row = np.empty(len(files), dtype=np.object_)
        for row, pair in enumerate(zip(chain.from_iterable(parts), decoded, strict=True)):
            rows[row] = pair
        return Batch({"READ": rows}, np.zeros(len(rows), dtype=np.bool_))

    def _unpacked(self, row: bytes) -> bytes:
        try:
            return self._decode_base64(row)
        except InvalidInputError:
            return b""  # `_pixels` says why, to the one whose row it is

    def _finish(self, request: Request, rows: Outputs) -> Outputs:
        outputs = self._pixels(request, rows["READ"].tolist())
        self._count += len(outputs["IMAGE_SIZE"])
        return outputs

    def _pixels(self, request: Request, files: Sequence[tuple[bytes, Decoded | None]]) -> Outputs:
        encoded = request.flag("base64_encoded")
        sizes: list[tuple[int, ...]] = []

        def pixels(row: tuple[bytes, Decoded | None]) -> Row:
            file, decoded = row
            if decoded is not None:
                sizes.append(decoded.size)
                return decoded.pixels
            picture = self._preprocess.decode(self._decode_base64(file) if encoded else file)
            sizes.append(picture.shape[:2])
            return self._preprocess.resize(picture)

        read = map_rows("INPUT_IMAGE", files, pixels)
        return {"PIXEL_VALUES": read, "IMAGE_SIZE": np.array(sizes, dtype=np.int32)}


def _gpu_reader(context: Context, limits: ImageLimits) -> GpuJpegReader:
    with readable_start():
        from siglip_serve.images.nvjpeg.reader import GpuJpegReader

        return GpuJpegReader(context.config.image, context.device, limits)


def image_reader(context: Context, mode: PreprocessMode | None = None) -> tuple[Preprocessor, ImageLimits]:
    """What reads images on the CPU, in this mode or the settings', and its limits.

    Instead of `gpu` it is `fast`, which is nearest to it.
    """
    from PIL import AvifImagePlugin, Image

    from siglip_serve.images.preprocess import ImageLimits, Preprocessor

    settings = context.settings
    mode = mode or settings.preprocess
    mode = "fast" if mode == "gpu" else mode
    if mode == "fast":
        import torch

        torch.set_num_threads(1)  # the other cores belong to the other instances
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    Image.MAX_IMAGE_PIXELS = None  # our own limit stands in its place, at the same point: the header
    limits = ImageLimits(settings.max_image_bytes, settings.max_image_pixels)
    return Preprocessor(context.config.image, mode, limits), limits
