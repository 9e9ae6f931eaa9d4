"""Latency of heatmaps through the real server, step by step: one request at a time.

    python -m benchmarks.heatmap_latency --checkpoint DIR --output benchmarks/results/heatmap_latency.csv

One client over gRPC asks `explain_image` of one JPEG of 500x375 pixels. Prompts are the same every time, as
they are for somebody who looks at one picture after the other: the server keeps their embeddings; `new
prompts` are others each time. What each step takes is the server's own count, from its arrival in the step's
queue to its answer.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from siglip_serve_client import Client
from tqdm import tqdm

from benchmarks.inputs import parse_settings, synthetic_jpeg
from benchmarks.records import about, write_csv
from benchmarks.serve_load import device_name
from benchmarks.teams_latency import milliseconds, step_milliseconds
from siglip_serve.launcher import ServeOptions, TritonServer

__all__ = ["STEPS", "main", "measure", "ways"]

PACKAGES = ("torch", "nvidia-pytriton", "tritonclient", "numpy", "openvino")
STEPS = (
    "siglip_vision_process",
    "explain_prompts",
    "siglip_text_model",
    "explain_vectors",
    "siglip_vision_model",
    "explain_maps",
    "explain_overlays",
)


def ways(client: Client, image: bytes) -> dict[str, Callable[[], object]]:
    """The ways of asking, by name."""
    prompts = [f"a photo of thing number {number}" for number in range(200)]
    fresh = itertools.count()
    return {
        "embed_image": lambda: client.embed_image(image),
        "1 prompt": lambda: client.explain(image, prompts[:1]),
        "5 prompts": lambda: client.explain(image, prompts[:5]),
        "5 new prompts": lambda: client.explain(image, [f"new thing {next(fresh)}" for _ in range(5)]),
        "5 prompts, overlays": lambda: client.explain(image, prompts[:5], overlays=True),
        "30 prompts": lambda: client.explain(image, prompts[:30]),
        "200 prompts": lambda: client.explain(image, prompts),
    }


def measure(options: argparse.Namespace, server: TritonServer) -> list[dict[str, str]]:
    """One row a way of asking."""
    rows = []
    statistics = triton.InferenceServerClient(server.grpc_url)
    image = synthetic_jpeg(500, 375)
    with Client(server.grpc_url) as client:
        for name, ask in tqdm(ways(client, image).items(), unit="way", disable=None):
            ask()
            before = {step: step_milliseconds(statistics, step) for step in STEPS}
            taken = milliseconds(ask, options.seconds)
            after = {step: step_milliseconds(statistics, step) for step in STEPS}
            rows.append(
                {
                    **about(PACKAGES, device_name(None) if server.device == "cuda" else None),
                    "checkpoint": options.checkpoint.name,
                    "served_on": server.device,
                    "dtype": options.dtype,
                    "way": name,
                    "calls": str(len(taken)),
                    "p50_ms": f"{np.median(taken):.2f}",
                    "p95_ms": f"{np.quantile(taken, 0.95):.2f}",
                    **{f"{step}_ms": _mean(before[step], after[step]) for step in STEPS},
                }
            )
            tqdm.write(" ".join(f"{value:>10}" for value in list(rows[-1].values())[-12:]))
    return rows


def _mean(before: tuple[int, float], after: tuple[int, float]) -> str:
    """Milliseconds of a request between two readings, empty where there was none."""
    count = after[0] - before[0]
    return f"{(after[1] - before[1]) / count:.3f}" if count else ""


def main() -> None:
    """Run the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/siglip-tiny"))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", default="auto", help="default: %(default)s")
    parser.add_argument("--setting", nargs="*", default=[], metavar="NAME=VALUE", help="of the server")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each way (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="the .csv file to append to")
    options = parser.parse_args()
    repository = Path(__file__).parents[1] / "model_repository"
    serve = ServeOptions(
        repository,
        str(options.checkpoint),
        device=options.device,
        settings={"dtype": options.dtype, **parse_settings(options.setting)},
        models=("explain_image", "embed_image"),
    )
    with TritonServer(serve) as server:
        rows = measure(options, server)
    if options.output:
        write_csv(options.output, rows, append=True)


if __name__ == "__main__":
    main()
