"""Find the pictures that fit a text or a picture, and print or draw them."""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np

from siglip_serve_client.commands.search.collection import Collection
from siglip_serve_client.commands.search.exact import ExactSearch, Hit
from siglip_serve_client.commands.search.lists import Lists, open_lists
from siglip_serve_client.commands.search.query import embedded
from siglip_serve_client.commands.search.report import cells_of, metric, printable, save_sheet
from siglip_serve_client.commands.search.sheet import Section

__all__ = ["find"]


def find(options: argparse.Namespace, collection: Collection) -> int:
    """Run `--text` or `--image`, and return the exit status.

    Raises:
        CollectionError, QueryError, ClientError: see `open_lists` and `embedded`.
    """
    lists = open_lists(collection) if options.index else None
    query = embedded(options, collection)
    if lists is None:
        hits, compared = ExactSearch(collection).search(query, options.k), len(collection)
    else:
        hits, compared = lists.search(query, options.k, options.probes or 0)
        _say_approximate(options, lists, compared, len(collection))
    ids = collection.ids(np.array([hit.index for hit in hits], np.int64))
    if options.json:
        _print_json(options, collection, list(zip(hits, ids, strict=True)), compared)
    else:
        if collection.kind == "binary":
            print(f"siglip-serve: scores: {metric(collection)}", file=sys.stderr)
        for hit, name in zip(hits, ids, strict=True):
            print(f"{hit.score:7.4f}  {printable(name)}")
    if options.sheet is not None:
        what = options.text if options.text is not None else str(options.image)
        cells = cells_of(collection, [hit.index for hit in hits], [hit.score for hit in hits])
        save_sheet(options, collection, f"{what}: {len(hits)} of {len(collection):,}", [Section(cells)])
    return 0


def _say_approximate(options: argparse.Namespace, lists: Lists, compared: int, rows: int) -> None:
    probes = min(options.probes or lists.probes, len(lists.centres))
    recall = lists.described["recall_at_10"]
    measured = f"; recall@10 was {recall:.3f} when the index was built" if probes == lists.probes else ""
    print(
        f"siglip-serve: approximate: {compared:,} of {rows:,} rows compared, in {probes} of "
        f"{len(lists.centres)} lists{measured}",
        file=sys.stderr,
    )


def _print_json(
    options: argparse.Namespace, collection: Collection, hits: list[tuple[Hit, str]], compared: int
) -> None:
    query = {"text": options.text} if options.text is not None else {"image": str(options.image)}
    answer = {
        "query": query,
        "rows": len(collection),
        "compared": compared,
        "exact": not options.index,
        "metric": metric(collection),
        "results": [{"id": name, "score": round(hit.score, 6), "row": hit.index} for hit, name in hits],
    }
    print(json.dumps(answer))
