"""Pictures of an index: files in one folder, found by the names of the index, and never any other file."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from siglip_gateway.refusals import Refusal

__all__ = ["SearchImages"]

_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".avif"}
# Formats that browsers show, by their names in Pillow. MPO is JPEG with further pictures behind the first.
_TYPES = {
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
    "AVIF": "image/avif",
}


class SearchImages:
    """The pictures in a folder.

    A name is looked for in the folder, then as a path from `base`, and then in the folder without the folders
    that all names have in common. Only files that lie in the folder are found, also where a name or a link
    leads elsewhere.

    Args:
        folder: that may be read.
        base: folder in which the names of the index were paths.
        names: of the index.
    """

    def __init__(self, folder: Path, base: Path, names: Sequence[str] | NDArray[np.str_]) -> None:
        self._folder, self._base, self._names = folder.resolve(), base, names

    def find(self, index: int) -> Path | None:
        """The file of a row, or None if there is none that may be read."""
        name = str(self._names[index])
        if Path(name).suffix.lower() not in _SUFFIXES:
            return None
        candidates = [self._folder / name, self._base / name]
        if self._common and name.startswith(self._common):
            candidates.append(self._folder / name.removeprefix(self._common))
        for candidate in candidates:
            try:
                file = candidate.resolve(strict=True)
                if file.is_relative_to(self._folder) and file.is_file():
                    return file
            except (OSError, ValueError, RuntimeError):  # RuntimeError: links in a circle
                continue
        return None

    def read(self, index: int, most: int) -> tuple[bytes, str]:
        """The file of a row, and its media type.

        Args:
            most: bytes of the file.

        Raises:
            Refusal: 404, there is none, or 415, it is no picture that browsers show, or 413.
        """
        file = self.find(index)
        if file is None:
            raise Refusal(404, f"index: no picture of row {index}", param="index", code="not_found")
        try:
            size = file.stat().st_size
            data = file.read_bytes() if size <= most else b""
        except OSError as error:
            raise Refusal(
                404, f"index: row {index}: {error.strerror}", param="index", code="not_found"
            ) from None
        if size > most:
            raise Refusal(413, f"index: row {index} has {size} bytes, at most {most} are sent", param="index")
        kind = _type_of(data)
        if kind is None:
            raise Refusal(415, f"index: row {index} is no picture that browsers show", param="index")
        return data, kind

    @cached_property
    def _common(self) -> str:
        """The folders that all names have in common, with a slash at the end, or an empty text."""
        if not len(self._names):
            return ""
        least, largest = min(map(str, self._names)), max(map(str, self._names))
        pairs = enumerate(zip(least, largest, strict=False))
        shared = next((place for place, (one, other) in pairs if one != other), len(least))
        return least[: least.rfind("/", 0, shared) + 1]


def _type_of(data: bytes) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large pictures: no pixel is decoded
            with Image.open(io.BytesIO(data)) as image:
                return _TYPES.get(image.format or "")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
