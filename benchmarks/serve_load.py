"""Load on a running server: single-image JPEG requests over gRPC from plain tritonclient processes.

Closed loop: each of `--processes` client processes keeps its share of `--concurrency` requests in flight.
"""

from __future__ import annotations

import argparse
import multiprocessing
import queue
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton

from benchmarks.common import about, synthetic_jpeg, write_csv


def client(options: argparse.Namespace, in_flight: int, begin: Any, results: Any) -> None:
    """One client process: latencies in seconds, and errors, of what ended in the measured time."""
    width, height = (int(side) for side in options.size.split("x"))
    data = synthetic_jpeg(width, height)
    connection = triton.InferenceServerClient(options.url)
    tensor = triton.InferInput("INPUT_IMAGE", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[data]], dtype=np.object_))
    ended: queue.SimpleQueue[tuple[float, bool]] = queue.SimpleQueue()

    def done(start: float, result: Any, error: Any) -> None:  # noqa: ARG001 - the client's signature
        ended.put((start, error is None))

    def send() -> None:
        connection.async_infer(options.model, [tensor], callback=partial(done, time.perf_counter()))

    begin.wait(60)
    warm = time.perf_counter() + options.warmup
    end = warm + options.seconds
    for _ in range(in_flight):
        send()
    latencies, errors, waiting = [], 0, in_flight
    while waiting:
        start, good = ended.get()
        now = time.perf_counter()
        waiting -= 1
        if warm <= now < end and good:
            latencies.append(now - start)
        elif warm <= now < end:
            errors += 1
        if now < end:
            send()
            waiting += 1
    results.put((latencies, errors))


def measure(options: argparse.Namespace, concurrency: int) -> dict[str, str]:
    """One row of the table."""
    context = multiprocessing.get_context("spawn")
    processes = min(options.processes, concurrency)
    begin, results = context.Barrier(processes), context.Queue()
    shares = [concurrency // processes + (n < concurrency % processes) for n in range(processes)]
    workers = [context.Process(target=client, args=(options, share, begin, results)) for share in shares]
    for worker in workers:
        worker.start()
    answers = [results.get(timeout=options.warmup + options.seconds + 120) for _ in workers]
    for worker in workers:
        worker.join()
    latencies = np.concatenate([np.array(found) for found, _ in answers])
    p50, p95, p99 = np.percentile(latencies if len(latencies) else [np.nan], [50, 95, 99]) * 1000
    return {
        **about(["tritonclient"], options.device),
        "label": options.label,
        "model": options.model,
        "size": options.size,
        "processes": str(processes),
        "concurrency": str(concurrency),
        "images_per_second": f"{len(latencies) / options.seconds:.1f}",
        "p50_ms": f"{p50:.2f}",
        "p95_ms": f"{p95:.2f}",
        "p99_ms": f"{p99:.2f}",
        "errors": str(sum(errors for _, errors in answers)),
    }


def main() -> None:
    """Measure each concurrency, print the table, and append it to a CSV if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--url", default="127.0.0.1:8001", help="host:port of the gRPC endpoint, default %(default)s")
    add("--model", default="embed_image", help="default %(default)s")
    add("--size", default="500x375", help="of the JPEG, default %(default)s")
    add("--concurrency", type=int, nargs="+", default=[1, 8, 32], help="requests in flight, default 1 8 32")
    add("--processes", type=int, default=2, help="client processes, default %(default)s")
    add("--seconds", type=float, default=10, help="measured time, default %(default)s")
    add("--warmup", type=float, default=2, help="time before, default %(default)s")
    add("--device", help="what the server runs on, for the table; default: this machine's CPU")
    add("--label", default="", help="what is measured, for the table")
    add("--output", type=Path, help="CSV file to append to")
    options = parser.parse_args()
    for concurrency in options.concurrency:
        row = measure(options, concurrency)
        print({key: row[key] for key in list(row)[-9:]}, flush=True)
        if options.output:
            write_csv(options.output, [row], append=True)


if __name__ == "__main__":
    main()
