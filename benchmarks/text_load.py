"""Load of texts on a server that is started for this: `embed_text` over gRPC, and where its CPU time goes.

Closed loop: `--concurrency` requests of `--rows` texts each are always in flight. No text is sent twice, so
the tower computes every one, but for one request in 64, whose answer is known and checked. A load that ran
out of new texts, which the cache would have answered, is not kept. `--repeated` sends the texts of one
request again and again instead.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

from benchmarks.inputs import parse_settings, synthetic_texts
from benchmarks.load import Load, Result, first_answers, run
from benchmarks.records import about, write_csv
from benchmarks.serve_load import device_name
from benchmarks.servers import run_ours

_CHECKED = 64  # one request in this many


def columns(result: Result, rows: int) -> dict[str, str]:
    """The result as a row of a table, by text."""
    texts = result.completed * rows or np.nan
    latencies = result.latencies if len(result.latencies) else np.array([np.nan])
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99]) * 1000
    server = {name: 1000 * seconds / texts for name, seconds in result.server_cpu.items()}
    return {
        "rows": str(rows),
        "concurrency": str(result.load.concurrency),
        "processes": str(result.load.processes),
        "seconds": f"{result.load.seconds:g}",
        "texts_per_second": f"{texts / result.load.seconds:.1f}",
        "p50_ms": f"{p50:.2f}",
        "p95_ms": f"{p95:.2f}",
        "p99_ms": f"{p99:.2f}",
        "errors": str(sum(result.statuses.values())),
        "checked": str(result.checked),
        "client_cpu_ms": f"{1000 * result.client_cpu / texts:.4f}",
        "server_cpu_ms": f"{sum(server.values()):.4f}",
        "tokenize_cpu_ms": f"{server.get('siglip_text_tokenize', 0.0):.4f}",
        "tower_cpu_ms": f"{server.get('siglip_text_model', 0.0):.4f}",
        "triton_cpu_ms": f"{server.get('tritonserver', 0.0):.4f}",
        "server_cpu_by_process": "; ".join(
            f"{name} {value:.4f}" for name, value in server.items() if value >= 0.0001
        ),
        "busy_cores": f"{result.busy_cores:.2f}",
        "cores": str(os.cpu_count()),
        "load_average": f"{os.getloadavg()[0]:.1f}",
    }


def texts_needed(result: Result, rows: int) -> int:
    """Estimate how many texts a load has sent. Each client process begins where another one ends."""
    load = result.load
    return int(result.completed * rows * (load.seconds + load.warmup) / load.seconds)


def main() -> None:
    """Start the server, send each load, and add to the CSV if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="directory of the checkpoint")
    add("--setting", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the server")
    add("--rows", type=int, nargs="+", default=[64, 1], help="texts in a request, default 64 1")
    add("--concurrency", type=int, nargs="+", default=[8, 64], help="requests in flight, default 8 64")
    add("--processes", type=int, default=1, help="client processes, default %(default)s")
    add("--texts", type=int, default=262_144, help="different texts of a load, default %(default)s")
    add("--repeated", action="store_true", help="send the texts of one request only")
    add("--seconds", type=float, default=10, help="measured time, default %(default)s")
    add("--warmup", type=float, default=2, help="time before, default %(default)s")
    add("--device", help="what the server runs on, for the table; default: this machine's GPUs, else its CPU")
    add("--label", default="", help="name of the measurement in the table")
    add("--output", type=Path, help="CSV file to add to")
    options = parser.parse_args()
    settings = parse_settings(options.setting)
    with run_ours(options.checkpoint, "auto", settings, 600, "embed_text") as server:
        target = server.aimed_at("grpc_texts")
        for rows in options.rows:
            for concurrency in options.concurrency:
                texts = [text.encode() for text in synthetic_texts(options.texts, f"{rows} {concurrency}")]
                requests = [b"\n".join(texts[first : first + rows]) for first in range(0, len(texts), rows)]
                requests = requests[:1] if options.repeated else requests
                requests[::_CHECKED] = requests[:1] * len(requests[::_CHECKED])
                (answer,) = first_answers(target, requests[:1])
                expected = dict.fromkeys(range(0, len(requests), _CHECKED), answer)
                processes = min(options.processes, concurrency)
                load = Load(
                    target, requests, concurrency, processes, options.seconds, options.warmup,
                    check=1, server_pid=server.pid,
                )  # fmt: skip
                result = run(load, expected)
                if not options.repeated and (needed := texts_needed(result, rows)) > len(texts):
                    print(f"{rows} {concurrency}: texts came again; try again with --texts {2 * needed}")
                    continue
                row = {
                    **about(["tritonclient", "grpcio"], device_name(options.device)),
                    "label": options.label,
                    "checkpoint": options.checkpoint.name,
                    "dtype": server.columns["dtype"],
                    "repeated": str(options.repeated).lower(),
                    **columns(result, rows),
                }
                print({key: row[key] for key in list(row)[7:]}, flush=True)
                if options.output:
                    write_csv(options.output, [row], append=True)


if __name__ == "__main__":
    main()
