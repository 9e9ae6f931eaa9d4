"""`siglip-serve classify`: the probabilities of labels for images."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from siglip_serve_client.commands.checkpoint_note import print_note
from siglip_serve_client.commands.embed.sources import Sources, SourcesError
from siglip_serve_client.commands.options import add_connection, connected
from siglip_serve_client.errors import InvalidInputError

__all__ = ["add_classify"]

_Print = Callable[[str, NDArray[np.float32]], None]


def add_classify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "classify",
        help="score labels for images",
        description="Print the probability of each label for each image: on a terminal as a table, the "
        "likeliest label first; into a file or a pipe as CSV with path, likeliest label, and the probability "
        "of each label.",
        epilog="Images that are refused are named on standard error; the exit status is then 1.",
    )
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="files, folders, patterns in quotes, .tar")
    add("--label", action="append", required=True, dest="labels", metavar="LABEL", help="may be repeated")
    add(
        "--template",
        action="append",
        dest="templates",
        metavar="TEXT",
        help="such as 'a photo of a {}.'; several are averaged (default: the bare label)",
    )
    add(
        "--softmax",
        action="store_true",
        help="labels compete and sum to 1, as CLIP's always do; else each has its own probability",
    )
    add(
        "--truncation",
        action="store_true",
        help="cut labels that have too many tokens; else they are refused",
    )
    add("--format", choices=["table", "csv"], help="default: table on a terminal, else csv")
    add_connection(parser)
    parser.set_defaults(run=_classify)


def _classify(options: argparse.Namespace) -> int:
    failed = 0
    noted = False
    try:
        sources = Sources(options.images)
        with connected(options) as client:
            show = _printer(options.format, options.labels)
            for item in sources:
                try:
                    scores = client.classify(
                        item.read(),
                        options.labels,
                        templates=options.templates,
                        softmax=options.softmax,
                        truncation=options.truncation,
                    )
                except (InvalidInputError, OSError) as error:
                    print(f"{item.key}: {error}", file=sys.stderr)
                    failed += 1
                    continue
                if not noted:
                    print_note(client)
                    noted = True
                show(item.key, scores)
    except SourcesError as error:
        print(f"siglip-serve: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


def _printer(form: str | None, labels: Sequence[str]) -> _Print:
    """The function that prints the probabilities [L] of one image under its path."""
    if form is None:
        form = "table" if sys.stdout.isatty() else "csv"
    return _table(labels) if form == "table" else _csv(labels)


def _csv(labels: Sequence[str]) -> _Print:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["path", "label", *labels])

    def show(path: str, scores: NDArray[np.float32]) -> None:
        writer.writerow([path, labels[int(np.argmax(scores))], *(f"{score:.4f}" for score in scores)])

    return show


def _table(labels: Sequence[str]) -> _Print:
    width = max(map(len, labels))

    def show(path: str, scores: NDArray[np.float32]) -> None:
        print(path)
        for index in np.argsort(-scores, kind="stable"):
            print(f"    {labels[index]:{width}}  {scores[index]:.3f}")

    return show
