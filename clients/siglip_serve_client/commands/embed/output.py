"""The results of `siglip-serve embed` on disk: parts while it runs, one file at the end.

The parts are in a folder next to the output. Each holds the outcomes of consecutive images, good and bad. A
part appears under its name as a whole or not at all, so a killed run loses no finished part.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from siglip_serve_client.commands.install_hint import install_hint

__all__ = ["OutputError", "Store", "check_output", "replacing"]

_FORMATS = (".parquet", ".npz")


class OutputError(Exception):
    """The output cannot be written, or belongs to another run."""


@dataclass
class _Part:
    """Outcomes of consecutive images."""

    paths: list[str] = field(default_factory=list)
    sha256: list[str] = field(default_factory=list)
    embeddings: list[NDArray[np.float32]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.paths) + len(self.failed)


class Store:
    """The outcomes of a run and of the interrupted runs before it, as a context manager.

    Args:
        output: a file that passes `check_output`.
        identity: settings that all rows must share, such as the checkpoint.
        overwrite: replace a finished output.
        restart: discard the results of an interrupted run.

    Attributes:
        done: keys of images with an outcome.
        rows, failures: number of good and of failed outcomes.
        resumed: number of outcomes before this run.

    Raises:
        OutputError: the output exists, another process writes it, or the settings differ.
    """

    def __init__(
        self, output: Path, identity: Mapping[str, str], *, overwrite: bool = False, restart: bool = False
    ) -> None:
        self.output, self.identity = output, dict(identity)
        self.folder = output.with_name(output.name + ".partial")
        self.side_file = output.with_name(output.name + ".failed.csv")
        if output.exists() and not overwrite and not self.folder.exists():
            raise OutputError(f"{output}: exists; --overwrite replaces it")
        self.folder.mkdir(exist_ok=True)
        self._part, self._parts = _Part(), 0
        self._lock = _locked(self.folder)
        try:
            if restart:
                for file in [*self._files(), self.folder / "identity.json"]:
                    file.unlink(missing_ok=True)
            self._check_identity()
            self._read()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.flush()
        finally:
            os.close(self._lock)

    def add(self, path: str, sha256: str, embedding: NDArray[np.float32]) -> None:
        """Keep a row. It is safe on disk after the next `flush`."""
        self._part.paths.append(path)
        self._part.sha256.append(sha256)
        self._part.embeddings.append(embedding)
        self.done.add(path)
        self.rows += 1

    def fail(self, path: str, error: str) -> None:
        """Keep that an image could not be embedded."""
        self._part.failed.append(path)
        self._part.errors.append(error)
        self.done.add(path)
        self.failures += 1

    @property
    def waiting(self) -> int:
        """Outcomes that are not safe yet."""
        return len(self._part)

    def flush(self) -> None:
        """Write the outcomes since the last call to disk."""
        if not len(self._part):
            return
        part, self._part = self._part, _Part()
        embeddings = np.stack(part.embeddings) if part.embeddings else np.empty((0, 0), np.float32)
        texts = {
            name: np.frombuffer(json.dumps(getattr(part, name)).encode(), np.uint8)
            for name in ("paths", "sha256", "failed", "errors")
        }
        path = self.folder / f"part-{self._parts:06}.npz"
        with replacing(path) as file:
            np.savez(file, embeddings=embeddings, **texts)
        self._parts += 1

    def finish(self) -> None:
        """Join the parts into the output, and remove them."""
        self.flush()
        if self.failures:
            with replacing(self.side_file) as file:
                file.write(_failed_csv(self._loaded()))
        else:
            self.side_file.unlink(missing_ok=True)
        if self.rows:
            write = _write_parquet if self.output.suffix == ".parquet" else _write_npz
            with replacing(self.output) as file:
                write(file, self._loaded(), self.identity)
        shutil.rmtree(self.folder)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.npz"))

    def _loaded(self) -> Iterator[_Part]:
        for file in self._files():
            with np.load(file) as content:
                texts = {
                    name: json.loads(content[name].tobytes())
                    for name in ("paths", "sha256", "failed", "errors")
                }
                yield _Part(embeddings=content["embeddings"], **texts)

    def _check_identity(self) -> None:
        file = self.folder / "identity.json"
        if not file.exists():
            with replacing(file) as new:
                new.write(json.dumps(self.identity, indent=1).encode())
        kept = json.loads(file.read_bytes())
        changed = [
            f"{name} was {kept.get(name)!r} and is {self.identity.get(name)!r}"
            for name in sorted(kept.keys() | self.identity.keys())
            if kept.get(name) != self.identity.get(name)
        ]
        if changed:
            raise OutputError(
                f"{self.folder}: begun with other settings: {'; '.join(changed)}; --restart discards it"
            )

    def _read(self) -> None:
        self.done, self.rows, self.failures = set[str](), 0, 0
        self._parts = len(self._files())
        for part in self._loaded():
            self.done.update(part.paths, part.failed)
            self.rows += len(part.paths)
            self.failures += len(part.failed)
        self.resumed = len(self.done)


def check_output(output: Path) -> None:
    """Check that the output can be written.

    Raises:
        OutputError: the output has another ending, its folder is missing, or Parquet support is.
    """
    if output.suffix not in _FORMATS or not output.parent.is_dir():
        raise OutputError(f"{output}: expected a {' or '.join(_FORMATS)} file in a folder that exists")
    if output.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ModuleNotFoundError as error:
            raise OutputError(f"{output}: {error}; `{install_hint('parquet')}` adds it") from error


@contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A binary file that gets its name when it is complete and safe on disk."""
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    new.replace(path)
    with suppress(OSError):  # some file systems do not open folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _locked(folder: Path) -> int:
    import fcntl

    file = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise OutputError(f"{folder}: another process is writing to it") from error
    return file


def _failed_csv(parts: Iterator[_Part]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "error"])
    for part in parts:
        writer.writerows(zip(part.failed, part.errors, strict=True))
    return text.getvalue().encode()


def _write_npz(file: Any, parts: Iterator[_Part], identity: Mapping[str, str]) -> None:
    found = [part for part in parts if part.paths]
    np.savez(
        file,
        paths=np.array([path for part in found for path in part.paths]),
        sha256=np.array([digest for part in found for digest in part.sha256]),
        embeddings=np.concatenate([np.asarray(part.embeddings) for part in found]),
        identity=np.array(json.dumps(dict(identity))),
    )


def _write_parquet(file: Any, parts: Iterator[_Part], identity: Mapping[str, str]) -> None:
    import pyarrow
    import pyarrow.parquet

    writer = None
    for part in parts:
        if not part.paths:
            continue
        rows = np.asarray(part.embeddings)
        if writer is None:
            kinds = {
                "path": pyarrow.string(),
                "sha256": pyarrow.string(),
                "embedding": pyarrow.list_(pyarrow.float32(), rows.shape[1]),
            }
            schema = pyarrow.schema(
                list(kinds.items()), metadata={f"siglip_serve.{k}": v for k, v in identity.items()}
            )
            writer = pyarrow.parquet.ParquetWriter(file, schema)
        flat = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), rows.shape[1])
        columns = [pyarrow.array(part.paths), pyarrow.array(part.sha256), flat]
        writer.write_batch(pyarrow.record_batch(columns, schema=schema))
    if writer is not None:
        writer.close()
