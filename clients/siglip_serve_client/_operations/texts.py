"""Embeddings of texts, in requests of several texts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from siglip_serve_client._operations.link import Link
from siglip_serve_client._operations.requests import Call, output, refuse_single, strings, utf8
from siglip_serve_client.errors import InvalidInputError

__all__ = ["ask_text_embeddings", "text_chunks"]

# Texts per request: enough that the request itself costs little, few enough that several towers have work.
_TEXTS = 256


async def ask_text_embeddings(
    link: Link, texts: Sequence[str], first: int, normalized: bool, truncation: bool
) -> NDArray[np.float32]:
    """Embeddings [n, D] of texts that fit one request. `first` is the index of the first for messages."""
    flags = {"normalized": normalized, "truncation": truncation}
    parameters: dict[str, str | bool] = {name: True for name, wanted in flags.items() if wanted}
    tensor = strings("INPUT_TEXT", "texts", utf8("texts", texts, first), columns=True)
    try:
        answer = await link.transport.infer(Call("embed_text", [tensor], parameters, link.timeout))
    except InvalidInputError as error:
        shifted = re.sub(
            r"INPUT_TEXT\[(\d+)\]", lambda found: f"INPUT_TEXT[{first + int(found[1])}]", str(error)
        )
        raise InvalidInputError(shifted) from error
    return output(answer, "EMBEDDING")


def text_chunks(texts: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Texts as they go into requests, each chunk with the index of its first text.

    Raises:
        TypeError: one text instead of several.
    """
    refuse_single("texts", texts, "texts")
    rest, first = iter(texts), 0
    while chunk := list(islice(rest, _TEXTS)):
        yield first, chunk
        first += len(chunk)
