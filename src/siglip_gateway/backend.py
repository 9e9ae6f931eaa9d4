"""Triton as the gateway sees it: inputs of any kind in, vectors out, each in its place."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray
from siglip_serve_client import ExplainOptions, Explanation, TeamFit, TeamImages, Teams
from siglip_serve_client.errors import (
    ClientError,
    DeadlineError,
    InvalidInputError,
    MissingModelError,
    ServerError,
)

from siglip_gateway.inputs import File, Picture, Resolved, Text
from siglip_gateway.places import placed

__all__ = ["Backend", "Checkpoint", "Health", "TritonClient"]

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
        truncation: bool = False,
    ) -> NDArray[np.float32]:
        """Score labels for one image."""

    async def explain(
        self, image: bytes, prompts: Sequence[str], **options: Unpack[ExplainOptions]
    ) -> Explanation:
        """Map the scores of prompts to places in an image."""

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
        """Find the teams of football players."""

    async def classify_teams(self, *, state: bytes, **images: Unpack[TeamImages]) -> Teams:
        """Name the team of each player."""

    async def describe(self, model: str = "siglip_vision_model") -> dict[str, str]:
        """The checkpoint of a model."""

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


@dataclass(frozen=True)
class Health:
    """The outcome of a real inference of both towers.

    Attributes:
        width: of embeddings, or 0 if no tower answered.
        failed: the errors of `image` and `text`, as far as they failed.
        missing: those of the two that Triton does not serve.
    """

    width: int
    failed: Mapping[str, ClientError]
    missing: tuple[str, ...] = ()


class Backend:
    """Asks Triton. Nothing that was sent is cancelled, and no request of a caller ends another."""

    def __init__(self, client: TritonClient) -> None:
        self._client = client
        self._checkpoint: tuple[float, Checkpoint] | None = None
        self._described: dict[str, tuple[float, Mapping[str, str]]] = {}
        self._health: tuple[float, asyncio.Task[Health]] | None = None

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

    async def ask(self, operation: Callable[[TritonClient], Awaitable[T]], fields: Mapping[str, str]) -> T:
        """The result of an operation of Triton's client.

        Args:
            operation: what is asked.
            fields: the caller's name of each of Triton's inputs, for messages (`places.placed`).

        Raises:
            ClientError: as for `embed`.
        """
        try:
            return await operation(self._client)
        except InvalidInputError as error:
            raise placed(error, fields) from error

    async def checkpoint(self) -> Checkpoint:
        """The checkpoint of Triton. It is asked for anew now and then, as Triton may be restarted.

        Raises:
            ClientError: Triton does not serve now, or no tower.
        """
        now = time.monotonic()
        if self._checkpoint is None or now - self._checkpoint[0] > _KNOWN:
            try:
                description = await self.described("siglip_vision_model")
            except MissingModelError:
                description = await self.described("siglip_text_model")
            health = await self.health()
            if not health.width:
                raise next(iter(health.failed.values()))
            found = Checkpoint(
                description.get("checkpoint_name", ""), health.width, description.get("checkpoint_note", "")
            )
            self._checkpoint = now, found
        return self._checkpoint[1]

    async def described(self, model: str) -> Mapping[str, str]:
        """The checkpoint and settings of a model of Triton, asked for anew now and then.

        Raises:
            ClientError: Triton does not serve now, or not this model.
        """
        now = time.monotonic()
        known = self._described.get(model)
        if known is None or now - known[0] > _KNOWN:
            known = self._described[model] = now, await self._client.describe(model)
        return known[1]

    async def healthy(self) -> int:
        """The width of embeddings, after a real inference of both towers.

        Raises:
            ClientError: a tower does not answer, or not within a few seconds.
        """
        health = await self.health()
        if health.failed:
            raise next(iter(health.failed.values()))
        return health.width

    async def health(self) -> Health:
        """The outcome of a real inference of both towers. Checks within a second share one."""
        now = time.monotonic()
        known = self._health
        if known is None or (known[1].done() and now - known[0] > _HEALTHY):
            task = asyncio.ensure_future(self._infer())
            task.add_done_callback(_consume)
            known = self._health = now, task
        return await asyncio.shield(known[1])

    async def _infer(self) -> Health:
        tasks = {
            "image": asyncio.ensure_future(self._client.check_health()),
            "text": asyncio.ensure_future(self._width_of_a_text()),
        }
        for task in tasks.values():
            task.add_done_callback(_consume)
        # A check that is late is left to its end, as a cancelled request can end Triton.
        await asyncio.wait(tasks.values(), timeout=_PATIENCE)
        width = 0
        failed: dict[str, ClientError] = {}
        missing = []
        for name, task in tasks.items():
            error = task.exception() if task.done() else _late()
            if error is None:
                width = task.result()
            elif isinstance(error, MissingModelError):
                missing.append(name)
            elif isinstance(error, ClientError):
                failed[name] = error
            else:
                raise error
        if not width and not failed:
            failed = {name: MissingModelError(f"no model embeds {name}s") for name in missing}
        return Health(width, failed, tuple(missing))

    async def _width_of_a_text(self) -> int:
        # A text that came before would be answered from the cache instead of by the tower.
        vectors = await self._client.embed_texts([secrets.token_hex(4)], False)
        if not np.isfinite(vectors).all():
            raise ServerError("the server answered with numbers that are not finite")
        return int(vectors.shape[1])


def _late() -> DeadlineError:
    return DeadlineError(f"the inference server did not answer within {_PATIENCE:g} s")


def _consume(task: asyncio.Future[Any]) -> None:
    """Read the error of a task whose callers may have given up."""
    if not task.cancelled():
        task.exception()


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
