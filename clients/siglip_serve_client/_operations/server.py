"""Questions about the server itself: which checkpoint it runs, and if it embeds images."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from siglip_serve_client._operations.images import ask_embedding
from siglip_serve_client._operations.link import Link
from siglip_serve_client.errors import ServerError

__all__ = ["ask_description", "ask_health"]

_DESCRIBED = ("checkpoint_name", "checkpoint_revision", "dtype", "preprocess", "color", "checkpoint_note")


async def ask_health(link: Link) -> int:
    """The width of the embedding of a small picture. See `Client.check_health`."""
    picture = io.BytesIO()
    Image.new("RGB", (16, 16), (90, 120, 60)).save(picture, "PNG")
    embedding = await ask_embedding(link, picture.getvalue(), False, None)
    if not np.isfinite(embedding).all():
        raise ServerError("the server answered with numbers that are not finite")
    return int(embedding.size)


async def ask_description(link: Link, model: str) -> dict[str, str]:
    """The checkpoint and the settings of a model. See `Client.describe`."""
    parameters = await link.transport.parameters(model, link.timeout)
    return {name: parameters.get(name, "") for name in _DESCRIBED}
