"""Compare the checkpoint that embeddings were made with and the one that embeds what is searched for."""

from __future__ import annotations

from siglip_serve_client.commands.search.collection import Collection

__all__ = ["mismatch"]


def mismatch(
    collection: Collection, name: str, width: int, revision: str = "", holder: str = "the server runs"
) -> str | None:
    """A sentence about a collection that was not made with a checkpoint, or None if it may have been.

    A checkpoint has one name as a folder and as a hub id, so only the last part of names is compared.
    Revisions are compared where both are known and come from a hub.

    Args:
        width: numbers of the checkpoint's vectors.
        holder: words for where the checkpoint is.
    """
    if collection.width != width:
        return (
            f"the index has vectors of {collection.width} numbers, and those of {name} have {width}; "
            "embed its images with this checkpoint"
        )
    if collection.checkpoint and _last(collection.checkpoint) != _last(name):
        return (
            f"the index was made with {collection.checkpoint}, and {holder} {name}, whose vectors do not "
            "compare with it; embed its images with this checkpoint"
        )
    made = collection.identity.get("checkpoint_revision", "")
    if made != revision and not {made, revision} & {"", "local"}:
        return (
            f"the index was made with revision {made} of {name}, and {holder} revision {revision}; embed its "
            "images with this revision"
        )
    return None


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]
