"""Latency of teams through the real server: a frame's crops, one crop at a time, and the last step alone.

    python -m benchmarks.teams_latency --checkpoint DIR --output benchmarks/results/teams_latency.csv

One client, one request at a time, on drawn footballers (`training.jerseys`). What a step of the ensemble adds
is the server's own count: from the step's arrival in the queue to its answer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from siglip_serve_client import Client, Teams
from tqdm import tqdm

from benchmarks.records import about, write_csv
from siglip_serve.launcher import ServeOptions, TritonServer
from training.jerseys import clip

PACKAGES = ("torch", "nvidia-pytriton", "tritonclient", "numpy", "scikit-learn", "openvino")
FRAME, BATCH, FITTED = 22, 30, 60


def milliseconds(call: Callable[[], object], seconds: float) -> list[float]:
    """The duration of each call, for so long, after three that do not count."""
    for _ in range(3):
        call()
    taken: list[float] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(taken) < 5:
        begin = time.perf_counter()
        call()
        taken.append((time.perf_counter() - begin) * 1000)
    return taken


def step_milliseconds(client: triton.InferenceServerClient, model: str) -> tuple[int, float]:
    """Requests that a model has answered, and their time together."""
    statistics = client.get_inference_statistics(model).model_stats[0].inference_stats
    return int(statistics.success.count), statistics.success.ns / 1e6


def measure(options: argparse.Namespace, server: TritonServer) -> list[dict[str, str]]:
    """One row a way of asking."""
    crops = clip("T0", 0).crops
    statistics = triton.InferenceServerClient(server.grpc_url)
    rows = []
    with Client(server.grpc_url) as client:
        state = options.state.read_bytes() if options.state else client.fit_teams(crops=crops[:FITTED]).state

        def ask(some: list[bytes]) -> Teams:
            return client.classify_teams(crops=some, state=state)

        ways: dict[str, Callable[[], object]] = {
            f"a frame of {FRAME} crops": lambda: ask(crops[:FRAME]),
            f"{BATCH} crops in one request": lambda: ask(crops[:BATCH]),
            f"{BATCH} crops, one a request": lambda: [ask([crop]) for crop in crops[:BATCH]],
        }
        for name, way in tqdm(ways.items(), unit="way", disable=None):
            count, total = step_milliseconds(statistics, "team_predict")
            taken = milliseconds(way, options.seconds)
            later, sum_later = step_milliseconds(statistics, "team_predict")
            rows.append(
                {
                    **about(PACKAGES),
                    "checkpoint": options.checkpoint.name,
                    "served_on": server.device,
                    "way": name,
                    "calls": str(len(taken)),
                    "p50_ms": f"{np.median(taken):.2f}",
                    "p95_ms": f"{np.quantile(taken, 0.95):.2f}",
                    "team_predict_ms": f"{(sum_later - total) / (later - count):.3f}",
                }
            )
            row = rows[-1]
            print(", ".join(f"{key} {row[key]}" for key in ("way", "p50_ms", "p95_ms", "team_predict_ms")))
    together, alone = (float(row["p50_ms"]) for row in rows[1:])
    print(f"{BATCH} crops one per request take {alone / together:.1f} times as long as in one request")
    return rows


def main() -> None:
    """Run the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/siglip-tiny-jersey"))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--state", type=Path, help="a fit's state for this checkpoint; default: fit one first"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="of each way (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="the .csv file to write")
    options = parser.parse_args()
    models = ("classify_teams",) if options.state else ("fit_teams", "classify_teams")
    repository = Path(__file__).parents[1] / "model_repository"
    with TritonServer(
        ServeOptions(repository, str(options.checkpoint), device=options.device, models=models)
    ) as server:
        rows = measure(options, server)
    if options.output:
        write_csv(options.output, rows)


if __name__ == "__main__":
    main()
