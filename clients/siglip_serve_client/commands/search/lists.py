"""An approximate index: vectors in lists around centres, of which a search reads the nearest few.

The folder holds `index.json`, `centres.npy` [L, D], `starts.npy` [L + 1], and in the order of the lists
`rows.npy` [N], `vectors.npy` [N, D] as float16 of length 1 (int8 where the collection has int8) and
`lengths.npy` [N]. Nothing of the collection is read for a search, and only the lists of the index that are
near the query.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siglip_serve_client.commands.search.collection import Collection, CollectionError
from siglip_serve_client.commands.search.exact import Hit, best_of, cosines
from siglip_serve_client.commands.search.kinds import Kind, kind_of, products

__all__ = ["ARRAYS", "DESCRIPTION", "VERSION", "Lists", "fingerprint", "index_folder", "open_lists"]

VERSION, DESCRIPTION = 1, "index.json"
ARRAYS = ("centres", "starts", "rows", "vectors", "lengths")
_MAPPED = ("vectors", "rows", "lengths")  # as long as the collection
_MARGIN = 64


@dataclass(frozen=True)
class Lists:
    """An open index. What is as long as the collection stays on disk.

    Attributes:
        described: what `index.json` says: `probes` reach the recall that was asked for when it was built.
    """

    centres: NDArray[np.float32]
    starts: NDArray[np.int64]
    rows: NDArray[np.int64]
    vectors: NDArray[Any]
    lengths: NDArray[np.float32]
    described: Mapping[str, Any]

    @property
    def kind(self) -> Kind:
        """Kind of the stored vectors."""
        return kind_of(self.vectors.dtype)

    @property
    def probes(self) -> int:
        """Lists that a search reads unless told otherwise."""
        return int(self.described["probes"])

    def search(self, query: NDArray[np.float32], count: int, probes: int = 0) -> tuple[list[Hit], int]:
        """The rows of the largest cosines among the lists nearest to the query, best first.

        Args:
            query: float [D], not zero.
            count: of rows at most.
            probes: lists that are read, or 0 for the index's own.

        Returns:
            The rows, and the number of rows that were compared.
        """
        unit = query / np.linalg.norm(query)
        near = np.sort(best_of(self.centres @ unit, probes or self.probes))
        best, scores = np.empty(0, np.int64), np.empty(0, np.float32)
        compared = 0
        for number in near.tolist():
            start, stop = self.starts[number : number + 2].tolist()
            found = products(self.vectors[start:stop], self.kind, len(unit), unit) / self.lengths[start:stop]
            rows = best_of(found, count + _MARGIN)
            best, scores = np.concatenate([best, start + rows]), np.concatenate([scores, found[rows]])
            compared += stop - start
        best = best[best_of(scores, count + _MARGIN)]
        best = best[np.argsort(self.rows[best])]
        exact = cosines(self.vectors[best], self.kind, len(unit), query)
        order = np.argsort(-exact, kind="stable")[:count]
        return [Hit(int(self.rows[best[place]]), float(exact[place])) for place in order], compared


def index_folder(collection: Collection) -> Path:
    """The folder of a collection's index: inside its folder, or next to its file."""
    where = collection.where
    return where / "index" if where.is_dir() else where.with_name(where.name + ".index")


def fingerprint(collection: Collection) -> str:
    """Identify the files and rows of a collection without reading its vectors."""
    parts = [[name, part.rows] for name, part in zip(collection.names, collection.parts, strict=True)]
    ends = collection.ids(np.array([0, len(collection) - 1]))
    return hashlib.sha256(json.dumps([parts, ends]).encode()).hexdigest()


def open_lists(collection: Collection) -> Lists:
    """Open the index of a collection.

    Raises:
        CollectionError: there is none, it is damaged, or the collection has changed since it was built.
    """
    folder = index_folder(collection)
    again = "--build-index builds it again"
    if not (folder / DESCRIPTION).is_file():
        raise CollectionError(f"{folder}: there is no index; --build-index builds one")
    try:
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if described["version"] != VERSION:
            raise CollectionError(f"{folder}: version {described['version']}, expected {VERSION}; {again}")
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r" if name in _MAPPED else None)
            for name in ARRAYS
        }
        lists = Lists(**arrays, described=described)
        sizes = len(lists.rows), len(lists.vectors), len(lists.lengths), int(lists.starts[-1])
        if len(set(sizes)) > 1 or lists.vectors.shape[1] != collection.width:
            raise ValueError(f"arrays of {sizes} rows of width {lists.vectors.shape[1]}")
        checkpoint = described["checkpoint_name"], described["checkpoint_revision"]
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise CollectionError(f"{folder}: damaged ({error}); {again}") from error
    own = collection.checkpoint, collection.identity.get("checkpoint_revision", "")
    if described.get("fingerprint") != fingerprint(collection) or checkpoint != own:
        raise CollectionError(f"{folder}: {collection.where} has changed since the index was built; {again}")
    return lists
