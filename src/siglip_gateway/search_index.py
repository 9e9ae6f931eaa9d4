"""The index that a gateway searches: stored embeddings, with the names of their rows at hand.

The vectors of uncompressed `.npz` and of `.npy` files stay on disk and are read through the page cache. Those
of other files lie in memory as they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from siglip_serve_client.commands.search.collection import Collection, open_collection
from siglip_serve_client.commands.search.exact import ExactSearch

__all__ = ["SearchIndex"]


class SearchIndex(ExactSearch):
    """An exact search that knows the names of all rows.

    Attributes:
        names: of the rows, [N].
    """

    def __init__(self, collection: Collection) -> None:
        super().__init__(collection.loaded())
        self.names: Sequence[str] = self.collection.all_ids()

    @classmethod
    def open(cls, path: Path) -> SearchIndex:
        """Open a folder of `siglip-serve bulk` or an output of `siglip-serve embed`.

        Raises:
            CollectionError: it cannot be read, or is none.
        """
        return cls(open_collection(path))

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return self.collection.width

    @property
    def checkpoint(self) -> str:
        """The name of the checkpoint that the vectors were made with, or an empty text."""
        return self.collection.checkpoint

    def __len__(self) -> int:
        return len(self.collection)

    def name(self, index: int) -> str:
        """The name of a row, as text that can be written as JSON."""
        return str(self.names[index]).encode(errors="replace").decode()
