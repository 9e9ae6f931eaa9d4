"""Cost of locust: the same load through `siglip-serve bench` and through this folder's own client.

The two alternate on one server, in rounds, since on a shared machine only neighbours can be compared.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from siglip_serve_client.commands.bench.mix import pictures
from siglip_serve_client.commands.bench.report import Row
from siglip_serve_client.commands.bench.run import Plan, Point, run_point

from benchmarks.load import Load, first_answers, run
from benchmarks.load_clients import Kind
from benchmarks.records import about, write_csv
from benchmarks.serve_load import device_name
from benchmarks.servers import Running, run_ours

__all__ = ["through_locust", "through_serve_load"]

_KINDS: dict[str, Kind] = {"grpc": "grpc", "http": "triton_http"}


def through_serve_load(
    server: Running, transport: str, concurrency: int, options: argparse.Namespace
) -> dict[str, str]:
    """The columns of a load by `benchmarks.load`."""
    target = server.aimed_at(_KINDS[transport])
    jpegs = [picture for picture, _ in pictures(options.size)]
    load = Load(target, jpegs, concurrency, 1, options.seconds, options.warmup)
    found = run(load, first_answers(target, jpegs)).columns()
    names = ["images_per_second", "p50_ms", "p95_ms", "p99_ms", "errors", "client_cpu_ms"]
    return {"client": f"serve_load {target.kind}", **{name: found[name] for name in names}}


def through_locust(
    server: Running, transport: str, concurrency: int, options: argparse.Namespace
) -> dict[str, str]:
    """Columns of a load by locust."""
    plan = Plan(
        f"{transport}://{server.aimed_at(_KINDS[transport]).url}",
        mix=options.size,
        seconds=options.seconds,
        warmup=options.warmup,
    )
    point = Point(concurrency)
    with tempfile.TemporaryDirectory() as folder:
        summary = run_point(plan, point, Path(folder))
    found = Row(point, summary).columns()
    return {
        "client": f"locust {transport}",
        "images_per_second": found["requests_per_second"],
        **{name: found[name] for name in ("p50_ms", "p95_ms", "p99_ms", "errors")},
        "client_cpu_ms": f"{1000 * sum(summary.client_cpu) / max(summary.answered, 1):.3f}",
    }


def main() -> None:
    """Read the options, start the server, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="what the server serves")
    add("--size", default="500x375", help="width x height of the pictures, default %(default)s")
    add("--concurrency", type=int, nargs="+", default=[1, 16], help="requests in flight, default 1 16")
    add("--transport", nargs="+", choices=_KINDS, default=list(_KINDS))
    add("--rounds", type=int, default=3, help="default %(default)s")
    add("--seconds", type=float, default=5, help="measured time, default %(default)s")
    add("--warmup", type=float, default=1, help="time before, default %(default)s")
    add("--device", help="what the server runs on, for the table")
    add("--output", type=Path, help="CSV file to append to")
    options = parser.parse_args()
    with run_ours(options.checkpoint, "auto", {}, 600) as server:
        for number in range(options.rounds):
            for transport in options.transport:
                for concurrency in options.concurrency:
                    for measure in (through_serve_load, through_locust):
                        row = {
                            **about(["tritonclient", "grpcio", "locust"], device_name(options.device)),
                            "label": options.checkpoint.name,
                            "model": "embed_image",
                            "size": options.size,
                            "round": str(number),
                            "seconds": f"{options.seconds:g}",
                            "processes": "1",
                            "concurrency": str(concurrency),
                            **measure(server, transport, concurrency, options),
                            "cores": str(os.cpu_count()),
                            "load_average": f"{os.getloadavg()[0]:.1f}",
                        }
                        print(", ".join(f"{name} {row[name]}" for name in list(row)[-12:]), flush=True)
                        if options.output:
                            write_csv(options.output, [row], append=True)


if __name__ == "__main__":
    main()
