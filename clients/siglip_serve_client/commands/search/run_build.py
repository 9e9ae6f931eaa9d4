"""Build the index, and print its recall."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from tqdm import tqdm

from siglip_serve_client.commands.search.build import NEAREST, build_index
from siglip_serve_client.commands.search.collection import Collection
from siglip_serve_client.commands.search.lists import index_folder

__all__ = ["build"]


def build(options: argparse.Namespace, collection: Collection) -> int:
    """Run `--build-index`, and return the exit status.

    Raises:
        CollectionError: see `build_index`.
    """
    with tqdm(total=3 * len(collection), unit="row", unit_scale=True, disable=None) as bar:

        def progress(step: str, rows: int) -> None:
            bar.set_description(step, refresh=False)
            bar.update(rows)

        lists, measured = build_index(collection, options.recall, progress)
    if options.json:
        print(json.dumps({**lists.described, "measured": [asdict(row) for row in measured]}))
        return 0
    print(f"probes  recall@{NEAREST}  compared  ms per query")
    for row in measured:
        print(f"{row.probes:6}  {row.recall:9.3f}  {row.compared:8.2%}  {row.milliseconds:12.1f}")
    print(f"{index_folder(collection)}: {len(lists.rows):,} rows in {len(lists.centres):,} lists")
    print(
        f"siglip-serve: --index reads {measured[-1].probes} lists, and --probes more or fewer",
        file=sys.stderr,
    )
    return 0
