"""`siglip-serve classify`: the probabilities of labels for images."""

from __future__ import annotations

import argparse
import csv
import sys

import numpy as np

from siglip_serve_client.commands.embed.sources import Sources, SourcesError
from siglip_serve_client.commands.options import add_connection, connected
from siglip_serve_client.errors import InvalidInputError

__all__ = ["add_classify"]


def add_classify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "classify",
        help="score labels for images",
        description="Print a line of CSV for each image: path, likeliest label, probability of each label.",
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
    add_connection(parser)
    parser.set_defaults(run=_classify)


def _classify(options: argparse.Namespace) -> int:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    failed = 0
    try:
        sources = Sources(options.images)
        with connected(options) as client:
            writer.writerow(["path", "label", *options.labels])
            for item in sources:
                try:
                    scores = client.classify(
                        item.read(), options.labels, templates=options.templates, softmax=options.softmax
                    )
                except (InvalidInputError, OSError) as error:
                    print(f"{item.key}: {error}", file=sys.stderr)
                    failed += 1
                    continue
                best = options.labels[int(np.argmax(scores))]
                writer.writerow([item.key, best, *(f"{score:.4f}" for score in scores)])
    except SourcesError as error:
        print(f"siglip-serve: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0
