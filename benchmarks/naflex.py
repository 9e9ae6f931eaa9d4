"""SigLIP 2 NaFlex: how far from its reference, how much is padding, and how fast beside towers for squares.

Pictures of aspect 1:8 to 8:1, random weights. All ways take the same pictures batch by batch and alternate,
so that a busy machine slows all alike. The towers for squares are SigLIP of the same width, which stretches
pictures to a square of as many patches. Pictures lie in memory, resized and cut. The reference is
transformers on a CPU and the plain torch tower on a GPU, both in float32. Differences of unit vectors are
those of the embeddings after normalisation.
"""

from __future__ import annotations

import argparse
import os
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.naflex_ways import WIDTHS, Outcome, Setup, Way, take_turns
from benchmarks.records import about, cosine, gpu_names, publish
from siglip_serve.machine import available_cores

# As the server sets it, before the first parallel region: threads that spin burn CPU time while they wait.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

PACKAGES = ["torch", "transformers", "openvino", "triton", "numpy"]
DEFAULTS = {
    "cpu": {"pictures": 200, "batch": 40, "seconds": 0},
    "cuda": {"pictures": 640, "batch": 640, "seconds": 10},
}
ALONE = 4  # pictures that are also embedded one by one


def measure(width: str, options: argparse.Namespace) -> list[dict[str, str]]:
    """One row for each way."""
    # A machine with a GPU need not have what the ways of a CPU import, and the other way round.
    setup: Setup = import_module(f"benchmarks.naflex_{options.device}").prepare(width, options)
    outcomes, rounds = take_turns(setup.ways, options.pictures, options.batch, options.seconds)
    references: dict[str, Outcome] = {}
    table = []
    for way, outcome in zip(setup.ways, outcomes, strict=True):
        reference = references.setdefault(way.tower, outcome)
        images = options.pictures * rounds
        table.append(
            {
                **about(PACKAGES, gpu_names()[0] if options.device == "cuda" else None),
                "width": width,
                "tower": way.tower,
                "backend": way.backend,
                "dtype": way.dtype,
                "pictures": str(options.pictures),
                "largest_aspect": str(options.largest_aspect),
                "batch": str(options.batch),
                "cores": str(available_cores()),
                "padding": f"{way.padding:.4f}",
                "images_per_second": f"{images / outcome.wall:.2f}",
                "device_images_per_second": _device_speed(way),
                "cpu_ms_per_image": f"{1000 * outcome.cpu / images:.1f}",
                **fidelity(way, outcome.embeddings, reference.embeddings, reference is outcome),
                "text_cosine_min": _text_cosine(way, setup),
            }
        )
    return table


def fidelity(
    way: Way, got: NDArray[np.float32], expected: NDArray[np.float32], is_reference: bool
) -> dict[str, str]:
    """Differences of embeddings [N, D] from the reference's and from those of pictures alone."""
    columns = ("difference", "unit_difference", "cosine_min", "difference_one_by_one")
    if is_reference:
        return dict.fromkeys(columns, "")
    chosen = np.linspace(0, len(got) - 1, min(ALONE, len(got)), dtype=int).tolist()
    alone = np.concatenate([way.embed(slice(index, index + 1)) for index in chosen])
    values = (
        f"{np.abs(got - expected).max():.1e}",
        f"{np.abs(_unit(got) - _unit(expected)).max():.1e}",
        f"{cosine(got, expected).min():.8f}",
        f"{np.abs(got[chosen] - alone).max():.1e}",
    )
    return dict(zip(columns, values, strict=True))


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def _device_speed(way: Way) -> str:
    return f"{1 / way.device_seconds():.1f}" if way.device_seconds else ""


def _text_cosine(way: Way, setup: Setup) -> str:
    ours = way.tower == "naflex" and way.backend == "torch" and way.dtype == "float32"
    return f"{setup.text_cosine:.8f}" if ours and setup.text_cosine is not None else ""


def main() -> None:
    """Measure, print, and write CSV if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default %(default)s")
    add("--width", choices=WIDTHS, nargs="+", default=["narrow", "base"], help="default: narrow and base")
    add("--pictures", type=int, help="default: 200, on a GPU 640")
    add("--batch", type=int, help="pictures of one call while time is taken, default: 40, on a GPU 640")
    add("--largest-aspect", type=float, default=8.0, help="1: squares of one size, default %(default)s")
    add("--seconds", type=float, help="repeat for so long, default: once, on a GPU 10 s")
    add("--output", type=Path, help="CSV file to append to")
    options = parser.parse_args()
    for name, value in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for width in options.width:
        table = measure(width, options)
        publish(table, PACKAGES, options.output)


if __name__ == "__main__":
    main()
