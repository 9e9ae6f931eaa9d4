"""Bursts of a few requests that come while the model is busy: as configured, and with a queue policy.

    python -m benchmarks.bursts --checkpoint checkpoints/siglip-tiny --output benchmarks/results/bursts.csv

A burst is some callers that send one picture each, a few milliseconds apart, and nothing follows. With a
queue policy Triton's batcher may sleep for 500 ms beside waiting requests. Two servers answer in turn, so
that both meet the same load of the machine. `late` is the share of bursts whose slowest answer took 0.4 s
longer than the answer to a picture alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from siglip_serve_client import Client

from benchmarks.inputs import synthetic_jpeg
from benchmarks.records import about, write_csv
from siglip_serve.launcher import ServeOptions, TritonServer

_ROOT = Path(__file__).parents[1]
_QUEUE = "dynamic_batching {"
_POLICY = f"{_QUEUE} default_queue_policy {{ max_queue_size: 1024 }}"
_LATE = 0.4  # seconds


def main() -> None:
    """Run the comparison and write the table."""
    options = _parser().parse_args()
    picture = synthetic_jpeg(500, 375, 0)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        clients = {
            way: stack.enter_context(Client(f"grpc://{server.grpc_url}"))
            for way, server in _servers(options.checkpoint, Path(folder), stack)
        }
        alone = {way: [_timed(client, picture) for _ in range(30)][5:] for way, client in clients.items()}
        bursts: dict[str, list[float]] = {way: [] for way in clients}
        for turn in range(options.bursts):
            for way in clients if turn % 2 else reversed(clients):
                bursts[way].append(_burst(clients[way], picture, options.callers, options.gap / 1000))
    rows = []
    for way, found in bursts.items():
        usual, ordered = median(alone[way]), sorted(found)
        row = {
            **about(["tritonclient", "grpcio"]),
            "way": way,
            "load_average": f"{os.getloadavg()[0]:.1f}",
            "callers": str(options.callers),
            "gap_ms": f"{options.gap:g}",
            "bursts": str(len(found)),
            "alone_ms": f"{1000 * usual:.1f}",
            "p50_ms": f"{1000 * median(found):.1f}",
            "p90_ms": f"{1000 * ordered[len(ordered) * 9 // 10]:.1f}",
            "longest_ms": f"{1000 * ordered[-1]:.1f}",
            "late": f"{sum(seconds > usual + _LATE for seconds in found) / len(found):.3f}",
        }
        rows.append(row)
        print(", ".join(f"{name} {row[name]}" for name in ("way", "alone_ms", "p50_ms", "p90_ms", "late")))
    if options.output:
        write_csv(options.output, rows, append=False)


def _servers(checkpoint: Path, folder: Path, stack: ExitStack) -> Iterator[tuple[str, TritonServer]]:
    changed = Path(shutil.copytree(_ROOT / "model_repository", folder / "models"))
    for file in [*changed.glob("*/config.pbtxt"), *changed.glob("*/configs/*.pbtxt")]:
        file.write_text(file.read_text().replace(_QUEUE, _POLICY))
    for way, models in (("no policy", _ROOT / "model_repository"), ("max_queue_size", changed)):
        options = ServeOptions(
            models,
            str(checkpoint),
            device="cpu",
            models=("embed_image",),
            gateway_port=None,
            log_file=folder / f"{way}.log",
        )
        yield way, stack.enter_context(TritonServer(options))


def _burst(client: Client, picture: bytes, callers: int, gap: float) -> float:
    """Seconds until the slowest of some callers has its answer, from its own request on."""

    def ask(number: int) -> float:
        time.sleep(number * gap)
        return _timed(client, picture)

    with ThreadPoolExecutor(callers) as pool:
        return max(pool.map(ask, range(callers)))


def _timed(client: Client, picture: bytes) -> float:
    begin = time.perf_counter()
    client.embed_image(picture)
    return time.perf_counter() - begin


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="directory of the checkpoint that is served")
    add("--bursts", type=int, default=100, help="of each server, default %(default)s")
    add("--callers", type=int, default=3, help="of a burst, default %(default)s")
    add("--gap", type=float, default=3.0, help="milliseconds between two of them, default %(default)s")
    add("--output", type=Path, help="CSV file to write")
    return parser


if __name__ == "__main__":
    main()
