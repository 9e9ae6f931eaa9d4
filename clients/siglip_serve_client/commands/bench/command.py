"""`siglip-serve bench`: load on a running server, as a table and a curve."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from siglip_serve_client.commands.bench import BenchError
from siglip_serve_client.commands.bench.report import Row, draw_curve, table_line, write_csv
from siglip_serve_client.commands.bench.run import Plan, Point, check_server, run_point
from siglip_serve_client.commands.checkpoint_note import print_note
from siglip_serve_client.commands.embed.sources import SourcesError
from siglip_serve_client.commands.install_hint import install_hint
from siglip_serve_client.commands.options import above_zero, add_connection, connected, positive

__all__ = ["add_bench"]

_BUSY = 0.9  # of a core; above it locust cannot send faster


def add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "bench",
        help="load test: throughput and latency, as a table and a picture",
        description="Put load on a running server with locust, and write a table and a picture of "
        "throughput and latency. By default a fixed number of requests is in flight (closed loop); with "
        "--rate requests are sent at drawn times, however slow the answers are (open loop). The latency then "
        "counts from these times.",
        epilog="The exit status is 1 if a request failed, or if an answer was wrong.",
    )
    loads = parser.add_mutually_exclusive_group().add_argument
    loads("--concurrency", type=positive, nargs="+", default=[1, 4, 16, 64], help="requests in flight")
    loads("--rate", type=above_zero, nargs="+", help="requests/s, instead of --concurrency")
    add = parser.add_argument
    models = "embed_image, embed_text, classify_image, explain_image, or several: embed_image:8,embed_text:1"
    add("--model", default="embed_image", help=f"{models} (default: %(default)s)")
    mix = "sizes of the pictures: WIDTHxHEIGHT:WEIGHT,..."
    add("--mix", default="500x375", help=f"{mix} (default: %(default)s)")
    images = "files and folders to send instead, in equal parts"
    add("--images", nargs="+", default=[], metavar="IMAGE", help=images)
    add("--seconds", type=above_zero, default=10.0, help="measured time of each load (default: %(default)g)")
    add("--warmup", type=above_zero, default=2.0, help="seconds before it (default: %(default)g)")
    add("--timeout", type=above_zero, default=60.0, help="seconds for one request (default: %(default)g)")
    add("--processes", type=positive, default=1, help="processes of locust (default: %(default)s)")
    add("-o", "--output", type=Path, default=Path("build/load"), help="folder (default: %(default)s)")
    add_connection(parser)
    parser.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> int:
    try:
        return _measure(options)
    except (BenchError, SourcesError, OSError) as error:
        print(f"siglip-serve: {error}", file=sys.stderr)
        return 2


def _measure(options: argparse.Namespace) -> int:
    missing = [name for name in ("locust", "matplotlib") if find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        raise BenchError(f"{names}: not installed; `{install_hint('load')}` adds what bench needs")
    plan = Plan(
        url=options.url,
        ca_file=options.ca_file,
        model=options.model,
        mix=options.mix,
        images=options.images,
        seconds=options.seconds,
        warmup=options.warmup,
        timeout=options.timeout,
        processes=options.processes,
    )
    check_server(plan)
    with connected(options, timeout=options.timeout) as client:
        print_note(client)
    options.output.mkdir(parents=True, exist_ok=True)
    points = [Point(rate, True) for rate in options.rate or []]
    points = points or [Point(number) for number in options.concurrency]
    rows: list[Row] = []
    print(f"{plan.sent}, {plan.where}")
    print(table_line(None, points[0].is_open), flush=True)
    for point in points:
        rows.append(Row(point, run_point(plan, point, options.output)))
        print(table_line(rows[-1], point.is_open), flush=True)
        write_csv(plan, rows, options.output / "bench.csv")  # now, so that Ctrl-C does not lose it
    draw_curve(plan, rows, options.output / "bench.png")
    print(f"{options.output}: bench.csv, bench.png")
    return _advise(rows)


def _advise(rows: Sequence[Row]) -> int:
    for row in rows:
        if max(row.summary.client_cpu, default=0.0) > _BUSY * row.summary.seconds:
            print(
                f"{row.point}: a process of locust used a whole core, so the server may be faster than this; "
                "try more --processes, or another machine",
                file=sys.stderr,
            )
    faults: Counter[str] = sum((row.summary.faults for row in rows), Counter())
    for fault, count in faults.most_common(3):
        print(f"siglip-serve: {count} x {fault}", file=sys.stderr)
    return 1 if faults else 0
