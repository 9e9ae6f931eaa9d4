"""Embed what is searched for: by a running server, or in this process."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from siglip_serve_client.commands.checkpoint_note import show_note
from siglip_serve_client.commands.install_hint import install_hint
from siglip_serve_client.commands.options import connected
from siglip_serve_client.commands.search.checkpoints import mismatch
from siglip_serve_client.commands.search.collection import Collection

__all__ = ["Embedder", "QueryError", "embedded"]


class QueryError(Exception):
    """The query cannot be embedded, or not by the checkpoint of the collection. The message says why."""


class Embedder(Protocol):
    """A checkpoint in this process."""

    @property
    def name(self) -> str:
        """The hub id, or the name of the folder."""

    @property
    def revision(self) -> str:
        """The revision of a hub id, or `local`."""

    @property
    def width(self) -> int:
        """D, the numbers of an embedding."""

    @property
    def fingerprint(self) -> str:
        """A digest of the weights."""

    def text(self, text: str, truncation: bool = False) -> NDArray[np.float32]:
        """Embed a text: float32 [D]."""

    def image(self, data: bytes) -> NDArray[np.float32]:
        """Embed an image file: float32 [D]."""


def embedded(options: argparse.Namespace, collection: Collection) -> NDArray[np.float32]:
    """The embedding [D] of the text or the picture of the options.

    Raises:
        QueryError: the picture cannot be read, or another checkpoint made the collection.
        ClientError: the server does not answer, or refuses the input.
    """
    data = b""
    if options.image is not None:
        try:
            data = options.image.read_bytes()
        except OSError as error:
            raise QueryError(f"--image {options.image}: {error.strerror or error}") from error
    found = _by_server(options, collection, data) if options.url else _in_process(options, collection, data)
    if not (np.isfinite(found).all() and found.any()):
        raise QueryError("the embedding of the query is zero or not finite, so it has no cosine")
    return found


def _by_server(options: argparse.Namespace, collection: Collection, data: bytes) -> NDArray[np.float32]:
    with connected(options) as client:
        described = client.describe("siglip_text_model" if options.image is None else "siglip_vision_model")
        show_note(described)
        if options.image is None:
            found = client.embed_text(options.text, truncation=options.truncation)
        else:
            found = client.embed_image(data)
    served = described["checkpoint_name"], len(found), described["checkpoint_revision"]
    if problem := mismatch(collection, *served):
        raise QueryError(f"{collection.where}: {problem}")
    return found


def _in_process(options: argparse.Namespace, collection: Collection, data: bytes) -> NDArray[np.float32]:
    opened, refused, wrong_input = _library()
    try:
        embedder = opened(options.checkpoint or _own_checkpoint(collection), _own_settings(collection))
        names = embedder.name, embedder.width, embedder.revision
        if problem := mismatch(collection, *names, holder="--checkpoint names"):
            raise QueryError(f"{collection.where}: {problem}")
        made = collection.identity.get("checkpoint_fingerprint")
        if made and made != embedder.fingerprint:
            raise QueryError(
                f"{collection.where}: the index was made with other weights of {embedder.name}; embed its "
                "images with this checkpoint"
            )
        if options.image is None:
            return embedder.text(options.text, options.truncation)
        return embedder.image(data)
    except refused as error:
        what = "--text" if options.image is None else f"--image {options.image}"
        hint = "" if options.checkpoint else "; --checkpoint names its folder or hub id"
        raise QueryError(
            f"{what}: {error}" if isinstance(error, wrong_input) else f"{error}{hint}"
        ) from error


def _own_checkpoint(collection: Collection) -> str:
    """How the checkpoint of a collection is named: by its hub id and revision, or as it was given."""
    name, identity = collection.checkpoint, collection.identity
    revision = identity.get("checkpoint_revision", "")
    if name and revision not in ("", "local"):
        return f"{name}@{revision}"
    if not (found := identity.get("checkpoint", name)):
        raise QueryError(f"{collection.where}: names no checkpoint; name it with --checkpoint")
    return found


def _own_settings(collection: Collection) -> dict[str, str]:
    """The settings that the vectors were made with, by their names in the library."""
    identity = collection.identity
    names = {name: name for name in ("preprocess", "color", "max_num_patches")}
    names["dtype"] = "tower_dtype" if "tower_dtype" in identity else "dtype"
    if collection.id_column == "id" and "tower_dtype" not in identity:
        del names["dtype"]  # that of a bulk folder is the type of stored numbers
    return {name: identity[key] for name, key in names.items() if identity.get(key)}


def _library() -> tuple[Callable[[str, Mapping[str, str]], Embedder], type[Exception], type[Exception]]:
    """How a checkpoint is opened, the library's errors, and those of a wrong input.

    torch takes seconds, so it is imported here.
    """
    # Its threads would otherwise spin between operations, and take the cores of whatever runs besides.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from siglip_serve.bulk.query import QueryEmbedder
        from siglip_serve.errors import InvalidInputError, SiglipServeError
    except ModuleNotFoundError as error:
        raise QueryError(
            f"{error}; `{install_hint('runtime')}` adds it, or name a running server with --server"
        ) from error
    return QueryEmbedder.open, SiglipServeError, InvalidInputError
