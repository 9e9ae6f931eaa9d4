"""The client for event loops; what it does is what `Client` does."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from siglip_serve_client._operations import images as _operations
from siglip_serve_client._operations.encoding import ColorOrder, ImageLike
from siglip_serve_client._operations.explain import ExplainOptions, Explanation, ask_explanation
from siglip_serve_client._operations.images import Link
from siglip_serve_client._operations.requests import Operation
from siglip_serve_client._operations.shared_memory import Regions
from siglip_serve_client._operations.teams import TeamFit, TeamImages, Teams, ask_fit, ask_teams, hint_inputs
from siglip_serve_client._transports.background_loop import Engine, Outcome, Progress
from siglip_serve_client._transports.http_transport import Endpoint

__all__ = ["AsyncClient"]

S = TypeVar("S")


class AsyncClient:
    """`Client` for asyncio; use it as an asynchronous context manager, in one event loop.

    Arguments and errors are those of `Client`. Files are read and pictures encoded in threads.
    """

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        concurrency: int = 64,
        timeout: float = 120.0,
        *,
        shared_memory: bool = False,
        api_key: str | None = None,
        ca_file: Path | str | None = None,
    ) -> None:
        self.concurrency = concurrency
        self._engine = Engine(Endpoint.parse(url, api_key, ca_file), concurrency)
        self._link = Link(timeout, Regions() if shared_memory else None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Remove what lies in shared memory, and close the connection."""
        if self._link.regions is not None:
            await self._engine.run(self._link.regions.close())
        await self._engine.close()

    async def embed_image(
        self, image: ImageLike, normalized: bool = False, *, color_order: ColorOrder | None = None
    ) -> NDArray[np.float32]:
        """See `Client.embed_image`."""
        return await self._engine.run(_operations.embed_image(self._link, image, normalized, color_order))

    def embed_images(
        self,
        images: Iterable[ImageLike] | AsyncIterable[ImageLike],
        normalized: bool = False,
        *,
        color_order: ColorOrder | None = None,
        progress: Progress | None = None,
    ) -> AsyncIterator[Outcome]:
        """See `Client.embed_images`; the images may come asynchronously."""
        link = self._link
        return self._each(
            images, lambda image: _operations.embed_image(link, image, normalized, color_order), progress
        )

    async def embed_text(
        self, text: str, normalized: bool = False, *, truncation: bool = False
    ) -> NDArray[np.float32]:
        """See `Client.embed_text`."""
        operation = _operations.embed_texts(self._link, [text], 0, normalized, truncation)
        return np.asarray((await self._engine.run(operation))[0])

    async def embed_texts(
        self,
        texts: Iterable[str],
        normalized: bool = False,
        *,
        truncation: bool = False,
        progress: Progress | None = None,
    ) -> NDArray[np.float32]:
        """See `Client.embed_texts`."""
        parts: list[NDArray[np.float32]] = []

        def operation(chunk: tuple[int, list[str]]) -> Operation[NDArray[np.float32]]:
            return _operations.embed_texts(self._link, chunk[1], chunk[0], normalized, truncation)

        async for part in self._each(_operations.chunks(texts), operation):
            if isinstance(part, Exception):
                raise part
            parts.append(part)
            if progress is not None:
                progress(sum(map(len, parts)))
        return np.concatenate(parts) if parts else np.empty((0, 0), dtype=np.float32)

    async def classify(
        self,
        image: ImageLike,
        labels: Sequence[str],
        *,
        templates: Sequence[str] | None = None,
        softmax: bool = False,
        color_order: ColorOrder | None = None,
    ) -> NDArray[np.float32]:
        """See `Client.classify`."""
        tensors = _operations.label_tensors(labels, templates)
        return await self._engine.run(_operations.classify(self._link, image, tensors, softmax, color_order))

    def classify_images(
        self,
        images: Iterable[ImageLike] | AsyncIterable[ImageLike],
        labels: Sequence[str],
        *,
        templates: Sequence[str] | None = None,
        softmax: bool = False,
        color_order: ColorOrder | None = None,
        progress: Progress | None = None,
    ) -> AsyncIterator[Outcome]:
        """See `Client.classify_images`; the images may come asynchronously."""
        tensors = _operations.label_tensors(labels, templates)
        link = self._link
        return self._each(
            images, lambda image: _operations.classify(link, image, tensors, softmax, color_order), progress
        )

    async def explain(
        self, image: ImageLike, prompts: Sequence[str], **options: Unpack[ExplainOptions]
    ) -> Explanation:
        """See `Client.explain`."""
        return await self._engine.run(ask_explanation(self._link, image, prompts, options))

    async def fit_teams(
        self,
        *,
        track_ids: ArrayLike | None = None,
        roles: Sequence[str] | None = None,
        anchors: ArrayLike | None = None,
        prev_state: bytes | None = None,
        k: int = 2,
        **images: Unpack[TeamImages],
    ) -> TeamFit:
        """See `Client.fit_teams`."""
        hints = hint_inputs(track_ids=track_ids, roles=roles, anchors=anchors, prev_state=prev_state, k=k)
        return await self._engine.run(ask_fit(self._link, images, hints))

    async def classify_teams(self, *, state: bytes, **images: Unpack[TeamImages]) -> Teams:
        """See `Client.classify_teams`."""
        return await self._engine.run(ask_teams(self._link, images, state))

    async def describe(self) -> dict[str, str]:
        """See `Client.describe`."""
        return await self._engine.run(_operations.describe(self._link))

    async def check_health(self) -> int:
        """See `Client.check_health`."""
        return await self._engine.run(_operations.check_health(self._link))

    async def _each(
        self,
        items: Iterable[S] | AsyncIterable[S],
        operation: Callable[[S], Operation[NDArray[np.float32]]],
        progress: Progress | None = None,
    ) -> AsyncIterator[Outcome]:
        """The outcome of each item, in order, `concurrency` at a time."""
        window: deque[asyncio.Task[Outcome]] = deque()
        free = asyncio.Semaphore(self.concurrency)
        done = count(1)
        try:
            async for item in _asynchronous(items):
                await free.acquire()
                task = asyncio.create_task(self._engine.outcome(operation(item)))
                task.add_done_callback(lambda _: free.release())
                window.append(task)
                # As many again may wait behind one that is slow.
                while window and (window[0].done() or len(window) >= 2 * self.concurrency):
                    yield await window.popleft()
                    if progress is not None:
                        progress(next(done))
            while window:
                yield await window.popleft()
                if progress is not None:
                    progress(next(done))
        finally:
            for task in window:
                task.cancel()
            await asyncio.gather(*window, return_exceptions=True)


async def _asynchronous(items: Iterable[S] | AsyncIterable[S]) -> AsyncIterator[S]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
