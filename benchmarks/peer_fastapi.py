"""The peer: SigLIP image embeddings as they are commonly served, transformers behind FastAPI and uvicorn.

One process. Images are decoded and preprocessed in a pool of threads. They wait in a queue for a few
milliseconds, and another thread runs the model on the batch. `POST /embed` takes the
bytes of an image and answers with the float32 of its embedding.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from transformers import SiglipVisionModel
from transformers.utils import is_torchvision_available

__all__ = ["Batcher", "Peer", "application"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """Options of the peer.

    Attributes:
        dtype: a torch dtype's name; `auto` is bfloat16 on a GPU, and the faster of two on a CPU.
        preprocess: `image` runs the processor on each image in the threads, `batch` on each batch, on
            the device, before the model.
        wait: seconds that the first image of a batch waits for others.
        threads: that decode images.
    """

    checkpoint: Path
    device: str = "cpu"
    dtype: str = "auto"
    preprocess: str = "image"
    batch: int = 32
    wait: float = 0.003
    threads: int = 8


class Peer:
    """The model and its image processor."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.processor = _processor_class().from_pretrained(options.checkpoint)
        model = SiglipVisionModel.from_pretrained(options.checkpoint)
        self.model = model.eval().requires_grad_(False).to(options.device)
        self.dtype = options.dtype if options.dtype != "auto" else self._fastest()
        self.model.to(_DTYPES[self.dtype])

    def decode(self, data: bytes) -> Any:
        """The picture, or the pixels that the model takes."""
        image = Image.open(io.BytesIO(data)).convert("RGB")
        if self.options.preprocess == "batch":
            return image
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]

    @torch.inference_mode()
    def embed(self, items: Sequence[Any]) -> NDArray[np.float32]:
        """Embeddings of what `decode` returned."""
        device, dtype = self.options.device, _DTYPES[self.dtype]
        if self.options.preprocess == "batch":
            pixels = self.processor(images=list(items), return_tensors="pt", device=device)["pixel_values"]
        else:
            pixels = torch.stack(list(items))
        outputs = self.model(pixels.to(device, dtype, non_blocking=True)).pooler_output
        embeddings: NDArray[np.float32] = outputs.float().cpu().numpy()
        return embeddings

    def _fastest(self) -> str:
        if self.options.device != "cpu":
            return "bfloat16"
        size = self.model.config.image_size
        times = {}
        for name in ("float32", "bfloat16"):
            self.model.to(_DTYPES[name])
            pixels = torch.rand(8, 3, size, size, dtype=_DTYPES[name])
            times[name] = statistics.median(self._time(pixels) for _ in range(3))
        self.model.to(torch.float32)
        return min(times, key=lambda name: times[name])

    @torch.inference_mode()
    def _time(self, pixels: torch.Tensor) -> float:
        start = time.perf_counter()
        self.model(pixels)
        return time.perf_counter() - start


class Batcher:
    """Puts requests together: the next batch gathers while one runs."""

    def __init__(self, peer: Peer) -> None:
        options = peer.options
        self.peer = peer
        self.queue: asyncio.Queue[tuple[Any, asyncio.Future[bytes]]] = asyncio.Queue()
        # A thread's number of OpenMP threads is its own: one for each decoder, all cores for the model.
        cores = torch.get_num_threads() if options.device == "cpu" else 1
        self.decoders = ThreadPoolExecutor(options.threads, "decode", torch.set_num_threads, (1,))
        self.runner = ThreadPoolExecutor(1, "model", torch.set_num_threads, (cores,))
        self.slots = asyncio.Semaphore(2)
        self.running: set[asyncio.Task[None]] = set()

    async def embed(self, data: bytes) -> bytes:
        """The embedding of one image, as float32 bytes."""
        loop = asyncio.get_running_loop()
        item = await loop.run_in_executor(self.decoders, self.peer.decode, data)
        answer: asyncio.Future[bytes] = loop.create_future()
        self.queue.put_nowait((item, answer))
        return await answer

    async def gather(self) -> None:
        """Form batches for ever."""
        while True:
            await self.slots.acquire()
            batch = [await self.queue.get()]
            end = time.perf_counter() + self.peer.options.wait
            while len(batch) < self.peer.options.batch:
                if not self.queue.empty():
                    batch.append(self.queue.get_nowait())
                    continue
                left = end - time.perf_counter()
                if left <= 0:
                    break
                try:
                    batch.append(await asyncio.wait_for(self.queue.get(), left))
                except TimeoutError:
                    break
            task = asyncio.create_task(self._run(batch))
            self.running.add(task)
            task.add_done_callback(self.running.discard)

    async def _run(self, batch: Sequence[tuple[Any, asyncio.Future[bytes]]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            rows = await loop.run_in_executor(self.runner, self.peer.embed, [item for item, _ in batch])
        except (RuntimeError, ValueError) as error:
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(HTTPException(500, str(error)))
        else:
            for row, (_, answer) in zip(rows, batch, strict=True):
                if not answer.done():  # its client may have gone
                    answer.set_result(row.tobytes())
        finally:
            self.slots.release()


def application(peer: Peer) -> FastAPI:
    """The web application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.batcher = batcher = Batcher(peer)
        task = asyncio.create_task(batcher.gather())
        yield
        task.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/embed")
    async def embed(request: Request) -> Response:
        try:
            answer = await app.state.batcher.embed(await request.body())
        except UnidentifiedImageError as error:
            raise HTTPException(400, "not an image") from error
        return Response(answer, media_type="application/octet-stream")

    @app.get("/about")
    async def about() -> dict[str, str]:
        packages = ("torch", "transformers", "fastapi", "uvicorn", "pillow")
        return {
            "dtype": peer.dtype,
            "backend": f"transformers {peer.model.config._attn_implementation}",
            "preprocess": f"{type(peer.processor).__name__} a {peer.options.preprocess}",
            **{name: version(name) for name in packages},
        }

    return app


def _processor_class() -> Any:
    """The torchvision processor where torchvision is, else the one of Pillow."""
    return (
        transformers.SiglipImageProcessor
        if is_torchvision_available()
        else transformers.SiglipImageProcessorPil
    )


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="Hugging Face directory")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="default %(default)s")
    add("--dtype", choices=["auto", *_DTYPES], default="auto", help="default %(default)s")
    add("--preprocess", choices=["image", "batch"], default="image", help="default %(default)s")
    add("--batch", type=int, default=32, help="largest batch, default %(default)s")
    add("--wait", type=float, default=0.003, help="seconds to wait for company, default %(default)s")
    add("--threads", type=int, default=8, help="that decode, default %(default)s")
    add("--port", type=int, default=8080, help="on 127.0.0.1, default %(default)s")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()  # not the list of the text tower's weights, which stay unread
    transformers.logging.disable_progress_bar()
    options = Options(
        given.checkpoint, given.device, given.dtype, given.preprocess, given.batch, given.wait, given.threads
    )
    uvicorn.run(
        application(Peer(options)), host="127.0.0.1", port=given.port, log_level="warning", access_log=False
    )


if __name__ == "__main__":
    main()
