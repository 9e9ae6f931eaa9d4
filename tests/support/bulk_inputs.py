"""Inputs of bulk jobs: small pictures, tar archives, Parquet files and listings of them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from images import encode
from PIL import Image

from siglip_serve.bulk.items import Item

__all__ = ["BROKEN", "outcome", "small_jpeg", "write_parquet", "write_pictures", "write_tar"]

BROKEN = b"\xff\xd8 not a picture"


def small_jpeg(seed: int, side: int = 128) -> bytes:
    """Make a JPEG file of coloured clouds, another one for each seed. It takes less than a millisecond."""
    clouds = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return encode(Image.fromarray(clouds).resize((side, side), Image.Resampling.BICUBIC), "JPEG", quality=80)


def outcome(item: Item) -> bytes | str:
    """The bytes of a picture, or the reason why it cannot be read."""
    if item.error:
        return item.error
    if isinstance(item.data, bytes):
        return item.data
    try:
        return item.data.read()
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)


def write_pictures(folder: Path, seeds: Iterable[int], name: str = "{:06}.jpg") -> list[Path]:
    """Write a picture per seed, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name.format(seed) for seed in seeds]
    for seed, path in zip(seeds, paths, strict=True):
        path.write_bytes(small_jpeg(seed))
    return paths


def write_tar(path: Path, members: Mapping[str, bytes], mode: str = "w") -> Path:
    """Write a tar archive of members by name; the mode `w:gz` compresses it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_parquet(path: Path, columns: Mapping[str, Sequence[Any]], rows: int = 1000) -> Path:
    """Write a Parquet file with row groups of as many rows."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(dict(columns)), path, row_group_size=rows)
    return path
