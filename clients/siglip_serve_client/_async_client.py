"""The client for event loops, with the methods of `Client`."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from siglip_serve_client._operations.concurrency import Turns
from siglip_serve_client._operations.encoding import ColorOrder, ImageLike, refuse_one_image
from siglip_serve_client._operations.explain import ExplainOptions, Explanation, ask_explanation
from siglip_serve_client._operations.images import (
    ask_embedding,
    ask_embeddings,
    ask_probabilities,
    label_flags,
    label_tensors,
)
from siglip_serve_client._operations.link import Link, Outcome, Progress
from siglip_serve_client._operations.retries import RESTART_WAIT, PersistentTransport
from siglip_serve_client._operations.server import ask_description, ask_health
from siglip_serve_client._operations.shared_memory import Regions
from siglip_serve_client._operations.teams import TeamFit, TeamImages, Teams, ask_fit, ask_teams, hint_inputs
from siglip_serve_client._operations.texts import ask_text_embeddings, text_chunks
from siglip_serve_client._transports import connect
from siglip_serve_client._transports.endpoint import Endpoint

__all__ = ["AsyncClient"]

S = TypeVar("S")


class AsyncClient:
    """`Client` for asyncio. Use it as an asynchronous context manager, in one event loop.

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
        restart_wait: float = RESTART_WAIT,
    ) -> None:
        self.concurrency = concurrency
        sender = connect(Endpoint.parse(url, api_key, ca_file), concurrency)
        transport = PersistentTransport(sender, restart_wait)
        self._link = Link(transport, timeout, Regions(transport) if shared_memory else None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Remove the frames in shared memory, and close the connections."""
        await self._link.close()

    async def embed_image(
        self, image: ImageLike, normalized: bool = False, *, color_order: ColorOrder | None = None
    ) -> NDArray[np.float32]:
        """Embed one image: [D] float32. Arguments and errors as in `Client.embed_image`."""
        return await ask_embedding(self._link, image, normalized, color_order)

    def embed_images(
        self,
        images: Iterable[ImageLike] | AsyncIterable[ImageLike],
        normalized: bool = False,
        *,
        color_order: ColorOrder | None = None,
        progress: Progress | None = None,
    ) -> AsyncIterator[Outcome]:
        """Embed any number of images, which may come asynchronously. Otherwise as `Client.embed_images`."""
        refuse_one_image("images", images)
        link = self._link
        return self._each(images, lambda image: ask_embedding(link, image, normalized, color_order), progress)

    async def embed_image_batch(
        self, images: Sequence[bytes], normalized: bool = False, *, base64_encoded: bool = False
    ) -> NDArray[np.float32]:
        """Embed image files in one request: [N, D] float32. Otherwise as `Client.embed_image_batch`."""
        return await ask_embeddings(self._link, images, normalized, base64_encoded)

    async def embed_text(
        self, text: str, normalized: bool = False, *, truncation: bool = False
    ) -> NDArray[np.float32]:
        """Embed one text: [D] float32. Arguments and errors as in `Client.embed_text`."""
        operation = ask_text_embeddings(self._link, [text], 0, normalized, truncation)
        return np.asarray(await operation)[0]

    async def embed_texts(
        self,
        texts: Iterable[str],
        normalized: bool = False,
        *,
        truncation: bool = False,
        progress: Progress | None = None,
    ) -> NDArray[np.float32]:
        """Embed any number of texts: [N, D] float32. Arguments and errors as in `Client.embed_texts`."""
        parts: list[NDArray[np.float32]] = []

        def operation(chunk: tuple[int, list[str]]) -> Awaitable[NDArray[np.float32]]:
            return ask_text_embeddings(self._link, chunk[1], chunk[0], normalized, truncation)

        async for part in self._each(text_chunks(texts), operation):
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
        truncation: bool = False,
        color_order: ColorOrder | None = None,
    ) -> NDArray[np.float32]:
        """Score labels for one image: [L] float32. Arguments and errors as in `Client.classify`."""
        tensors, flags = label_tensors(labels, templates), label_flags(softmax, truncation)
        return await ask_probabilities(self._link, image, tensors, flags, color_order)

    def classify_images(
        self,
        images: Iterable[ImageLike] | AsyncIterable[ImageLike],
        labels: Sequence[str],
        *,
        templates: Sequence[str] | None = None,
        softmax: bool = False,
        truncation: bool = False,
        color_order: ColorOrder | None = None,
        progress: Progress | None = None,
    ) -> AsyncIterator[Outcome]:
        """Score labels for images, which may come asynchronously. Otherwise as `Client.classify_images`."""
        tensors, flags = label_tensors(labels, templates), label_flags(softmax, truncation)
        refuse_one_image("images", images)
        link = self._link
        return self._each(
            images, lambda image: ask_probabilities(link, image, tensors, flags, color_order), progress
        )

    async def explain(
        self, image: ImageLike, prompts: Sequence[str], **options: Unpack[ExplainOptions]
    ) -> Explanation:
        """Map the scores of prompts to places in an image. Arguments and errors as in `Client.explain`."""
        return await ask_explanation(self._link, image, prompts, options)

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
        """Find the teams of football players. Arguments and errors as in `Client.fit_teams`."""
        hints = hint_inputs(track_ids=track_ids, roles=roles, anchors=anchors, prev_state=prev_state, k=k)
        return await ask_fit(self._link, images, hints)

    async def classify_teams(self, *, state: bytes, **images: Unpack[TeamImages]) -> Teams:
        """Name the team of each player. Arguments and errors as in `Client.classify_teams`."""
        return await ask_teams(self._link, images, state)

    async def describe(self, model: str = "siglip_vision_model") -> dict[str, str]:
        """Ask for the checkpoint and settings of a model. Arguments and errors as in `Client.describe`."""
        return await ask_description(self._link, model)

    async def check_health(self) -> int:
        """Embed a small picture and return the width of the embedding, as `Client.check_health`."""
        return await ask_health(self._link)

    async def _each(
        self,
        items: Iterable[S] | AsyncIterable[S],
        operation: Callable[[S], Awaitable[NDArray[np.float32]]],
        progress: Progress | None = None,
    ) -> AsyncIterator[Outcome]:
        """The outcome of each item, in order. `concurrency` run, and as many again are read ahead."""
        turns, window = Turns(self.concurrency), deque[asyncio.Task[Outcome]]()
        done = count(1)
        try:
            async for item in _asynchronous(items):
                window.append(turns.start(operation, item))
                while window and (window[0].done() or len(window) >= 2 * self.concurrency):
                    yield await window.popleft()
                    if progress is not None:
                        progress(next(done))
            while window:
                yield await window.popleft()
                if progress is not None:
                    progress(next(done))
        finally:
            await turns.cancel()


async def _asynchronous(items: Iterable[S] | AsyncIterable[S]) -> AsyncIterator[S]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
