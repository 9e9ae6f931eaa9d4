"""Time of one image from file to pixels, `fast` against `pil`, on one thread.

Both modes alternate, so that a busy machine slows both alike and the ratio stays fair.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from importlib import resources
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.inputs import synthetic_jpeg
from benchmarks.records import about, write_csv
from siglip_serve.checkpoint.model_config import ImageConfig
from siglip_serve.images.preprocess import Preprocessor
from siglip_serve.images.resize import Mode

MODES: tuple[Mode, ...] = get_args(Mode)
CASES = {"500x375": (500, 375), "1080p": (1920, 1080), "12 MP": (4000, 3000), "64x128": (64, 128)}


def measure(data: bytes, modes: dict[Mode, Preprocessor], seconds: float) -> dict[Mode, float]:
    """Median milliseconds per image, for each mode."""
    times: dict[Mode, list[float]] = {mode: [] for mode in modes}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not times["pil"]:
        for mode, process in modes.items():
            start = time.perf_counter()
            process(data)
            times[mode].append(time.perf_counter() - start)
    return {mode: 1000 * statistics.median(values) for mode, values in times.items()}


def default_size() -> int:
    """The image size of a SigLIP checkpoint that names none."""
    defaults = json.loads(
        resources.files("siglip_serve.checkpoint").joinpath("siglip_defaults.json").read_text()
    )
    return int(defaults["vision_config"]["image_size"])


def rows(seconds: float, size: int) -> list[dict[str, str]]:
    """One row per case and mode."""
    config = ImageConfig(size=size, resample="bicubic", rescale=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3)
    modes = {mode: Preprocessor(config, mode) for mode in MODES}
    columns = {
        **about(["torch", "pillow", "simplejpeg"]),
        "threads": str(torch.get_num_threads()),
        "size": str(size),
    }
    table = []
    for case, (width, height) in tqdm(CASES.items(), disable=None):
        data = synthetic_jpeg(width, height)
        pixels: dict[Mode, NDArray[np.uint8]] = {mode: process(data) for mode, process in modes.items()}
        milliseconds = measure(data, modes, seconds)
        for mode in MODES:
            difference = np.abs(pixels[mode].astype(int) - pixels["pil"])
            table.append(
                {
                    **columns,
                    "case": case,
                    "kilobytes": str(round(len(data) / 1000)),
                    "mode": mode,
                    "ms_per_image": f"{milliseconds[mode]:.3f}",
                    "ratio": f"{milliseconds['pil'] / milliseconds[mode]:.2f}",
                    "max_abs_diff": str(difference.max()),
                    "mean_abs_diff": f"{difference.mean():.4f}",
                }
            )
    return table


def main() -> None:
    """Measure, print the table, and write it as CSV if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5, help="time for each case, default %(default)s")
    parser.add_argument(
        "--size", type=int, default=default_size(), help="side of the resized square, default %(default)s"
    )
    parser.add_argument("--output", type=Path, help="CSV file to write, for example results/preprocess.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = rows(arguments.seconds, arguments.size)
    for row in table:
        print(
            f"{row['case']:>8} {row['mode']:>5} {row['ms_per_image']:>9} ms  {row['ratio']:>5} x pil  "
            f"max {row['max_abs_diff']} mean {row['mean_abs_diff']}"
        )
    if arguments.output:
        write_csv(arguments.output, table)


if __name__ == "__main__":
    main()
