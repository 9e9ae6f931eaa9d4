"""Program of a process that turns picture files into pixels, in memory that it shares with its parent.

The parent sends tasks over a socket, and the process ends when the parent does.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siglip_serve.bulk.storage import FileRange
from siglip_serve.checkpoint.model_config import ImageConfig, ModelConfig
from siglip_serve.config import Color, PreprocessMode
from siglip_serve.errors import InvalidInputError
from siglip_serve.images.formats import ImageLimits

__all__ = ["Decoded", "Setup", "Task", "main", "map_slots"]


@dataclass(frozen=True)
class Setup:
    """Everything that a process has to know at its start.

    Attributes:
        config: the checkpoint's JSON files.
        mode: of decoding and resizing.
        device: for the mode `gpu`.
        color: as for `Preprocessor`.
        limits: of one image.
        shape: of the shared memory, uint8 [slots, rows, ...].
        texts: captions come with the pictures.
    """

    config: ModelConfig
    mode: PreprocessMode
    device: str
    color: Color
    limits: ImageLimits
    shape: tuple[int, ...]
    texts: bool


@dataclass(frozen=True)
class Task:
    """Consecutive pictures of a batch.

    Attributes:
        slot: where the batch lies in the shared memory.
        first: row of the first picture.
        files: the encoded pictures, or where their bytes lie on this machine.
        texts: their captions, None where there is none; empty if there are no captions at all.
    """

    slot: int
    first: int
    files: Sequence[bytes | FileRange]
    texts: Sequence[str | None] = ()


@dataclass(frozen=True)
class Decoded:
    """Result of one picture, whose pixels lie in the shared memory unless it has an error.

    Attributes:
        size: height and width of the upright picture.
        bytes: of the file.
        sha256: of the file, hexadecimal.
        ids: token ids int64 of its caption, or None.
        error: the reason why there are no pixels.
    """

    size: tuple[int, int] = (0, 0)
    bytes: int = 0
    sha256: str = ""
    ids: NDArray[np.int64] | None = None
    error: str = ""


def map_slots(descriptor: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Map shared memory as an array."""
    memory = mmap.mmap(descriptor, int(np.prod(shape, dtype=np.int64)))
    return np.frombuffer(memory, np.uint8).reshape(shape)


def main(arguments: Sequence[str]) -> None:
    """Answer tasks until the parent closes the socket.

    Args:
        arguments: descriptors of the socket and of the shared memory.
    """
    channel, memory = Connection(int(arguments[0])), int(arguments[1])
    try:
        setup: Setup = channel.recv()
        slots = map_slots(memory, setup.shape)
        os.close(memory)
        decode = _Decoder(setup, slots)
        channel.send("ready")
        while True:
            channel.send(decode(channel.recv()))
    except (EOFError, ConnectionError):
        return


class _Decoder:
    def __init__(self, setup: Setup, slots: NDArray[np.uint8]) -> None:
        import torch
        from PIL import AvifImagePlugin, Image

        from siglip_serve.images.preprocess import Preprocessor

        torch.set_num_threads(1)
        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
        Image.MAX_IMAGE_PIXELS = None  # the limits stand in its place, at the same point: the header
        image, mode = setup.config.image, setup.mode
        self._slots = slots
        self._preprocess = Preprocessor(image, "fast" if mode == "gpu" else mode, setup.limits, setup.color)
        self._on_gpu = _gpu_reader(image, setup) if mode == "gpu" else None
        self._tokenize = _tokenizer(setup.config) if setup.texts else None

    def __call__(self, task: Task) -> list[Decoded]:
        files = [_read(file) for file in task.files]
        on_gpu: Sequence[Any] = [None] * len(files)
        if self._on_gpu:
            on_gpu = self._on_gpu([file if isinstance(file, bytes) else b"" for file in files])
        texts = task.texts or [None] * len(task.files)
        rows = self._slots[task.slot, task.first : task.first + len(task.files)]
        return [
            self._decode(file, done, row, text)
            for file, done, row, text in zip(files, on_gpu, rows, texts, strict=True)
        ]

    def _decode(
        self, file: bytes | Exception, done: Any, row: NDArray[np.uint8], text: str | None
    ) -> Decoded:
        if isinstance(file, Exception):
            row[...] = 0
            return Decoded(error=getattr(file, "strerror", None) or str(file))
        try:
            if done is None:
                done = self._preprocess.read(file)
            row[...] = done.pixels
        except InvalidInputError as error:
            row[...] = 0  # the rest of the batch must not depend on what was there before
            return Decoded(error=str(error))
        ids = self._tokenize(text) if self._tokenize and text is not None else None
        height, width = map(int, done.size)
        return Decoded((height, width), len(file), hashlib.sha256(file).hexdigest(), ids)


def _read(file: bytes | FileRange) -> bytes | OSError | ValueError:
    if isinstance(file, bytes):
        return file
    try:
        return file.read()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        return error


def _gpu_reader(image: ImageConfig, setup: Setup) -> Callable[[Sequence[bytes]], Sequence[Any]]:
    from siglip_serve.images.nvjpeg.reader import GpuJpegReader

    return GpuJpegReader(image, setup.device, setup.limits)


def _tokenizer(config: ModelConfig) -> Callable[[str], NDArray[np.int64] | None]:
    from siglip_serve.errors import TextError
    from siglip_serve.texts.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config)

    def tokenize(text: str) -> NDArray[np.int64] | None:
        try:
            return tokenizer(text, truncation=True)
        except TextError:
            return None

    return tokenize
