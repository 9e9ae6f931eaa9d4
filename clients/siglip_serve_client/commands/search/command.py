"""`siglip-serve search`: search in stored embeddings, find near-duplicates, build an index."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from PIL import Image

from siglip_serve_client.commands.options import add_connection, positive
from siglip_serve_client.commands.search.collection import CollectionError, open_collection
from siglip_serve_client.commands.search.mirror import local_output
from siglip_serve_client.commands.search.query import QueryError
from siglip_serve_client.commands.search.run_build import build
from siglip_serve_client.commands.search.run_duplicates import find_duplicates
from siglip_serve_client.commands.search.run_query import find

__all__ = ["add_search"]

_ASKS = ("text", "image", "duplicates", "build_index")


def add_search(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "search",
        help="search in embeddings on disk, by text or picture, and find near-duplicates",
        description="Search in the output of `siglip-serve bulk` or `siglip-serve embed`: the pictures that "
        "fit a text or a picture best, or groups of near-duplicates. The checkpoint that made the output "
        "embeds the query in this process, or a running server does (--server).",
        epilog="A search compares all vectors and is exact. It reads the files block by block, so their size "
        "is not limited by memory. Outputs of bits (binary) are searched by the bits that differ, and the "
        "score is the share of bits that agree less the share that differs. --duplicates compares all pairs: "
        "twice the rows take four times as long.",
    )
    add = parser.add_argument
    add(
        "output",
        metavar="OUTPUT",
        help="folder of `bulk`, or .parquet or .npz file of `embed`, or its URI, such as s3://bucket/folder, "
        "which is copied first",
    )
    _add_asks(parser.add_argument_group("what to do, one of"))
    add("-k", type=positive, default=20, help="pictures to find (default: %(default)s)")
    add("--json", action="store_true", help="print JSON")
    add("--sheet", type=Path, metavar="FILE", help="draw the pictures found: .png or .jpg")
    add("--base", type=Path, default=Path(), metavar="FOLDER", help="folder that relative ids start from")
    add(
        "--column",
        metavar="NAME",
        help="with the pictures, of Parquet inputs (default: bulk's own, or image)",
    )
    add(
        "--cache",
        type=Path,
        default=Path("~/.cache/siglip-serve/outputs").expanduser(),
        metavar="FOLDER",
        help="for copies of outputs in object storage (default: ~/.cache/siglip-serve/outputs)",
    )
    add("--truncation", action="store_true", help="cut a text that has too many tokens; else it is refused")
    _add_index(parser.add_argument_group("approximate index"))
    group = parser.add_argument_group("checkpoint of the query")
    group.add_argument(
        "--checkpoint",
        metavar="CHECKPOINT",
        help="Hugging Face directory or hub id (default: the one that made the output)",
    )
    add_connection(group, flag="--server", default="")
    parser.set_defaults(run=_search)


def _add_asks(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--text", metavar="TEXT", help="find pictures that fit a text")
    add("--image", type=Path, metavar="FILE", help="find pictures that are like a picture")
    add(
        "--duplicates",
        type=_cosine,
        metavar="COSINE",
        help="group pictures with a cosine of at least this, such as 0.98",
    )
    add("--build-index", action="store_true", help="build an index for outputs of millions of rows")


def _add_index(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--index", action="store_true", help="search in the index: faster, and not exact")
    add("--probes", type=positive, help="lists that are read: more find more (default: as measured)")
    add(
        "--recall",
        type=_share,
        default=0.95,
        help="of --build-index: share of the exact nearest 10 to reach (default: %(default)s)",
    )


def _search(options: argparse.Namespace) -> int:
    try:
        _check(options)
        collection = open_collection(local_output(options.output, options.cache))
        if options.build_index:
            return build(options, collection)
        if options.duplicates is not None:
            return find_duplicates(options, collection)
        return find(options, collection)
    except (CollectionError, QueryError) as error:
        print(f"siglip-serve: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"siglip-serve: {where}", file=sys.stderr)
        return 2


def _check(options: argparse.Namespace) -> None:
    """Check the options before anything is read.

    Raises:
        QueryError: they do not fit together, or the sheet cannot be written.
    """
    given = [f"--{name.replace('_', '-')}" for name in _ASKS if getattr(options, name) not in (None, False)]
    if len(given) != 1:
        came = " and ".join(given) or "none"
        raise QueryError(f"expected one of --text, --image, --duplicates and --build-index, got {came}")
    if options.text is not None and not options.text.strip():
        raise QueryError("--text: is empty")
    if options.probes is not None and not options.index:
        raise QueryError("--probes: expected --index with it")
    if options.index and options.text is None and options.image is None:
        raise QueryError(f"--index: not with {given[0]}")
    if options.checkpoint and options.url:
        raise QueryError("--checkpoint: not with --server, which has its own")
    if options.sheet is None:
        return
    if options.build_index:
        raise QueryError("--sheet: not with --build-index")
    kind = Image.registered_extensions().get(options.sheet.suffix.lower())
    if kind not in Image.SAVE:
        raise QueryError(f"--sheet {options.sheet}: not a picture's ending, such as .png or .jpg")
    if not options.sheet.parent.is_dir():
        raise QueryError(f"--sheet {options.sheet}: there is no folder {options.sheet.parent}")


def _cosine(text: str) -> float:
    return _number(text, -1.0)


def _share(text: str) -> float:
    return _number(text, 0.0)


def _number(text: str, least: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not least < number <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above {least:g} and at most 1, got {text!r}")
    return number
