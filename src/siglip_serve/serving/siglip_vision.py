"""Answer the models of images: files become pixels, pixels become embeddings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from siglip_serve.checkpoint.config import tensor_dims
from siglip_serve.errors import InvalidInputError
from siglip_serve.images.patches import grid_of
from siglip_serve.serving.context import Context, engine_plan, open_turns, readable_start
from siglip_serve.serving.counters import ImageCounter, TowerCounter
from siglip_serve.serving.image_reader import ImageReader
from siglip_serve.serving.request import Request, has_input
from siglip_serve.serving.respond import BatchModel, Outputs, log_fault, respond_each, select
from siglip_serve.serving.rows import Row, map_rows
from siglip_serve.serving.tower_inputs import PatchInput, PixelInput, TowerInput

if TYPE_CHECKING:
    from siglip_serve.engine.engines import NaflexEngine, VisionEngine
    from siglip_serve.engine.passes import Batch
    from siglip_serve.images.nvjpeg.reader import Decoded, GpuJpegReader

__all__ = ["MOST_VECTORS", "SiglipVisionModel", "SiglipVisionProcess"]

MOST_VECTORS = 1024  # prompts of one image that is explained
_EXPLAINED = ("PATCH_MAPS", "UNATTRIBUTED")

_File = tuple[bytes, "Decoded | None"]


class SiglipVisionProcess(BatchModel[list[bytes], Sequence[_File]]):
    """INPUT_IMAGE [n, 1] BYTES -> PIXEL_VALUES [n, S, S, 3] UINT8, IMAGE_SIZE [n, 2] INT32.

    IMAGE_SIZE is height and width of the upright images. For NaFlex, PIXEL_VALUES [n, T, 3 P P] are patches,
    and PATCH_GRID [n, 2] INT32 are the rows and columns of each image's own. With the setting `preprocess` at
    `gpu`, the files of all requests are decoded together by the GPU. Files that it cannot decode are read by
    the CPU.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._images = ImageReader(context)
        self._config = context.config
        self._embed_models = context.settings.embed_models
        self._counter = ImageCounter(context.model)
        self._gpu = self._gpu_reader(context) if context.settings.preprocess == "gpu" else None
        self._count = 0

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return one response per request."""
        self._count = 0
        begin = time.perf_counter()
        if self._gpu is None:
            responses = respond_each(requests, self._answer, self._refusals)
        else:
            responses = super().execute(requests)
        if self._count:
            # Once for all: each call is a message to the server and back.
            self._counter.add(self._count, time.perf_counter() - begin)
        return responses

    def read(self, request: Request) -> list[bytes]:
        """Return the files of a request as they were sent."""
        request.choice("embed_model", self._embed_models)
        request.flag("base64_encoded")
        return request.strings("INPUT_IMAGE")

    def compute(self, parts: Sequence[list[bytes]], requests: Sequence[Request]) -> _Files:
        """Pair each file with its pixels if the GPU has decoded it, else with None."""
        files: list[bytes] = []
        for request, part in zip(requests, parts, strict=True):
            unpack = self._images.unpacker(request)
            files.extend(_or_nothing(unpack, row) for row in part)
        return _Files(list(zip(chain.from_iterable(parts), self._decode(files), strict=True)))

    def finish(self, request: Request, own: Sequence[_File]) -> Outputs:
        """Decode on the CPU what the GPU has left."""
        return self._pixels(request, own)

    def close(self) -> None:
        """End what decodes for this model. No request may follow."""
        self._images.close()

    def _gpu_reader(self, context: Context) -> GpuJpegReader:
        with readable_start():
            from siglip_serve.images.nvjpeg.reader import GpuJpegReader

            return GpuJpegReader(context.config.image, context.device, self._images.limits)

    def _answer(self, request: Request) -> Outputs:
        return self._pixels(request, [(file, None) for file in self.read(request)])

    def _decode(self, files: Sequence[bytes]) -> Sequence[Decoded | None]:
        from siglip_serve.engine.passes import end_if_lost

        if self._gpu is not None:
            try:
                return self._gpu(files)
            except RuntimeError as error:  # the CPU reads these files, and all if the GPU is lost
                end_if_lost()
                log_fault(error)
        return [None] * len(files)

    def _pixels(self, request: Request, files: Sequence[_File]) -> Outputs:
        sizes: list[tuple[int, int]] = []

        with self._images.reader(request) as read_row:

            def pixels(row: _File) -> Row:
                file, decoded = row
                picture = decoded or read_row(file)
                sizes.append(picture.size)
                return picture.pixels

            read = map_rows("INPUT_IMAGE", files, pixels)
        self._count += len(read)
        outputs = {"PIXEL_VALUES": read, "IMAGE_SIZE": np.array(sizes, dtype=np.int32)}
        if "PATCH_GRID" in request.wanted():
            outputs["PATCH_GRID"] = np.array([grid_of(self._config, *size) for size in sizes], dtype=np.int32)
        return outputs


class _Files:
    def __init__(self, files: Sequence[_File]) -> None:
        self._files = files

    def rows(self, start: int, end: int) -> Sequence[_File]:
        return self._files[start:end]


def _or_nothing(unpack: Any, row: bytes) -> bytes:
    try:
        return bytes(unpack(row))
    except InvalidInputError:
        return b""  # decoding on the CPU then tells the caller whose row it is


class SiglipVisionModel(BatchModel[Any, Outputs]):
    """PIXEL_VALUES [n, S, S, 3] UINT8 -> the outputs that each request asks for.

    NaFlex takes patches instead, and their grids (`tower_inputs`). The outputs are EMBEDDING [n, D],
    MEAN_EMBEDDING [n, D] and PATCH_EMBEDDINGS [n, P, D]. With the parameter `normalized`, vectors have unit
    length.

    Where the model has the input, a request may bring PROMPT_VECTORS [1, Q, D] for its one image. It gets
    the contribution of each patch to each vector's score, PATCH_MAPS [1, Q, P], the rest of the score,
    UNATTRIBUTED [1, Q], and the EMBEDDING [1, D] that is scored.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._width = tensor_dims(context.config)["EMBEDDING"]
        with readable_start():
            self._engine, self._input = _open_tower(context)
            # The first pass allocates and chooses kernels: not at a caller's expense.
            self._engine(self._input.blank()).rows(0, 1)
        self._counter = TowerCounter(context.model)
        self._turns = open_turns(context)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return one response per request. Those with vectors are computed one by one."""
        embedded = [request for request in requests if not has_input(request, "PROMPT_VECTORS")]
        responses = super().execute(embedded)
        if len(embedded) == len(requests):
            return responses
        rest = iter(responses)
        return [
            respond_each([request], self._explain, self._refusals)[0]
            if has_input(request, "PROMPT_VECTORS")
            else next(rest)
            for request in requests
        ]

    def close(self) -> None:
        """Leave the turns. No request may follow."""
        self._turns.close()

    def read(self, request: Request) -> Any:
        """Return a request's pixels."""
        request.flag("normalized")
        wanted = request.wanted()
        # A request that names no output is asked for all: it gets those that there are.
        if wanted and set(wanted) <= set(_EXPLAINED):
            raise InvalidInputError(f"{wanted[0]}: only of requests with the input PROMPT_VECTORS")
        return self._input.read(request)

    def compute(self, parts: Sequence[Any], requests: Sequence[Request]) -> Batch:
        """Run the tower for all outputs that any of the requests asks for."""
        pixels = self._input.join(parts)
        wanted = {name for request in requests for name in request.wanted()}
        with self._turns.turn(len(pixels)):
            begin = time.perf_counter()
            batch = self._engine(pixels, wanted)
            seconds = time.perf_counter() - begin
        self._counter.add(len(pixels), seconds)
        return batch

    def finish(self, request: Request, own: Outputs) -> Outputs:
        """Keep the outputs that the request asks for."""
        return select(request, own)

    def _explain(self, request: Request) -> Outputs:
        pixels = self._input.read(request)
        if len(pixels) != 1:
            raise InvalidInputError(f"PIXEL_VALUES: {len(pixels)} images with vectors, expected one")
        rows = request.shape("PROMPT_VECTORS")[1:2]
        vectors = request.finite("PROMPT_VECTORS", [*rows, *self._width])[0]
        if not 1 <= len(vectors) <= MOST_VECTORS:
            raise InvalidInputError(f"PROMPT_VECTORS: {len(vectors)} vectors, expected 1 to {MOST_VECTORS}")
        begin = time.perf_counter()
        found = self._engine.explain(pixels, vectors)
        self._counter.add(1, time.perf_counter() - begin)
        outputs = {
            "PATCH_MAPS": found.maps,
            "UNATTRIBUTED": found.unattributed,
            "EMBEDDING": found.embedding,
        }
        asked = {name: outputs[name][None] for name in request.wanted() if name in outputs}
        if not asked:
            raise InvalidInputError(
                f"{', '.join(request.wanted())}: not of requests with the input PROMPT_VECTORS"
            )
        return asked


def _open_tower(context: Context) -> tuple[VisionEngine | NaflexEngine, TowerInput[Any]]:
    """Load the vision tower of the checkpoint, and find how its rows are read."""
    from siglip_serve.engine.engines import NaflexEngine, open_vision

    config = context.config
    engine = open_vision(config, engine_plan(context))
    if isinstance(engine, NaflexEngine):
        return engine, PatchInput(config)
    if context.settings.heatmaps == "on":
        engine.prepare_heatmaps()
    return engine, PixelInput(config, engine.staging)
