"""Names and archives of images: suffixes that are read, members of tar archives, names that are no UTF-8."""

from __future__ import annotations

import tarfile
from typing import Self

__all__ = ["IMAGE_SUFFIXES", "TAR_SUFFIXES", "ArchiveMember", "printable"]

IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".mpo",
        ".png",
        ".apng",
        ".tif",
        ".tiff",
        ".webp",
        ".gif",
        ".bmp",
        ".avif",
        ".avifs",
    ]
)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


class ArchiveMember(tarfile.TarInfo):
    """A member of an archive that must end with zeros, as archives do.

    `tarfile` takes a header that is cut off, missing or damaged for the end, unless it is the first.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        """Read the next member.

        Raises:
            ReadError: there is neither a member nor an end.
        """
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no member and no end at byte {archive.offset}: {error}") from error


def printable(name: str) -> str:
    """The name as text that can be written as UTF-8. Names of files may be any bytes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
