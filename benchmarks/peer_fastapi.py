"""A peer: SigLIP embeddings as they are commonly served, transformers behind FastAPI and uvicorn.

One process. Images are decoded and preprocessed in a pool of threads. They wait in a queue for a few
milliseconds, and another thread runs the model on the batch. Texts have a queue of their own. `POST /embed`
takes the bytes of an image, `POST /embed_text` those of a text, and both answer with the float32 of its
embedding.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from numpy.typing import NDArray
from PIL import UnidentifiedImageError

from benchmarks.peer_model import TransformersModel, server_parser

__all__ = ["Batcher", "Options", "Peer", "application"]


@dataclass(frozen=True)
class Options:
    """Options of the peer.

    Attributes:
        preprocess: `image` runs the processor on each image in the threads, `batch` on each batch, on
            the device, before the model.
        wait: seconds that the first input of a batch waits for others.
        threads: that decode images.
    """

    checkpoint: Path
    device: str = "cpu"
    dtype: str = "float32"
    preprocess: str = "image"
    batch: int = 32
    wait: float = 0.003
    threads: int = 8


class Peer:
    """The model, and how its inputs are prepared."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._model = TransformersModel(options.checkpoint, options.device, options.dtype)

    def decode(self, data: bytes) -> Any:
        """The picture, or the pixels that the model takes."""
        image = self._model.decode(data)
        return image if self.options.preprocess == "batch" else self._model.pixels([image])[0]

    def embed(self, items: Sequence[Any]) -> NDArray[np.float32]:
        """Embeddings of what `decode` returned."""
        batch = self.options.preprocess == "batch"
        pixels = self._model.pixels(items, self.options.device) if batch else torch.stack(list(items))
        return self._model.embed_pixels(pixels)

    def embed_texts(self, items: Sequence[Any]) -> NDArray[np.float32]:
        """Embeddings of texts."""
        return self._model.embed_texts(items)


class Batcher:
    """Puts inputs together: the next batch gathers while one runs.

    Args:
        embed: computes a batch, in the one thread of `runner`.
    """

    def __init__(
        self, embed: Callable[[Sequence[Any]], NDArray[np.float32]], runner: Executor, options: Options
    ) -> None:
        self._embed, self._runner, self._options = embed, runner, options
        self._queue: asyncio.Queue[tuple[Any, asyncio.Future[bytes]]] = asyncio.Queue()
        self._slots = asyncio.Semaphore(2)
        self._running: set[asyncio.Task[None]] = set()

    async def add(self, item: Any) -> bytes:
        """The embedding of one input, as float32 bytes."""
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((item, answer))
        return await answer

    async def gather(self) -> None:
        """Form batches for ever."""
        while True:
            await self._slots.acquire()
            batch = [await self._queue.get()]
            end = time.perf_counter() + self._options.wait
            while len(batch) < self._options.batch:
                if not self._queue.empty():
                    batch.append(self._queue.get_nowait())
                    continue
                left = end - time.perf_counter()
                if left <= 0:
                    break
                try:
                    batch.append(await asyncio.wait_for(self._queue.get(), left))
                except TimeoutError:
                    break
            task = asyncio.create_task(self._run(batch))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _run(self, batch: Sequence[tuple[Any, asyncio.Future[bytes]]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            rows = await loop.run_in_executor(self._runner, self._embed, [item for item, _ in batch])
        except (RuntimeError, ValueError) as error:
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(HTTPException(500, str(error)))
        else:
            for row, (_, answer) in zip(rows, batch, strict=True):
                if not answer.done():  # its client may have gone
                    answer.set_result(row.tobytes())
        finally:
            self._slots.release()


def application(peer: Peer) -> FastAPI:
    """The web application."""
    options = peer.options
    # A thread's number of OpenMP threads is its own: one for each decoder, all cores for the model.
    cores = torch.get_num_threads() if options.device == "cpu" else 1
    decoders = ThreadPoolExecutor(options.threads, "decode", torch.set_num_threads, (1,))
    runner = ThreadPoolExecutor(1, "model", torch.set_num_threads, (cores,))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.images = Batcher(peer.embed, runner, options)
        app.state.texts = Batcher(peer.embed_texts, runner, options)
        tasks = [asyncio.create_task(batcher.gather()) for batcher in (app.state.images, app.state.texts)]
        yield
        for task in tasks:
            task.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/embed")
    async def embed(request: Request) -> Response:
        data = await request.body()
        try:
            item = await asyncio.get_running_loop().run_in_executor(decoders, peer.decode, data)
        except UnidentifiedImageError as error:
            raise HTTPException(400, "not an image") from error
        return _answer(await app.state.images.add(item))

    @app.post("/embed_text")
    async def embed_text(request: Request) -> Response:
        return _answer(await app.state.texts.add((await request.body()).decode()))

    return app


def _answer(embedding: bytes) -> Response:
    return Response(embedding, media_type="application/octet-stream")


def main() -> None:
    """Serve until a signal."""
    parser = server_parser(__doc__, port=8080)
    add = parser.add_argument
    add("--preprocess", choices=["image", "batch"], default="image", help="default %(default)s")
    add("--threads", type=int, default=os.cpu_count(), help="that decode, default: the cores")
    given = vars(parser.parse_args())
    port = given.pop("port")
    app = application(Peer(Options(**given)))
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
