"""One server and one cache folder: embeddings of the data set's images and of texts, resumable."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from validate.dataset import Dataset, OnError, Sample
from validate.embeddings import Cache, embed_all, file_key
from validate.errors import DatasetError, RefusedError
from validate.server import Server

__all__ = ["Load", "Session"]

_PROBE_TEXT = "a photo of a cat"
_IMAGE_ROWS, _TEXT_ROWS = 16, 64
_WHERE = re.compile(r"^.*?INPUT_\w+\[\d+\]: ")


@dataclass(frozen=True)
class Load:
    """Load on the server: rows of one request (0: a sensible number), requests at once."""

    batch: int = 0
    concurrency: int = 8


class Session:
    """Embedding through `server`, with everything kept in `cache_root`. It is a context manager.

    Attributes:
        problems: files left out, each with the reason.
    """

    def __init__(self, server: Server, cache_root: Path, load: Load, on_error: OnError) -> None:
        self.server = server
        self.info = server.info()
        self.problems: list[str] = []
        self._root = cache_root
        self._load = load
        self._on_error = on_error
        self._open = ExitStack()
        self._caches: dict[str, Cache] = {}

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def embed_images(self, dataset: Dataset, part: str) -> NDArray[np.float32]:
        """Embeddings [n, d] of `dataset.train` or `dataset.valid`. Unusable files leave that list."""
        samples: list[Sample] = getattr(dataset, part)
        readable = [(key, sample) for sample in samples if (key := self._key(sample, dataset.root))]
        cache = self._cache("embed_image", lambda: self.server.embed_images([_probe_image()]))

        def embed(batch: list[Sample]) -> NDArray[np.float32]:
            return self.server.embed_images([_read(sample.path) for sample in batch])

        batch = self._batch("embed_image", _IMAGE_ROWS)
        result = embed_all(readable, cache, embed, batch, self._load.concurrency, f"{part} images")
        for position, reason in sorted(result.refused.items()):
            name = readable[position][1].path.relative_to(dataset.root)
            self._problem(f"{name}: {_WHERE.sub('', reason)}")
        kept = [pair for pair in readable if pair[0] in cache]
        if not kept:
            raise DatasetError(f"{dataset.root / part}: not one usable image; {self.problems[-1]}")
        setattr(dataset, part, [sample for _, sample in kept])
        return cache.get([key for key, _ in kept])

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings [n, d] of `texts`."""
        cache = self._cache("embed_text", lambda: self.server.embed_texts([_PROBE_TEXT]))
        items = [(text, text) for text in texts]
        batch = self._batch("embed_text", _TEXT_ROWS)
        result = embed_all(items, cache, self.server.embed_texts, batch, self._load.concurrency, "texts")
        if result.refused:
            position, reason = min(result.refused.items())
            raise DatasetError(f"the prompt {texts[position]!r} is refused: {reason}")
        return cache.get(texts)

    def _key(self, sample: Sample, root: Path) -> str | None:
        try:
            with sample.path.open("rb") as file:
                if not file.read(1):
                    raise OSError("empty file")
            return file_key(sample.path)
        except OSError as error:
            self._problem(f"{sample.path.relative_to(root)}: {error.strerror or error}")
            return None

    def _problem(self, problem: str) -> None:
        if self._on_error == "stop":
            raise DatasetError(f"{problem} (--on-error skip continues without it)")
        self.problems.append(problem)
        print(f"left out: {problem}", file=sys.stderr)

    def _batch(self, model: str, default: int) -> int:
        most = self.server.rows_per_request(model)
        wanted = self._load.batch or default
        return min(wanted, most) if most else wanted

    def _cache(self, model: str, probe: Callable[[], NDArray[np.float32]]) -> Cache:
        if model not in self._caches:
            said = self.info.as_dict()
            identity = {name: said[name] for name in ("checkpoint", "revision", "dtype", "preprocess")}
            cache = Cache(self._root, {"model": model, **identity}, probe()[0])
            self._caches[model] = self._open.enter_context(cache)
        return self._caches[model]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RefusedError(error.strerror or str(error)) from error


def _probe_image() -> bytes:
    """A fixed picture, lossless, by which two models are told apart."""
    ramp = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp], axis=2)).save(buffer, "PNG")
    return buffer.getvalue()
