"""The tables of other embedding servers: verdicts on their vectors, and their speed beside this one's."""

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


_SERVERS = {
    "ours": "this server",
    "gateway": "this server's gateway",
    "fastapi": "FastAPI",
    "litserve": "LitServe",
    "infinity": "infinity",
    "weaviate": "multi2vec-clip",
}
_AMX = {"device": "Intel Xeon (AMX)", "label": "base/16@224"}
_TEXT_WAYS = {
    "transformers": "transformers",
    "every position": "OpenVINO, whole last block",
    "last position": "OpenVINO",
}
_INPUTS = {"image": "image", "text": "text"}


def _column(heading: str, template: str) -> Column:
    return Column(heading, Cell(template, {}, "last"))


def _of(server: str, template: str, heading: str) -> Column:
    return Column(heading, Cell(template, {"server": server}))


def _speed(dtype: str) -> Table:
    """Rates of this server, and those of others as this one's ratio to them."""
    return Table(
        Source("peers.csv", {**_AMX, "asked_dtype": dtype}),
        (
            Key("input", "input", _INPUTS),
            Key("size", "size"),
            Key("in flight", "concurrency", {"8": "8", "1": "1"}),
        ),
        (
            _of("ours", "{per_second:.1f}", "this server, per second"),
            _of("ours", "{p50_ms:.0f}", "p50, ms"),
            _of("ours", "{p99_ms:.0f}", "p99, ms"),
            *(
                _of(name, "{ratio:.2f}", f"over {text}")
                for name, text in _SERVERS.items()
                if name not in ("ours", "gateway")
            ),
        ),
    )


def _cost(dtype: str) -> Table:
    """Time and memory that each server needs, and how close it is to transformers in float32."""
    image = {"input": "image", "size": "500x375", "concurrency": "8"}
    text = {"input": "text", "concurrency": "8"}
    return Table(
        Source("peers.csv", {**_AMX, "asked_dtype": dtype}),
        (Key("server", "server", _SERVERS), Key("dtype", "dtype")),
        (
            Column("CPU ms per image", Cell("{server_cpu_ms:.0f}", image)),
            Column("CPU ms per text", Cell("{server_cpu_ms:.1f}", text)),
            Column("memory, MB", Cell("{memory_mb:.0f}", image)),
            Column("start, s", Cell("{start_seconds:.1f}", image)),
            Column("smallest cosine, images", Cell("{cosine_min:.5f}", image)),
            Column("smallest cosine, texts", Cell("{cosine_min:.5f}", text)),
        ),
    )


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
    "peers-float32": _speed("float32"),
    "peers-bfloat16": _speed("bfloat16"),
    "peers-cost-float32": _cost("float32"),
    "peers-cost-bfloat16": _cost("bfloat16"),
    "text-tower": Table(
        Source("text_tower.csv", _AMX),
        (Key("dtype", "dtype"), Key("way", "way", _TEXT_WAYS)),
        (
            *(
                Column(f"{rows} text{'s' * (rows != '1')}{what}", Cell(template, {"rows": rows}))
                for rows in ("8", "1")
                for what, template in ((", per second", "{texts_per_second:.1f}"), (", ratio", "{ratio:.2f}"))
            ),
            Column("smallest cosine", Cell("{cosine_min:.5f}", {"rows": "8"})),
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
