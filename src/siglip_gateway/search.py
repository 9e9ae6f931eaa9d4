"""The index that a gateway searches, its pictures, and the threads that search."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from siglip_serve_client.commands.search.checkpoints import mismatch
from siglip_serve_client.commands.search.collection import CollectionError
from siglip_serve_client.commands.search.exact import Hit

from siglip_gateway.backend import Checkpoint
from siglip_gateway.options import GatewayOptions
from siglip_gateway.refusals import Refusal
from siglip_gateway.search_images import SearchImages
from siglip_gateway.search_index import SearchIndex

__all__ = ["Search", "open_search"]

_THREADS = 2  # NumPy uses all cores for one search


class Search:
    """Searches off the event loop.

    Attributes:
        index: that is searched.
        pictures: of its rows, or None if none may be read.
    """

    def __init__(self, index: SearchIndex, pictures: SearchImages | None) -> None:
        self.index, self.pictures = index, pictures
        self._pool = ThreadPoolExecutor(_THREADS, "siglip-gateway-search")

    def mismatch(self, checkpoint: Checkpoint) -> str | None:
        """A sentence about an index that was not made with the checkpoint, or None if it may have been."""
        return mismatch(self.index.collection, checkpoint.name, checkpoint.width)

    async def find(self, query: NDArray[np.float32], count: int) -> list[tuple[Hit, str, bool]]:
        """The best rows with their names, and if they have a picture, best first."""

        def found() -> list[tuple[Hit, str, bool]]:
            hits = self.index.search(query, count)
            return [(hit, self.index.name(hit.index), self._has_picture(hit.index)) for hit in hits]

        return await asyncio.get_running_loop().run_in_executor(self._pool, found)

    async def picture(self, index: int, most: int) -> tuple[bytes, str]:
        """The picture of a row, and its media type.

        Raises:
            Refusal: there is no such row, or as `SearchImages.read`.
        """
        if not 0 <= index < len(self.index):
            raise Refusal(
                404,
                f"index: {index}, expected 0 to {len(self.index) - 1}",
                param="index",
                code="not_found",
            )
        if self.pictures is None:
            raise Refusal(404, "no pictures are shown; --search-images names their folder", param="index")
        return await asyncio.to_thread(self.pictures.read, index, most)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _has_picture(self, index: int) -> bool:
        return self.pictures is not None and self.pictures.find(index) is not None


def open_search(options: GatewayOptions) -> Search | None:
    """The search that the options name, or None.

    Raises:
        CollectionError: the index cannot be read, or there is no such folder of pictures.
    """
    if options.search is None:
        if options.search_images is not None:
            raise CollectionError("--search-images: expected --search with it")
        return None
    index = SearchIndex.open(Path(options.search))
    if options.search_images is None:
        return Search(index, None)
    folder = Path(options.search_images)
    if not folder.is_dir():
        raise CollectionError(f"{folder}: no such folder")
    base = Path(options.search_base) if options.search_base else Path.cwd()
    return Search(index, SearchImages(folder, base, index.names))
