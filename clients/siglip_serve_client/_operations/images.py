"""Operations on one image: its embedding, and the probabilities of labels."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from siglip_serve_client._operations.encoding import (
    ColorOrder,
    ImageLike,
    encoded,
    refuse_one_image,
)
from siglip_serve_client._operations.link import Link
from siglip_serve_client._operations.requests import Answer, Call, Tensor, output, strings, utf8
from siglip_serve_client.errors import ServerError

__all__ = [
    "ask_embedding",
    "ask_embeddings",
    "ask_image",
    "ask_probabilities",
    "label_flags",
    "label_tensors",
]


async def ask_embedding(
    link: Link, image: ImageLike, normalized: bool, color_order: ColorOrder | None
) -> NDArray[np.float32]:
    """The embedding of an image. See `Client.embed_image`."""
    parameters: dict[str, str | bool] = {"normalized": True} if normalized else {}
    call = Call("embed_image", [], parameters, link.timeout)
    return _row(await ask_image(link, call, image, color_order), "EMBEDDING")


async def ask_embeddings(
    link: Link, images: Sequence[bytes], normalized: bool, base64_encoded: bool
) -> NDArray[np.float32]:
    """The embeddings [n, D] of image files that fit one request. See `Client.embed_image_batch`."""
    refuse_one_image("images", images)
    if not images:
        return np.empty((0, 0), dtype=np.float32)
    flags = {"normalized": normalized, "base64_encoded": base64_encoded}
    parameters: dict[str, str | bool] = {name: True for name, wanted in flags.items() if wanted}
    tensor = strings("INPUT_IMAGE", "images", images, columns=True)
    answer = await link.transport.infer(Call("embed_image", [tensor], parameters, link.timeout))
    rows = output(answer, "EMBEDDING")
    if rows.ndim != 2 or len(rows) != len(images):
        raise ServerError(
            f"the answer's EMBEDDING has the shape {list(rows.shape)}, expected {len(images)} rows"
        )
    return rows


async def ask_probabilities(
    link: Link,
    image: ImageLike,
    labels: Sequence[Tensor],
    flags: Collection[str],
    color_order: ColorOrder | None,
) -> NDArray[np.float32]:
    """The probabilities of labels. See `Client.classify`.

    Args:
        link: of the client.
        image: as for `Client.classify`.
        labels: from `label_tensors`.
        flags: parameters that are true: softmax, truncation.
        color_order: of an array.
    """
    call = Call("classify_image", labels, dict.fromkeys(flags, True), link.timeout)
    return _row(await ask_image(link, call, image, color_order), "PROBABILITIES")


def label_flags(softmax: bool, truncation: bool) -> list[str]:
    """The parameters of a classification that are true."""
    flags = {"softmax": softmax, "truncation": truncation}
    return [name for name, wanted in flags.items() if wanted]


def label_tensors(labels: Sequence[str], templates: Sequence[str] | None) -> list[Tensor]:
    """Labels, and templates if there are any, as inputs.

    Raises:
        TypeError: not sequences of texts.
    """
    tensors = [strings("LABELS", "labels", utf8("labels", labels))]
    if templates is not None:
        tensors.append(strings("TEMPLATE", "templates", utf8("templates", templates)))
    return tensors


async def ask_image(link: Link, call: Call, image: ImageLike, color_order: ColorOrder | None) -> Answer:
    """The answer to `call` with the image as one more input."""
    if isinstance(image, bytes):
        data = image
    else:
        # Arrays travel as BMP: compressing a frame takes longer than sending it.
        data = await asyncio.to_thread(encoded, image, "image", color_order, "BMP")
    if link.regions is not None and isinstance(image, Image.Image | np.ndarray):
        parts = [np.frombuffer(part, np.uint8) for part in (len(data).to_bytes(4, "little"), data)]
        return await link.regions.ask(call, "INPUT_IMAGE", "BYTES", (1, 1), parts)
    tensor = strings("INPUT_IMAGE", "image", [data], columns=True)
    return await link.transport.infer(replace(call, inputs=[tensor, *call.inputs]))


def _row(answer: Answer, name: str) -> NDArray[np.float32]:
    rows = output(answer, name)
    if rows.ndim != 2 or len(rows) != 1:
        raise ServerError(f"the answer's {name} has the shape {list(rows.shape)}, expected one row")
    return np.asarray(rows[0])
