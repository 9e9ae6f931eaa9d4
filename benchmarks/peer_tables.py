"""The table of verdicts on other embedding servers."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.table_parts import Key, Source, Summary, Table

__all__ = ["PEERS"]

PEERS: Mapping[str, Table | Summary] = {
    "conformance": Table(
        Source("conformance.csv", {"status": "fault"}),
        (
            Key("server", "server"),
            Key("inputs", "kind"),
            Key("check", "check"),
            Key("evidence", "evidence"),
        ),
        (),
    ),
}
