"""Cost of serving on a CPU: images per second through Triton, against the same engine in this process.

Three ways alternate over several rounds. The first is the engine, fed with decoded pixels at `--rows`. The
second decodes pictures in as many threads as there are cores, then runs the engine. The third is a server,
loaded by `--concurrency` clients that send one JPEG each. The ratios are those of one round, and their median
is the result. The server is idle while this process computes, and this process while the server does. The
client's CPU time is the server's loss.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import numpy as np

from benchmarks.inputs import parse_settings, synthetic_jpeg
from benchmarks.load import Load, Result, first_answers, run
from benchmarks.records import about, write_csv
from benchmarks.servers import Running, run_ours
from siglip_serve.checkpoint.config import load_config
from siglip_serve.config import Backend, Dtype
from siglip_serve.engine.engines import VisionEngine
from siglip_serve.engine.plan import Plan
from siglip_serve.images.preprocess import Preprocessor
from siglip_serve.machine import available_cores
from siglip_serve.towers.siglip import load_vision

# As the server sets it, before the first parallel region: threads that spin burn CPU time while they wait.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

PACKAGES = ["torch", "openvino", "nvidia-pytriton", "tritonclient", "numpy"]
_BUNDLED = Path(__file__).parents[1] / "checkpoints" / "siglip-tiny"
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy for this machine


def in_process(options: argparse.Namespace, jpegs: list[bytes]) -> list[Callable[[], object]]:
    """Embeds `--rows` pictures: from decoded pixels, and from files."""
    config = load_config(options.checkpoint)
    settings = parse_settings(options.setting)
    plan = Plan(
        "cpu",
        cast(Dtype, settings.get("dtype", "auto")),
        cast(Backend, settings.get("backend", "auto")),
        threads=available_cores(),
        cache=Path(settings.get("cache", Path.home() / ".cache" / "siglip-serve")),
        calibration=Path(settings["calibration"]) if "calibration" in settings else None,
    )
    engine, preprocess = (
        VisionEngine(load_vision(options.checkpoint), config.image, plan),
        Preprocessor(config.image),
    )
    batch = [jpegs[n % len(jpegs)] for n in range(options.rows)]
    pixels = np.stack([preprocess(jpeg) for jpeg in batch])
    pool = ThreadPoolExecutor(available_cores())
    return [lambda: engine(pixels), lambda: engine(np.stack(list(pool.map(preprocess, batch))))]


def rate(call: Callable[[], object], rows: int, seconds: float) -> float:
    """Images a second."""
    call()
    done, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        call()
        done += rows
    return done / passed


def passes(server: Running) -> tuple[int, int]:
    """Rows and passes of the vision tower so far."""
    url = f"http://{server.http_url}/v2/models/siglip_vision_model/stats"
    with _OPENER.open(url, timeout=10) as response:
        stats = json.load(response)["model_stats"][0]
    return stats["inference_count"], stats["execution_count"]


def summary(
    options: argparse.Namespace, server: Running, rounds: list[tuple[float, float, Result]], batch: float
) -> dict[str, str]:
    """The row of the table."""
    engines, decoded, served = zip(*rounds, strict=True)
    ratios = [result.rate / engine for engine, _, result in rounds]
    middle = sorted(served, key=lambda result: result.rate)[len(served) // 2]
    shown = middle.columns()
    return {
        **about(PACKAGES),
        "label": options.label or options.checkpoint.name,
        "dtype": server.columns["dtype"],
        "setting": " ".join(options.setting),
        "size": options.size,
        "rows": str(options.rows),
        "concurrency": str(options.concurrency),
        "rounds": str(len(rounds)),
        "seconds": f"{options.seconds:g}",
        "in_process_images_per_second": f"{statistics.median(engines):.2f}",
        "in_process_with_decoding": f"{statistics.median(decoded):.2f}",
        "through_triton_images_per_second": f"{statistics.median(result.rate for result in served):.2f}",
        "ratio": f"{statistics.median(ratios):.3f}",
        "ratio_min": f"{min(ratios):.3f}",
        "ratio_max": f"{max(ratios):.3f}",
        "ratio_with_decoding": f"{statistics.median(r.rate / d for _, d, r in rounds):.3f}",
        "rows_in_a_pass": f"{batch:.2f}",
        **{name: shown[name] for name in ("p50_ms", "p95_ms", "errors", "checked", "client_cpu_ms")},
        **{name: shown[name] for name in ("server_cpu_ms", "server_cpu_by_process", "busy_cores", "cores")},
        "load_average": f"{os.getloadavg()[0]:.1f}",
    }


def measure(options: argparse.Namespace) -> dict[str, str]:
    """All rounds."""
    width, height = (int(side) for side in options.size.split("x"))
    jpegs = [synthetic_jpeg(width, height, seed) for seed in range(options.pictures)]
    pixels, files = in_process(options, jpegs)
    settings = parse_settings(options.setting)
    rounds = []
    with run_ours(options.checkpoint, "cpu", settings, 600) as server:
        expected = first_answers(server.target, jpegs)
        load = Load(
            server.target,
            jpegs,
            options.concurrency,
            seconds=options.seconds,
            warmup=options.warmup,
            check=4,
            server_pid=server.pid,
        )
        before = passes(server)
        for _ in range(options.rounds):
            engine, decoded = (rate(way, options.rows, options.seconds) for way in (pixels, files))
            rounds.append((engine, decoded, run(load, expected)))
            served = rounds[-1][2].rate
            print(
                f"images/s: in process {engine:.2f}, with decoding {decoded:.2f}, served {served:.2f}; "
                f"ratios {served / engine:.3f} {served / decoded:.3f}",
                flush=True,
            )
        after = passes(server)
        return summary(options, server, rounds, (after[0] - before[0]) / (after[1] - before[1]))


def main() -> None:
    """Measure, print, and append to a CSV if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, default=_BUNDLED, help="default: the bundled one")
    add("--setting", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the server")
    add("--rows", type=int, default=8, help="images in one batch in this process, default %(default)s")
    add("--concurrency", type=int, default=8, help="requests in flight, default %(default)s")
    add("--size", default="500x375", help="width x height of the JPEGs, default %(default)s")
    add("--pictures", type=int, default=16, help="different pictures, sent in turn, default %(default)s")
    add("--rounds", type=int, default=4, help="default %(default)s")
    add("--seconds", type=float, default=10, help="for each way in a round, default %(default)s")
    add("--warmup", type=float, default=3, help="seconds before the server is measured, default %(default)s")
    add("--label", default="", help="for the table; default: the checkpoint's name")
    add("--output", type=Path, help="CSV file to append to")
    options = parser.parse_args()
    row = measure(options)
    for name in list(row)[len(about(PACKAGES)) :]:
        print(f"{name}: {row[name]}", flush=True)
    if options.output:
        write_csv(options.output, [row], append=True)


if __name__ == "__main__":
    main()
