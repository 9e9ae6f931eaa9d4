"""The operations on images and texts that `Client` and `AsyncClient` share."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from siglip_serve_client._operations.encoding import ColorOrder, ImageLike, encoded
from siglip_serve_client._operations.requests import (
    Answer,
    Call,
    Describe,
    Operation,
    Tensor,
    Work,
    ask,
    output,
    strings,
)
from siglip_serve_client._operations.shared_memory import Regions
from siglip_serve_client.errors import InvalidInputError, ServerError

__all__ = [
    "Link",
    "ask_image",
    "check_health",
    "chunks",
    "classify",
    "describe",
    "embed_image",
    "embed_texts",
    "label_tensors",
    "utf8",
]

# Texts in a request: enough that the request itself costs little, few enough that several towers have work.
_TEXTS = 256
_IDENTITY = ("checkpoint_name", "checkpoint_revision", "dtype", "preprocess")


@dataclass(frozen=True)
class Link:
    """What requests share: their timeout in seconds, and the regions for frames in shared memory."""

    timeout: float
    regions: Regions | None = None


def embed_image(
    link: Link, image: ImageLike, normalized: bool, color_order: ColorOrder | None
) -> Operation[NDArray[np.float32]]:
    """See `Client.embed_image`."""
    parameters: dict[str, str | bool] = {"normalized": True} if normalized else {}
    call = Call("embed_image", [], parameters, link.timeout)
    answer = yield from ask_image(link, call, image, color_order)
    return _row(answer, "EMBEDDING")


def classify(
    link: Link, image: ImageLike, labels: Sequence[Tensor], softmax: bool, color_order: ColorOrder | None
) -> Operation[NDArray[np.float32]]:
    """See `Client.classify`; `labels` are those of `label_tensors`."""
    parameters: dict[str, str | bool] = {"softmax": True} if softmax else {}
    call = Call("classify_image", labels, parameters, link.timeout)
    answer = yield from ask_image(link, call, image, color_order)
    return _row(answer, "PROBABILITIES")


def label_tensors(labels: Sequence[str], templates: Sequence[str] | None) -> list[Tensor]:
    """Labels, and templates if there are any, as inputs.

    Raises:
        TypeError: not sequences of texts.
    """
    tensors = [strings("LABELS", "labels", utf8("labels", labels))]
    if templates is not None:
        tensors.append(strings("TEMPLATE", "templates", utf8("templates", templates)))
    return tensors


def embed_texts(
    link: Link, texts: Sequence[str], first: int, normalized: bool, truncation: bool
) -> Operation[NDArray[np.float32]]:
    """Embeddings [n, D] of texts that fit one request; `first` is the index of the first for messages."""
    flags = {"normalized": normalized, "truncation": truncation}
    parameters: dict[str, str | bool] = {name: True for name, wanted in flags.items() if wanted}
    tensor = strings("INPUT_TEXT", "texts", utf8("texts", texts, first), columns=True)
    try:
        answer = yield from ask(Call("embed_text", [tensor], parameters, link.timeout))
    except InvalidInputError as error:
        shifted = re.sub(
            r"INPUT_TEXT\[(\d+)\]", lambda found: f"INPUT_TEXT[{first + int(found[1])}]", str(error)
        )
        raise InvalidInputError(shifted) from error
    return output(answer, "EMBEDDING")


def chunks(texts: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Texts as they go into requests, each with the index of its first."""
    if isinstance(texts, str | bytes):
        raise TypeError(f"texts: one {type(texts).__name__}, expected several texts")
    rest, first = iter(texts), 0
    while chunk := list(islice(rest, _TEXTS)):
        yield first, chunk
        first += len(chunk)


def check_health(link: Link) -> Operation[int]:
    """See `Client.check_health`."""
    picture = io.BytesIO()
    Image.new("RGB", (16, 16), (90, 120, 60)).save(picture, "PNG")
    embedding = yield from embed_image(link, picture.getvalue(), False, None)
    if not np.isfinite(embedding).all():
        raise ServerError("the server answered with numbers that are not finite")
    return int(embedding.size)


def describe(link: Link) -> Operation[dict[str, str]]:
    """See `Client.describe`."""
    parameters: dict[str, str] = yield Describe("siglip_vision_model", link.timeout)
    return {name: parameters.get(name, "") for name in _IDENTITY}


def ask_image(link: Link, call: Call, image: ImageLike, color_order: ColorOrder | None) -> Operation[Answer]:
    """The answer to `call` with the image as one more input."""
    if isinstance(image, bytes):
        data = image
    else:
        # Arrays travel as BMP: to compress a frame takes longer than to send it.
        data = yield Work(lambda: encoded(image, "image", color_order, "BMP"))
    if link.regions is not None and isinstance(image, Image.Image | np.ndarray):
        parts = [np.frombuffer(part, np.uint8) for part in (len(data).to_bytes(4, "little"), data)]
        return (yield from link.regions.ask(call, "INPUT_IMAGE", "BYTES", (1, 1), parts))
    tensor = strings("INPUT_IMAGE", "image", [data], columns=True)
    return (yield from ask(replace(call, inputs=[tensor, *call.inputs])))


def _row(answer: Answer, name: str) -> NDArray[np.float32]:
    rows = output(answer, name)
    if rows.ndim != 2 or len(rows) != 1:
        raise ServerError(f"the answer's {name} has the shape {list(rows.shape)}, expected one row")
    return np.asarray(rows[0])


def utf8(argument: str, texts: Sequence[str], first: int = 0) -> list[bytes]:
    """Texts as bytes; `first` is the index of the first for messages.

    Raises:
        TypeError: not a sequence of texts.
    """
    if isinstance(texts, str | bytes):
        raise TypeError(f"{argument}: one {type(texts).__name__}, expected several texts")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{argument}[{first + index}]: {type(text).__name__}, expected str")
    return [text.encode() for text in texts]
