"""Embeddings of many files and texts: bounded concurrency, a progress bar, and a cache that survives a kill.

A cache folder holds one sub-folder for each model that was asked. Models are told apart by what the server
says of itself and by the embedding it gives a fixed text or image. In it `rows.bin` takes embeddings as they
arrive, and `index.jsonl` says afterwards which key has which row. Rows that a kill left without a key are
embedded again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from validate.errors import CacheError, RefusedError

__all__ = ["Cache", "Result", "embed_all", "file_key"]

Item = TypeVar("Item")


def file_key(path: Path) -> str:
    """Key of a file in the cache: where it lies, its size and when it was changed."""
    status = path.stat()
    return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"


class Cache:
    """Key -> embedding, on disk, of one model.

    Args:
        root: the cache folder; sub-folders for other models are left alone.
        identity: what the server says of itself, and the kind of input.
        probe: [d] the embedding that the model gives a fixed input.

    Raises:
        CacheError: another run has this cache open, or it cannot be written.
    """

    def __init__(self, root: Path, identity: dict[str, str], probe: NDArray[np.float32]) -> None:
        self._dim = len(probe)
        try:
            self._folder = _find_folder(root, identity, probe)
            self._rows = (self._folder / "rows.bin").open("ab+")
            self._index = (self._folder / "index.jsonl").open("a+", encoding="utf-8")
        except OSError as error:
            raise CacheError(f"--cache {root}: cannot be used ({error})") from error
        try:
            fcntl.flock(self._rows, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise CacheError(f"--cache {root}: in use by another run") from error
        self._positions = self._read_index()

    def __contains__(self, key: str) -> bool:
        return key in self._positions

    def __len__(self) -> int:
        return len(self._positions)

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other runs use the cache."""
        self._rows.close()
        self._index.close()

    def add(self, keys: Sequence[str], embeddings: NDArray[np.float32]) -> None:
        """Keep `embeddings` [n, d] under `keys`, safely on disk when this returns."""
        start = self._rows.seek(0, 2) // self._row_bytes
        self._rows.write(np.ascontiguousarray(embeddings, dtype=np.float32).tobytes())
        self._rows.flush()
        for offset, key in enumerate(keys):
            self._index.write(json.dumps([key, start + offset]) + "\n")
            self._positions[key] = start + offset
        self._index.flush()

    def get(self, keys: Sequence[str]) -> NDArray[np.float32]:
        """The embeddings [n, d] of `keys`, all of which must be here."""
        rows = np.fromfile(self._folder / "rows.bin", dtype=np.float32)
        whole = rows[: len(rows) // self._dim * self._dim].reshape(-1, self._dim)
        return whole[[self._positions[key] for key in keys]]

    @property
    def _row_bytes(self) -> int:
        return self._dim * np.dtype(np.float32).itemsize

    def _read_index(self) -> dict[str, int]:
        complete = self._rows.seek(0, 2) // self._row_bytes
        self._rows.truncate(complete * self._row_bytes)
        self._index.seek(0)
        text = self._index.read()
        lines = text.split("\n")
        if lines[-1]:  # a kill cut the last line short; the next one must not continue it
            self._index.write("\n")
        positions = {}
        for line in lines[:-1]:
            try:
                key, row = json.loads(line)
            except ValueError:
                continue
            if row < complete:
                positions[key] = row
        return positions


def _find_folder(root: Path, identity: dict[str, str], probe: NDArray[np.float32]) -> Path:
    """The sub-folder made for this very model, or a new one."""
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    for number in range(1_000):
        folder = root / (name if not number else f"{name}-{number}")
        kept = folder / "identity.json"
        if not kept.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps({"identity": identity, "probe": probe.tolist()}), encoding="utf-8")
            return folder
        before = np.array(json.loads(kept.read_text(encoding="utf-8"))["probe"], dtype=np.float32)
        if before.shape == probe.shape and np.linalg.norm(before - probe) <= 1e-3 * np.linalg.norm(probe):
            return folder
    raise CacheError(f"--cache {root}: a thousand models under one name; choose another folder")


@dataclass
class Result:
    """Result of `embed_all`: how many were embedded now, and which items were refused, with the reason."""

    embedded: int
    refused: dict[int, str]


def embed_all(
    items: Sequence[tuple[str, Item]],
    cache: Cache,
    embed: Callable[[list[Item]], NDArray[np.float32]],
    batch: int,
    concurrency: int,
    label: str,
) -> Result:
    """Embed every item that `cache` lacks. When one is refused, its batch is asked again one by one.

    Args:
        items: (key, item) pairs; a key that comes twice is embedded once.
        cache: where embeddings go as soon as they arrive.
        embed: items -> embeddings [n, d]; called from `concurrency` threads.
        batch: items of one call.
        concurrency: calls under way at once.
        label: what the progress bar says.

    Raises:
        ServerError: the server failed; what arrived before is kept.
    """
    new = {key: position for position, (key, _) in reversed(list(enumerate(items))) if key not in cache}
    waiting = sorted(new.values())
    batches = [waiting[start : start + batch] for start in range(0, len(waiting), batch)]
    refused: dict[int, str] = {}

    def work(positions: list[int]) -> list[tuple[int, Any]]:
        return _embed_or_name(positions, [items[position][1] for position in positions], embed)

    with tqdm(
        total=len(items), initial=len(items) - len(waiting), desc=label, unit="row", smoothing=0.1
    ) as bar:
        for done in _bounded(batches, work, concurrency):
            kept = [(position, row) for position, row in done if not isinstance(row, str)]
            refused |= {position: row for position, row in done if isinstance(row, str)}
            if kept:
                cache.add([items[position][0] for position, _ in kept], np.stack([row for _, row in kept]))
            bar.update(len(done))
    return Result(len(waiting) - len(refused), refused)


def _embed_or_name(
    positions: list[int], rows: list[Item], embed: Callable[[list[Item]], NDArray[np.float32]]
) -> list[tuple[int, Any]]:
    """(position, embedding or the refusal's text) of every row."""
    try:
        return list(zip(positions, embed(rows), strict=True))
    except RefusedError as error:
        if len(rows) == 1:
            return [(positions[0], str(error))]
    alone = zip(positions, rows, strict=True)
    return [pair for position, row in alone for pair in _embed_or_name([position], [row], embed)]


def _bounded(
    batches: Sequence[list[int]], work: Callable[[list[int]], list[tuple[int, Any]]], concurrency: int
) -> Iterator[list[tuple[int, Any]]]:
    """Results as they arrive, with at most `concurrency` batches under way or waiting."""
    waiting = iter(batches)
    with ThreadPoolExecutor(concurrency) as pool:
        running: set[Future[list[tuple[int, Any]]]] = set()
        try:
            while True:
                for positions in waiting:
                    running.add(pool.submit(work, positions))
                    if len(running) == concurrency:
                        break
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
