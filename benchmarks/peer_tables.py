"""The tables of other embedding servers: verdicts on their vectors, and their speed beside the gateway."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.table_parts import Cell, Column, Key, Source, Summary, Table

__all__ = ["PEERS"]

_WAYS = {
    "triton": "Triton, HTTP with base64",
    "gateway": "gateway",
    "infinity": "infinity",
    "weaviate": "multi2vec-clip",
}


def _column(heading: str, template: str) -> Column:
    return Column(heading, Cell(template, {}, "last"))


PEERS: Mapping[str, Table | Summary] = {
    "gateway-peers": Table(
        Source("gateway_peers.csv", {"label": "base/16@224", "concurrency": "8"}),
        (
            Key("input", "input"),
            Key("server", "way", _WAYS),
        ),
        (
            _column("per second", "{per_second:.1f}"),
            _column("p50, ms", "{p50_ms:.0f}"),
            _column("memory, MB", "{memory_mb:.0f}"),
        ),
    ),
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
