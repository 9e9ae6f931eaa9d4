"""Build the approximate index of a collection, and measure its recall."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siglip_serve_client.commands.search.clusters import centres_of, nearest_centres
from siglip_serve_client.commands.search.collection import Collection, CollectionError
from siglip_serve_client.commands.search.exact import best_of, cosines
from siglip_serve_client.commands.search.kinds import kind_of, lengths, widened
from siglip_serve_client.commands.search.lists import (
    ARRAYS,
    DESCRIPTION,
    VERSION,
    Lists,
    fingerprint,
    index_folder,
)

__all__ = ["NEAREST", "Measured", "build_index"]

NEAREST = 10  # rows that the recall is about
_QUERIES = 200
_SAMPLE = 2**27  # numbers that centres are fitted to: 512 MiB as float32
_PER_LIST = 64  # rows per list that they are fitted to, if there are as many
_LEAST_ROWS = 1000
_SEED = 0

Floats = NDArray[np.float32]
Progress = Callable[[str, int], object]


@dataclass(frozen=True)
class Measured:
    """The index with a number of probes, against the exact search.

    Attributes:
        recall: share of the exact nearest ten, the query's own row left out, that is found.
        compared: mean share of all rows.
        milliseconds: mean of a query.
    """

    probes: int
    recall: float
    compared: float
    milliseconds: float


def build_index(
    collection: Collection, recall: float, progress: Progress = lambda *_: None
) -> tuple[Lists, list[Measured]]:
    """Build the index next to the embeddings, replacing an earlier one, and choose its number of probes.

    All vectors are read three times. Memory: a sample of at most 512 MiB, two copies of it, and 24 bytes per
    row. Random rows are then searched for with 1, 2, 4... probes, until the index finds the wanted share of
    their exact nearest ten.

    Args:
        recall: above 0, at most 1.
        progress: called with the name of a step and the rows that were read since the last call.

    Raises:
        CollectionError: the collection has bits or less than 1,000 rows, or the folder cannot be written.
    """
    if collection.kind == "binary":
        raise CollectionError(f"{collection.where}: has bits, which are searched without an index")
    if len(collection) < _LEAST_ROWS:
        count = len(collection)
        raise CollectionError(f"{collection.where}: {count} rows, an index needs at least {_LEAST_ROWS}")
    folder = index_folder(collection)
    new = folder.with_name(f".{folder.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        lists = _written(collection, new, progress)
        measured = _measured(collection, lists, recall, progress)
        lists = replace(lists, described=_description(collection, lists, measured))
        (new / DESCRIPTION).write_text(json.dumps(lists.described, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        new.replace(folder)
    except OSError as error:
        raise CollectionError(f"{folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return lists, measured


def _written(collection: Collection, folder: Path, progress: Progress) -> Lists:
    """Write the arrays of an index."""
    count = min(len(collection) // 16, round(2 * math.sqrt(len(collection))))
    centres = centres_of(_sample(collection, count), count, _SEED)
    owners = np.empty(len(collection), np.int32)
    for start, rows in _units(collection):
        nearest = nearest_centres(np.nan_to_num(rows), centres)
        owners[start : start + len(rows)] = np.where(np.isnan(rows[:, 0]), -1, nearest)
        progress("assign", len(rows))
    # Rows without a length have no list.
    order = np.argsort(owners, kind="stable")[np.count_nonzero(owners < 0) :]
    starts = np.searchsorted(owners[order], np.arange(count + 1))
    places = np.full(len(collection), -1)
    places[order] = np.arange(len(order))
    dtype = np.int8 if collection.kind == "int8" else np.float16
    shape = len(order), collection.width
    vectors = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
        folder / "vectors.npy", "w+", dtype, shape
    )
    sizes = np.empty(len(order), np.float32)
    for start, block in collection.blocks():
        rows = block if dtype == np.int8 else collection.unit(block).astype(np.float16)
        own = places[start : start + len(rows)]
        vectors[own[own >= 0]] = rows[own >= 0]
        stored = widened(rows[own >= 0], kind_of(rows.dtype), collection.width)
        sizes[own[own >= 0]] = lengths(stored, kind_of(rows.dtype))
        progress("write", len(rows))
    vectors.flush()
    lists = Lists(centres, starts, order, vectors, sizes, {})
    for name in ARRAYS:
        if name != "vectors":
            np.save(folder / f"{name}.npy", getattr(lists, name))
    return lists


def _sample(collection: Collection, lists: int) -> Floats:
    """Random rows that have a length."""
    most = min(len(collection), lists * _PER_LIST, max(lists, _SAMPLE // collection.width))
    chosen = np.random.default_rng(_SEED).choice(len(collection), most, replace=False)
    rows = collection.unit(collection.take(np.sort(chosen)))
    rows = rows[~np.isnan(rows[:, 0])]
    if len(rows) < lists:
        raise CollectionError(f"{collection.where}: most vectors are zero or not finite")
    return rows


def _measured(collection: Collection, lists: Lists, recall: float, progress: Progress) -> list[Measured]:
    """Measure more and more probes, until the recall is reached or all lists are read."""
    generator = np.random.default_rng(_SEED + 1)
    own = np.sort(generator.choice(lists.rows, min(_QUERIES, len(lists.rows)), replace=False))
    queries = collection.unit(collection.take(own))
    exact = _exact_neighbours(collection, own, queries, progress)
    found: list[Measured] = []
    probes = 1
    while True:
        shares, compared, begin = [], 0, time.perf_counter()
        for row, query, expected in zip(own.tolist(), queries, exact, strict=True):
            hits, read = lists.search(query, NEAREST + 1, probes)
            others = [hit.index for hit in hits if hit.index != row][:NEAREST]
            shares.append(len(expected & set(others)) / len(expected))
            compared += read
        milliseconds = (time.perf_counter() - begin) * 1000 / len(own)
        share = compared / len(own) / len(collection)
        found.append(Measured(probes, float(np.mean(shares)), share, milliseconds))
        if found[-1].recall >= recall or probes >= len(lists.centres):
            return found
        probes = min(2 * probes, len(lists.centres))


def _exact_neighbours(
    collection: Collection, own: NDArray[np.int64], queries: Floats, progress: Progress
) -> list[set[int]]:
    """The nearest rows of each query other than its own, by an exact search for all of them at once."""
    best = [np.empty(0, np.int64) for _ in own]
    scores = [np.empty(0, np.float32) for _ in own]
    for start, rows in _units(collection):
        products = np.nan_to_num(queries @ np.nan_to_num(rows).T, nan=-2)
        for number, found in enumerate(products):
            inside = own[number] - start
            if 0 <= inside < len(found):
                found[inside] = -2
            kept = best_of(found, 2 * NEAREST)
            joined = np.concatenate([best[number], start + kept])
            values = np.concatenate([scores[number], found[kept]])
            kept = best_of(values, 2 * NEAREST)
            best[number], scores[number] = joined[kept], values[kept]
        progress("measure", len(rows))
    neighbours = []
    for candidates, query in zip(best, queries, strict=True):
        exact = cosines(collection.take(candidates), collection.kind, collection.width, query)
        neighbours.append(set(candidates[np.argsort(-exact)[:NEAREST]].tolist()))
    return neighbours


def _description(collection: Collection, lists: Lists, measured: list[Measured]) -> dict[str, Any]:
    last = measured[-1]
    return {
        "version": VERSION,
        "rows": len(lists.rows),
        "lists": len(lists.centres),
        "probes": last.probes,
        f"recall_at_{NEAREST}": round(last.recall, 4),
        "queries": min(_QUERIES, len(lists.rows)),
        "fingerprint": fingerprint(collection),
        "checkpoint_name": collection.checkpoint,
        "checkpoint_revision": collection.identity.get("checkpoint_revision", ""),
    }


def _units(collection: Collection) -> Iterator[tuple[int, Floats]]:
    for start, block in collection.blocks():
        yield start, collection.unit(block)
