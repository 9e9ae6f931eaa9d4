"""CPU time and memory of the costliest image files, of a thousand crafted ones per format.

Each file is decoded and resized as the server does it, in one process and the one that it starts. The same
seed gives the same files.
"""

from __future__ import annotations

import argparse
import resource
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from PIL import Image
from tqdm import tqdm

from benchmarks.crafted_files import KINDS, craft
from benchmarks.preprocess import default_size
from benchmarks.records import about, write_csv
from siglip_serve.checkpoint.model_config import ImageConfig
from siglip_serve.errors import InvalidInputError
from siglip_serve.images.preprocess import Preprocessor
from siglip_serve.images.resize import Mode

_INTERVAL = 0.005  # seconds between two looks at the memory


@dataclass(frozen=True)
class Cost:
    """CPU seconds of all processes for one file, megabytes of the largest process, and the outcome."""

    seconds: float
    megabytes: float
    outcome: str


class _Memory:
    """The most memory that this process and its children have over what they had at the start."""

    def __init__(self) -> None:
        self.most = 0
        self._start: dict[int, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Memory:
        self._start = self._sizes()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(_INTERVAL):
            for process, size in self._sizes().items():
                # A child that starts brings its libraries along, which no file has cost.
                self.most = max(self.most, size - self._start.setdefault(process, size))

    @staticmethod
    def _sizes() -> dict[int, int]:
        own = psutil.Process()
        sizes = {}
        for process in [own, *own.children(recursive=True)]:
            with suppress(psutil.Error):
                sizes[process.pid] = process.memory_info().rss
        return sizes


def preprocessor(mode: Mode) -> Preprocessor:
    """Decode and resize as the server does; without Pillow's own limit, in whose place the server has one."""
    Image.MAX_IMAGE_PIXELS = None
    config = ImageConfig(
        size=default_size(), resample="bicubic", rescale=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    return Preprocessor(config, mode)


def measure(preprocess: Preprocessor, data: bytes) -> Cost:
    """Decode and resize one file."""
    begin = _cpu_seconds()
    with _Memory() as memory:
        try:
            preprocess(data)
            outcome = "pixels"
        except InvalidInputError as error:
            outcome = f"{type(error).__name__}: {error}"
            with suppress(InvalidInputError):  # so that the start of the next decoder counts for this file
                preprocess(b"GIF89a")
    return Cost(_cpu_seconds() - begin, memory.most / 1e6, outcome)


def _cpu_seconds() -> float:
    """CPU time of this process and its children, living and dead, without the thread that looks at memory."""
    dead = resource.getrusage(resource.RUSAGE_CHILDREN)
    living = 0.0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            living += sum(child.cpu_times()[:4])  # its own, and those of its dead children
    return time.thread_time() + living + dead.ru_utime + dead.ru_stime


def rows(kinds: list[str], count: int, seed: int, mode: Mode, keep: Path | None) -> list[dict[str, str]]:
    """One row per format: the costliest file by time, and the most memory of any."""
    columns = {**about(["pillow", "simplejpeg", "numpy"]), "mode": mode, "seed": str(seed)}
    table = []
    for kind in kinds:
        preprocess = preprocessor(mode)
        costs: list[Cost] = []
        worst = b""
        for data in tqdm(craft(kind, count, seed), total=count, desc=kind, disable=None):
            cost = measure(preprocess, data)
            if not costs or cost.seconds > max(earlier.seconds for earlier in costs):
                worst = data
            costs.append(cost)
        preprocess.close()
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"worst.{kind.lower()}").write_bytes(worst)
        costliest = max(costs, key=lambda cost: cost.seconds)
        table.append(
            {
                **columns,
                "format": kind,
                "files": str(count),
                "pixels": str(sum(cost.outcome == "pixels" for cost in costs)),
                "cost_refused": str(sum(cost.outcome.startswith("ImageCostError") for cost in costs)),
                "max_cpu_seconds": f"{costliest.seconds:.2f}",
                "worst_bytes": str(len(worst)),
                "worst_outcome": costliest.outcome[:150],
                "max_megabytes": f"{max(cost.megabytes for cost in costs):.0f}",
            }
        )
        print({name: table[-1][name] for name in list(table[-1])[len(columns) :]}, flush=True)
    return table


def main() -> None:
    """Measure, print the table, and write it as CSV if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1000, help="files per format, default %(default)s")
    parser.add_argument("--formats", nargs="+", choices=KINDS, default=list(KINDS), metavar="FORMAT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=["fast", "pil"], default="fast")
    parser.add_argument("--keep", type=Path, help="folder for the costliest file of each format")
    parser.add_argument("--output", type=Path, help="CSV file to append to")
    options = parser.parse_args()
    table = rows(options.formats, options.files, options.seed, options.mode, options.keep)
    if options.output:
        write_csv(options.output, table, append=True)


if __name__ == "__main__":
    main()
