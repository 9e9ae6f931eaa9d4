"""CPU time of one image from file to pixels in each mode, on one thread, and how far the pixels are off.

The modes alternate, so that a busy machine slows all alike and the ratios stay fair. `decode` is the part up
to the picture that is resized: whole, or with `scaled` at a fraction of its size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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
from siglip_serve.images.jpeg import plain_scan
from siglip_serve.images.preprocess import Preprocessor, ReadMode

MODES: tuple[ReadMode, ...] = get_args(ReadMode)
CASES = {"500x375": (500, 375), "1080p": (1920, 1080), "12 MP": (4000, 3000), "64x128": (64, 128)}
_LEAST = 5  # calls of each mode


def measure(data: bytes, ways: Mapping[str, Callable[[bytes], object]], seconds: float) -> dict[str, float]:
    """Median milliseconds of CPU time per image, for each way of reading it."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for read in ways.values():
        read(data)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(ways))]) < _LEAST:
        for way, read in ways.items():
            start = time.thread_time()
            read(data)
            times[way].append(time.thread_time() - start)
    return {way: 1000 * statistics.median(values) for way, values in times.items()}


def decoders(
    modes: Mapping[ReadMode, Preprocessor], data: bytes, size: int
) -> dict[str, Callable[[bytes], object]]:
    """The decoder of each mode, without the resize."""
    ways: dict[str, Callable[[bytes], object]] = {mode: process.decode for mode, process in modes.items()}
    scan = plain_scan(data)
    if "scaled" in modes and scan is not None:
        from siglip_serve.images.scaled.reader import read_scaled, scaled_side

        side = scaled_side((scan.frame.height, scan.frame.width), (size, size))
        if side is not None:
            ways["scaled"] = lambda file: read_scaled(file, scan, side)
    return ways


def default_size() -> int:
    """The image size of a SigLIP checkpoint that names none."""
    defaults = json.loads(
        resources.files("siglip_serve.checkpoint").joinpath("siglip_defaults.json").read_text()
    )
    return int(defaults["vision_config"]["image_size"])


def cases(photographs: Path | None) -> dict[str, bytes]:
    """The files by name: drawn ones, or the JPEGs of a folder."""
    if photographs is None:
        return {case: synthetic_jpeg(*size) for case, size in CASES.items()}
    return {file.stem: file.read_bytes() for file in sorted(photographs.iterdir())}


def rows(
    seconds: float, size: int, modes: Sequence[ReadMode], photographs: Path | None
) -> list[dict[str, str]]:
    """One row per case and mode. The last mode is `pil`, which the others are compared with."""
    config = ImageConfig(size=size, resample="bicubic", rescale=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3)
    named: list[ReadMode] = [*(mode for mode in modes if mode != "pil"), "pil"]
    readers: dict[ReadMode, Preprocessor] = {mode: Preprocessor(config, mode) for mode in named}
    columns = {
        **about(["torch", "pillow", "simplejpeg", "numba"]),
        "threads": str(torch.get_num_threads()),
        "size": str(size),
    }
    table = []
    for case, data in tqdm(cases(photographs).items(), disable=None):
        pixels: dict[str, NDArray[np.uint8]] = {mode: process(data) for mode, process in readers.items()}
        milliseconds = measure(data, {str(mode): read for mode, read in readers.items()}, seconds)
        decoding = measure(data, decoders(readers, data, size), seconds / 2)
        for mode in readers:
            difference = np.abs(pixels[mode].astype(int) - pixels["pil"])
            table.append(
                {
                    **columns,
                    "case": case,
                    "kilobytes": str(round(len(data) / 1000)),
                    "mode": mode,
                    "ms_per_image": f"{milliseconds[mode]:.3f}",
                    "decode_ms": f"{decoding[mode]:.3f}",
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
    parser.add_argument(
        "--modes", choices=MODES, nargs="+", default=["fast"], help="besides pil, default fast"
    )
    parser.add_argument("--photographs", type=Path, help="folder of JPEGs, in place of drawn ones")
    parser.add_argument("--append", action="store_true", help="keep the rows that the CSV file has")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = rows(arguments.seconds, arguments.size, arguments.modes, arguments.photographs)
    for row in table:
        print(
            f"{row['case']:>8} {row['mode']:>6} {row['ms_per_image']:>9} ms ({row['decode_ms']} to decode)  "
            f"{row['ratio']:>5} x pil  "
            f"max {row['max_abs_diff']} mean {row['mean_abs_diff']}"
        )
    if arguments.output:
        write_csv(arguments.output, table, arguments.append)


if __name__ == "__main__":
    main()
