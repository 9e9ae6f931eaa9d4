"""`siglip-serve embed`: embeddings of any number of images in one file. An interrupted run resumes."""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from siglip_serve_client._client import Client
from siglip_serve_client._operations.link import Outcome
from siglip_serve_client.commands.checkpoint_note import show_note
from siglip_serve_client.commands.embed.output import OutputError, Store, check_output
from siglip_serve_client.commands.embed.sources import Item, Sources, SourcesError
from siglip_serve_client.commands.options import add_connection, connected, positive
from siglip_serve_client.errors import ClientError, InvalidInputError, ServerError, UnavailableError

__all__ = ["add_embed"]

_ATTEMPTS = 3  # per image, if the server fails but is healthy
_FLUSH_SECONDS = 30.0
_QUIET_WAIT = 1.0  # seconds for a lost server before the command says that it waits


def add_embed(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "embed",
        help="embed images: files, folders, tar archives, Parquet columns",
        description="Embed images with a running server, into one .parquet or .npz file. An interrupted "
        "run resumes when the command is started again with the same arguments.",
        epilog="IMAGE is a file; a folder (with all below it); a pattern in quotes; a tar archive, or shards "
        "such as 'train-{000..099}.tar'; or a Parquet file. A row has a path, the sha256 of the encoded "
        "image, and the embedding (float32). Images that cannot be embedded are listed with the reason in "
        "OUTPUT.failed.csv; the exit status is then 1. In folders and tar archives, files without a suffix "
        "of images are left out, counted and named.",
    )
    add = parser.add_argument
    add("images", nargs="*", default=[], metavar="IMAGE", help="files, folders, patterns, .tar, .parquet")
    add("-o", "--output", type=Path, required=True, help="the .parquet or .npz file to write")
    add("--from-file", metavar="LIST", help="a text file with one IMAGE per line; - is standard input")
    add("--column", default="image", help="of Parquet files (default: %(default)s)")
    add(
        "--all-files",
        action="store_true",
        help="read every file of folders and tar archives as an image, whatever its suffix",
    )
    add("--normalized", action="store_true", help="scale every embedding to unit length")
    add("--concurrency", type=positive, default=16, help="requests in flight (default: %(default)s)")
    add(
        "--part-rows",
        type=positive,
        default=1000,
        help="images per part that is written to disk (default: %(default)s)",
    )
    add(
        "--wait",
        type=float,
        default=120.0,
        help="seconds to wait for a lost server (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="replace an output that exists")
    add("--restart", action="store_true", help="discard the results of an interrupted run")
    add_connection(parser)
    parser.set_defaults(run=_embed)


def _embed(options: argparse.Namespace) -> int:
    try:
        given = [*options.images, *_listed(options.from_file)]
        sources = Sources(given, options.column, all_files=options.all_files, output=options.output)
        check_output(options.output)
        total = sources.count()
        quiet = min(_QUIET_WAIT, options.wait)
        with connected(options, options.concurrency, restart_wait=quiet) as client:
            described = client.describe()
            show_note(described)
            described.pop("checkpoint_note")
            identity = {"normalized": str(options.normalized).lower(), **described}
            store = Store(options.output, identity, overwrite=options.overwrite, restart=options.restart)
            with store:
                return _Run(client, store, options, total).embed(sources)
    except (SourcesError, OutputError, OSError) as error:
        print(f"siglip-serve: {error}", file=sys.stderr)
        return 2


def _listed(name: str | None) -> list[str]:
    if name is None:
        return []
    lines = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    return [line for line in lines.splitlines() if line.strip()]


@dataclass
class _Asked:
    """An image on its way, with `error` if it could not be read."""

    item: Item
    data: bytes = b""
    error: OSError | None = None


@dataclass
class _Run:
    """One run of the command.

    Attributes:
        asked: images on their way, in order. The first is the next to have an outcome.
        again: images that were on their way when the server failed.
    """

    client: Client
    store: Store
    options: argparse.Namespace
    total: int | None
    asked: deque[_Asked] = field(default_factory=deque)
    again: deque[_Asked] = field(default_factory=deque)
    attempts: Counter[str] = field(default_factory=Counter)

    def embed(self, sources: Sources) -> int:
        begin, before = time.monotonic(), self.store.rows
        if self.store.resumed:
            print(f"siglip-serve: resuming after {self.store.resumed} finished images", file=sys.stderr)
        items = self._unknown(sources)
        with tqdm(total=self.total, initial=self.store.resumed, unit="image", disable=None) as self.bar:
            while (trouble := self._pass(items)) is not None:
                self._wait(trouble)
        self.store.finish()
        if not self.store.rows + self.store.failures:
            raise SourcesError(sources.no_images())
        if reason := sources.left_out():
            print(f"siglip-serve: {reason}", file=sys.stderr)
        rate = (self.store.rows - before) / (time.monotonic() - begin)
        print(f"{self.options.output}: {self.store.rows} embeddings, {rate:.0f} images/s")
        if self.store.failures:
            where = self.store.side_file
            print(f"siglip-serve: {self.store.failures} images were not embedded: {where}", file=sys.stderr)
        return 1 if self.store.failures else 0

    def _pass(self, items: Iterator[Item]) -> ClientError | None:
        """Embed images to the end, or until the server fails, and then return its error."""
        flushed = time.monotonic()
        outcomes = self.client.embed_images(self._data(items), self.options.normalized)
        for outcome in outcomes:
            self._settle_unread()
            if (trouble := self._settle(self.asked[0], outcome)) is not None:
                self.again = self.asked + self.again
                self.asked = deque()
                outcomes.close()  # type: ignore[attr-defined]
                return trouble
            self.asked.popleft()
            if self.store.waiting >= self.options.part_rows or time.monotonic() > flushed + _FLUSH_SECONDS:
                self.store.flush()
                flushed = time.monotonic()
        self._settle_unread()
        return None

    def _data(self, items: Iterator[Item]) -> Iterator[bytes]:
        """The bytes of the images to send. An unreadable image is only noted, in its place."""
        for asked in self._upcoming(items):
            self.asked.append(asked)
            if asked.error is None:
                yield asked.data

    def _upcoming(self, items: Iterator[Item]) -> Iterator[_Asked]:
        while self.again:
            yield self.again.popleft()
        for item in items:
            try:
                yield _Asked(item, item.read())
            except OSError as error:
                yield _Asked(item, error=error)

    def _settle_unread(self) -> None:
        while self.asked and (error := self.asked[0].error) is not None:
            self._failed(self.asked.popleft(), error)

    def _settle(self, asked: _Asked, outcome: Outcome) -> ClientError | None:
        """Keep an outcome, or return it if it concerns the server and not the image."""
        if isinstance(outcome, np.ndarray):
            self._keep(asked, outcome)
        elif isinstance(outcome, InvalidInputError | OSError):
            self._failed(asked, outcome)
        elif isinstance(outcome, UnavailableError | ServerError):
            # A broken server fails for every image. An image that fails on a healthy server is at fault.
            self.attempts[asked.item.key] += isinstance(outcome, ServerError)
            if self.attempts[asked.item.key] < _ATTEMPTS:
                return outcome
            self._failed(asked, outcome)
        else:
            raise outcome
        return None

    def _keep(self, asked: _Asked, embedding: NDArray[np.float32]) -> None:
        self.store.add(asked.item.key, hashlib.sha256(asked.data).hexdigest(), embedding)
        self.bar.update()

    def _failed(self, asked: _Asked, error: Exception) -> None:
        self.store.fail(asked.item.key, str(error))
        self.bar.write(f"{asked.item.key}: {error}", file=sys.stderr)
        self.bar.set_postfix(failed=self.store.failures)
        self.bar.update()

    def _wait(self, trouble: ClientError) -> None:
        """Wait until the server embeds again.

        Raises:
            ClientError: it does not within the time of `--wait`.
        """
        self.store.flush()
        self.bar.write(f"siglip-serve: waiting for the server: {trouble}", file=sys.stderr)
        deadline, pause = time.monotonic() + self.options.wait, 0.5
        while True:
            time.sleep(min(pause, max(deadline - time.monotonic(), 0)))
            try:
                self.client.check_health()
            except (UnavailableError, ServerError) as error:
                if time.monotonic() >= deadline:
                    print(
                        f"siglip-serve: finished work is in {self.store.folder}; the same command resumes",
                        file=sys.stderr,
                    )
                    raise error from None
            else:
                return
            pause = min(2 * pause, 5.0)

    def _unknown(self, sources: Sources) -> Iterator[Item]:
        """Images without an outcome, each once."""
        seen: set[str] = set()
        for item in sources:
            if item.key not in self.store.done and item.key not in seen:
                seen.add(item.key)
                yield item
