"""Find groups of near-duplicates, and print or draw them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from tqdm import tqdm

from siglip_serve_client.commands.drawing import plural
from siglip_serve_client.commands.search.collection import Collection
from siglip_serve_client.commands.search.duplicates import Group, estimated_seconds, near_duplicates, pairs_of
from siglip_serve_client.commands.search.report import cells_of, metric, printable, save_sheet
from siglip_serve_client.commands.search.sheet import Section

__all__ = ["find_duplicates"]

_MANY = 1_000_000  # rows for which the time is told before
_GROUPS, _MEMBERS = 40, 10  # that are drawn


def find_duplicates(options: argparse.Namespace, collection: Collection) -> int:
    """Run `--duplicates`, and return the exit status.

    Raises:
        CollectionError: a file is damaged.
    """
    pairs = pairs_of(len(collection))
    if len(collection) >= _MANY:
        hours = estimated_seconds(collection) / 3600
        print(
            f"siglip-serve: {len(collection):,} rows, {pairs:.1e} pairs: about {hours:.1f} hours; twice the "
            "rows take four times as long",
            file=sys.stderr,
        )
    with tqdm(total=pairs, unit="pair", unit_scale=True, disable=None) as bar:
        groups = near_duplicates(collection, options.duplicates, bar.update)
    _print(options, collection, groups)
    if options.sheet is not None and groups:
        sections = [
            Section(
                cells_of(
                    collection,
                    group.rows[:_MEMBERS].tolist(),
                    group.scores[:_MEMBERS],
                    group.repeated[:_MEMBERS],
                ),
                _heading(number, group),
            )
            for number, group in enumerate(groups[:_GROUPS], 1)
        ]
        more = f", the largest {_GROUPS} are shown" if len(groups) > _GROUPS else ""
        title = f"{plural(len(groups), 'group')} of near-duplicates at {options.duplicates:g}{more}"
        save_sheet(options, collection, title, sections)
    return 0


def _heading(number: int, group: Group) -> str:
    more = f", the first {_MEMBERS} are shown" if len(group.rows) > _MEMBERS else ""
    return f"group {number}: {len(group.rows)} pictures{more}"


def _print(options: argparse.Namespace, collection: Collection, groups: Sequence[Group]) -> None:
    if options.json:
        answer = {
            "rows": len(collection),
            "threshold": options.duplicates,
            "metric": metric(collection),
            "groups": [_members(collection, group) for group in groups],
        }
        print(json.dumps(answer))
        return
    for number, group in enumerate(groups, 1):
        print(f"group {number}: {len(group.rows)} pictures")
        for member in _members(collection, group):
            same = "  (same file)" if member["same_file"] else ""
            print(f"{member['score']:9.4f}  {printable(str(member['id']))}{same}")
    members = sum(len(group.rows) for group in groups)
    copies = sum(int(group.repeated.sum()) for group in groups)
    print(
        f"siglip-serve: {plural(len(groups), 'group')} with {members:,} of {len(collection):,} pictures; "
        f"{plural(copies, 'picture')} with the same file as another",
        file=sys.stderr,
    )


def _members(collection: Collection, group: Group) -> list[dict[str, object]]:
    names = collection.ids(group.rows)
    columns = zip(names, group.scores.tolist(), group.rows.tolist(), group.repeated.tolist(), strict=True)
    return [
        {"id": name, "score": round(score, 6), "row": row, "same_file": same}
        for name, score, row, same in columns
    ]
