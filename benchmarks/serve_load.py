"""Load on a server, running or started for this: single-image JPEG requests over gRPC.

Closed loop: `--concurrency` requests are always in flight. Open loop: `--rate` requests per second are
sent at drawn times, and latency counts from the time drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from benchmarks.inputs import parse_settings, synthetic_jpeg
from benchmarks.load import Arrivals, Load, Result, first_answers, run
from benchmarks.load_clients import Kind, Target
from benchmarks.records import about, gpu_names, write_csv
from benchmarks.servers import run_ours

__all__ = ["add_load_options", "device_name", "load_columns", "make_loads", "pictures", "print_result"]


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the load."""
    add = parser.add_argument
    add("--size", default="500x375", help="width x height of the JPEG, default %(default)s")
    add("--pictures", type=int, default=16, help="different pictures, sent in turn, default %(default)s")
    add("--concurrency", type=int, nargs="+", default=[1, 8, 32], help="requests in flight, default 1 8 32")
    add("--processes", type=int, default=2, help="client processes, default %(default)s")
    add("--seconds", type=float, default=10, help="measured time, default %(default)s")
    add("--warmup", type=float, default=2, help="time before, default %(default)s")
    add("--rate", type=float, nargs="+", help="requests per second: the open loop, instead of --concurrency")
    add(
        "--arrivals",
        choices=get_args(Arrivals),
        default="poisson",
        help="of the open loop, default %(default)s",
    )
    add(
        "--limit",
        type=int,
        default=2048,
        help="most requests in flight of the open loop, default %(default)s",
    )
    add("--seed", type=int, default=0, help="of the arrivals, default %(default)s")
    add("--check", type=int, default=64, help="check one answer of N in full, default %(default)s")


def pictures(options: argparse.Namespace) -> list[bytes]:
    """The JPEGs that are sent."""
    width, height = (int(side) for side in options.size.split("x"))
    return [synthetic_jpeg(width, height, seed) for seed in range(options.pictures)]


def make_loads(
    options: argparse.Namespace, target: Target, jpegs: list[bytes], server_pid: int | None
) -> list[Load]:
    """One load for each concurrency, or each rate."""
    settings = [(options.limit, rate) for rate in options.rate] if options.rate else None
    return [
        Load(
            target,
            jpegs,
            concurrency,
            min(options.processes, concurrency),
            options.seconds,
            options.warmup,
            rate,
            options.arrivals,
            options.seed,
            options.check,
            server_pid,
        )
        for concurrency, rate in settings or [(number, None) for number in options.concurrency]
    ]


def load_columns(result: Result, size: str) -> dict[str, str]:
    """The columns of the load and of its results."""
    load = result.load
    return {
        "size": size,
        "kilobytes": str(round(sum(map(len, load.pictures)) / len(load.pictures) / 1000)),
        "pictures": str(len(load.pictures)),
        "client": load.target.kind,
        "loop": "open" if load.rate else "closed",
        "rate": f"{load.rate:g}" if load.rate else "",
        "arrivals": load.arrivals if load.rate else "",
        "seconds": f"{load.seconds:g}",
        "processes": str(load.processes),
        "concurrency": str(load.concurrency),
        **result.columns(),
    }


def device_name(given: str | None) -> str | None:
    """The device's name in the table: the given one, else this machine's GPUs, or None for its CPU."""
    names = gpu_names()
    return given or (f"{names[0]} x{len(names)}" if names else None)


def print_result(name: str, row: dict[str, str]) -> None:
    """One line of the printed table."""
    sent = f"{row['rate']}/s {row['arrivals']}" if row["rate"] else f"{row['concurrency']} in flight"
    print(
        f"{name} {row['size']} {sent:>14}: {row['images_per_second']:>8} images/s  "
        f"p50 {row['p50_ms']} p95 {row['p95_ms']} p99 {row['p99_ms']} ms  "
        f"errors {row['errors']} {row['statuses']} late {row['late']} unsent {row['unsent']} "
        f"checked {row['checked']}  busy cores {row['busy_cores']} of {row['cores']}, "
        f"CPU ms an image: client {row['client_cpu_ms']} server {row['server_cpu_ms'] or '-'}",
        flush=True,
    )
    if row["server_cpu_by_process"]:
        print(f"    {row['server_cpu_by_process']}", flush=True)


def measure(options: argparse.Namespace, target: Target) -> None:
    """Measure each load of each size, print the table, and append it to a CSV if asked to."""
    device = device_name(options.device)
    for size in options.sizes or [options.size]:
        options.size = size
        jpegs = pictures(options)
        expected = first_answers(target, jpegs)
        for load in make_loads(options, target, jpegs, options.server_pid):
            row = {
                **about(["tritonclient", "grpcio"], device),
                "label": options.label,
                "model": options.model,
                **load_columns(run(load, expected), size),
            }
            print_result(options.model, row)
            if options.output:
                write_csv(options.output, [row], append=True)


def main() -> None:
    """Read the options, start the server if asked to, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, help="start a server of this checkpoint, instead of --url")
    add("--setting", nargs="+", default=[], metavar="NAME=VALUE", help="settings of that server")
    add("--url", default="127.0.0.1:8001", help="host:port of the client's endpoint, default %(default)s")
    add("--model", default="embed_image", help="default %(default)s")
    clients = [kind for kind in get_args(Kind) if kind != "http"]
    add(
        "--client",
        choices=clients,
        default="grpc",
        help="what sends; default %(default)s, the cheapest of gRPC",
    )
    add_load_options(parser)
    add("--sizes", nargs="+", help="several sizes, one after the other, instead of --size")
    add("--server-pid", type=int, help="process of a server on this machine, to account its CPU time")
    add("--device", help="what the server runs on, for the table; default: this machine's GPUs, else its CPU")
    add("--label", default="", help="name of the measurement in the table")
    add("--output", type=Path, help="CSV file to append to")
    options = parser.parse_args()
    if not options.checkpoint:
        measure(options, Target(options.client, options.url, options.model))
        return
    settings = parse_settings(options.setting)
    options.label = options.label or options.checkpoint.name
    with run_ours(options.checkpoint, "auto", settings, 600, options.model) as server:
        options.server_pid = server.pid
        measure(options, server.aimed_at(options.client))


if __name__ == "__main__":
    main()
