"""Triton as the gateway sees it: inputs of any kind in, vectors out, each in its place."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from siglip_serve_client.errors import DeadlineError, InvalidInputError, ServerError

from siglip_gateway.inputs import File, Picture, Resolved, Text
from siglip_gateway.pictures import file_of

__all__ = ["Backend", "Checkpoint", "TritonClient"]

T = TypeVar("T")

_TEXTS = 256  # per request to Triton
_PICTURES = (
    32  # per request to Triton: enough that the request costs little, few enough to share the decoders
)
_KNOWN = 30.0  # seconds after which the checkpoint is asked for again
_HEALTHY = 1.0  # seconds for which a health check stays true
_PATIENCE = 10.0  # seconds for a health check
_PLACE = re.compile(r"INPUT_(?:IMAGE|TEXT)\[(\d+)\]")


class TritonClient(Protocol):
    """The methods of `siglip_serve_client.AsyncClient` that the gateway calls."""

    async def embed_image_batch(
        self, images: Sequence[bytes], normalized: bool = False, *, base64_encoded: bool = False
    ) -> NDArray[np.float32]:
        """Embed image files in one request."""

    async def embed_texts(
        self, texts: Sequence[str], normalized: bool = False, *, truncation: bool = False
    ) -> NDArray[np.float32]:
        """Embed texts in one request, if there are at most 256."""

    async def classify(
        self,
        image: bytes,
        labels: Sequence[str],
        *,
        templates: Sequence[str] | None = None,
        softmax: bool = False,
    ) -> NDArray[np.float32]:
        """Score labels for one image."""

    async def describe(self) -> dict[str, str]:
        """The checkpoint of the server."""

    async def check_health(self) -> int:
        """The width of the embedding of a small picture."""

    async def close(self) -> None:
        """Close the connections."""


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint that Triton serves, and the width of its embeddings."""

    name: str
    width: int
    note: str = ""
    revision: str = ""


class Backend:
    """Asks Triton. Nothing that was sent is cancelled, and no request of a caller ends another."""

    def __init__(self, client: TritonClient) -> None:
        self._client = client
        self._checkpoint: tuple[float, Checkpoint] | None = None
        self._health: tuple[float, asyncio.Task[int]] | None = None

    async def close(self) -> None:
        """Close the connections to Triton."""
        await self._client.close()

    async def embed(
        self, inputs: Sequence[Resolved], normalized: bool, truncation: bool
    ) -> NDArray[np.float32]:
        """The vectors [N, D] float32 of texts and pictures, in their order.

        Args:
            normalized: scale each vector to length 1.
            truncation: cut texts that have too many tokens, instead of refusing them.

        Raises:
            InvalidInputError: an input is refused. The message names its place in the caller's request.
            ClientError: Triton does not serve now.
        """
        client = self._client
        texts = [row for row, item in enumerate(inputs) if isinstance(item, Text)]
        encoded = [row for row, item in enumerate(inputs) if isinstance(item, Picture)]
        files = [row for row, item in enumerate(inputs) if isinstance(item, File)]

        def of_texts(rows: Sequence[int]) -> Awaitable[NDArray[np.float32]]:
            chosen = [item.text for row in rows if isinstance(item := inputs[row], Text)]
            return client.embed_texts(chosen, normalized, truncation=truncation)

        def of_pictures(rows: Sequence[int]) -> Awaitable[NDArray[np.float32]]:
            chosen = [item.base64 for row in rows if isinstance(item := inputs[row], Picture)]
            return client.embed_image_batch(chosen, normalized, base64_encoded=True)

        def of_files(rows: Sequence[int]) -> Awaitable[NDArray[np.float32]]:
            chosen = [item.data for row in rows if isinstance(item := inputs[row], File)]
            return client.embed_image_batch(chosen, normalized)

        jobs = [(of_texts, rows) for rows in _chunks(texts, _TEXTS)]
        jobs += [(of_pictures, rows) for rows in _chunks(encoded, _PICTURES)]
        jobs += [(of_files, rows) for rows in _chunks(files, _PICTURES)]
        return _in_place(
            len(inputs), await _all([_named(inputs, rows, operation) for operation, rows in jobs])
        )

    async def classify(
        self, picture: Picture | File, labels: Sequence[str], templates: Sequence[str] | None, softmax: bool
    ) -> NDArray[np.float32]:
        """The probabilities [L] float32 of labels for a picture.

        Raises:
            ClientError: as for `embed`.
        """
        data = file_of(picture)
        found = self._client.classify(data, labels, templates=templates, softmax=softmax)
        try:
            return await found
        except InvalidInputError as error:
            raise InvalidInputError(_PLACE.sub(picture.where, str(error))) from error

    async def checkpoint(self) -> Checkpoint:
        """The checkpoint of Triton. It is asked for anew now and then, as Triton may be restarted."""
        now = time.monotonic()
        if self._checkpoint is None or now - self._checkpoint[0] > _KNOWN:
            description = await self._client.describe()
            found = Checkpoint(
                description.get("checkpoint_name", ""),
                await self.healthy(),
                description.get("checkpoint_note", ""),
                description.get("checkpoint_revision", ""),
            )
            self._checkpoint = now, found
        return self._checkpoint[1]

    async def healthy(self) -> int:
        """The width of embeddings, after a real inference. Checks within a second share one.

        Raises:
            ClientError: Triton does not serve, or not within a few seconds.
        """
        now = time.monotonic()
        known = self._health
        if known is None or (known[1].done() and now - known[0] > _HEALTHY):
            task = asyncio.ensure_future(self._client.check_health())
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            known = self._health = now, task
        try:
            return await asyncio.wait_for(asyncio.shield(known[1]), _PATIENCE)
        except TimeoutError:
            raise DeadlineError(f"the inference server did not answer within {_PATIENCE:g} s") from None


def _chunks(rows: Sequence[int], most: int) -> list[Sequence[int]]:
    return [rows[start : start + most] for start in range(0, len(rows), most)]


async def _named(
    inputs: Sequence[Resolved],
    rows: Sequence[int],
    operation: Callable[[Sequence[int]], Awaitable[NDArray[np.float32]]],
) -> tuple[Sequence[int], NDArray[np.float32]]:
    """The vectors of some rows. An error names the inputs as the caller knows them."""
    try:
        return rows, await operation(rows)
    except InvalidInputError as error:

        def place(found: re.Match[str]) -> str:
            index = int(found[1])
            return inputs[rows[index]].where if index < len(rows) else found[0]

        raise InvalidInputError(_PLACE.sub(place, str(error))) from error


async def _all(jobs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all jobs. A failed job does not cancel the others, as Triton is at work on them."""
    results = await asyncio.gather(*jobs, return_exceptions=True)
    failed = [result for result in results if isinstance(result, BaseException)]
    if failed:
        # The caller's own mistake comes first: it stays after a retry.
        raise min(failed, key=lambda error: not isinstance(error, InvalidInputError))
    return [result for result in results if not isinstance(result, BaseException)]


def _in_place(count: int, parts: Sequence[tuple[Sequence[int], NDArray[np.float32]]]) -> NDArray[np.float32]:
    if len(parts) == 1:
        return np.ascontiguousarray(parts[0][1], dtype=np.float32)
    widths = {vectors.shape[1] for _, vectors in parts}
    if len(widths) != 1:
        raise ServerError(f"vectors of the widths {sorted(widths)}: images and texts do not compare")
    whole = np.empty((count, widths.pop()), dtype=np.float32)
    for rows, vectors in parts:
        whole[list(rows)] = vectors
    return whole
