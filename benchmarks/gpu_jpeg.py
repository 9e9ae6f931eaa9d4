"""Correctness of the GPU's JPEG decoder under load, and its speed.

Several processes read random mixes of JPEGs, from one file to more than are decoded at once, some of them
runs of equal pictures. Another process keeps the GPU busy, so that memory which is read or written too early
shows. Each answer is compared with the same file's pixels of `fast` on the CPU. Among the files are some with
damaged image data, whose own pixels are undefined, and some that the GPU must leave to the CPU.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from benchmarks.inputs import synthetic_jpeg
from benchmarks.preprocess import default_size
from benchmarks.records import about, write_csv
from siglip_serve.checkpoint.model_config import ImageConfig
from siglip_serve.images.formats import ImageLimits
from siglip_serve.images.jpeg import plain_frame
from siglip_serve.images.nvjpeg.reader import GpuJpegReader
from siglip_serve.images.preprocess import Preprocessor

MOST_OFF, MEAN_OFF = 3, 0.1  # levels of 255
_LONGEST = 200  # files in one call; more than one batch
_SHOWN = 5  # wrong answers of each process
_SAMPLINGS = ("4:4:4", "4:2:2", "4:2:0", "gray")
_LARGE = ((4032, 3024), (3024, 4032), (1920, 1080))  # among the files that are checked
_TIMED = 4  # different pictures of a size


@dataclass
class Tally:
    """Counts and differences of the files of one process.

    Attributes:
        answers: files that the GPU decoded, damaged ones not counted.
        wrong: of these, the ones whose pixels are off by more than `MOST_OFF`, or `MEAN_OFF` in the mean.
        unlike: of these, the ones that differ from the first answer to the same file.
        left: files that the GPU left to the CPU though it could have read them.
        taken: files that it read though it should not have.
        most: largest difference of a pixel, in levels.
        mean: largest mean difference of a file.
    """

    answers: int = 0
    wrong: int = 0
    unlike: int = 0
    left: int = 0
    taken: int = 0
    most: int = 0
    mean: float = 0.0

    def add(self, other: Tally) -> None:
        """Count what another process saw."""
        self.most, self.mean = max(self.most, other.most), max(self.mean, other.mean)
        for name in ("answers", "wrong", "unlike", "left", "taken"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True)
class Corpus:
    """Files, and what the CPU reads in them.

    Attributes:
        pixels: of the files that the GPU should read; None is a damaged file, or one for the CPU.
        damaged: indices of files with broken image data.
    """

    files: list[bytes]
    pixels: list[NDArray[np.uint8] | None]
    damaged: frozenset[int]


def image_config(size: int) -> ImageConfig:
    """SigLIP's."""
    return ImageConfig(size=size, resample="bicubic", rescale=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3)


def make_corpus(options: argparse.Namespace) -> Corpus:
    """Plain JPEGs of all kinds, damaged ones, and some for the CPU."""
    rng = np.random.default_rng(options.seed)
    read = Preprocessor(image_config(options.size), "fast")
    files = [_draw(rng, index) for index in tqdm(range(options.pictures), "drawing", disable=None)]
    files += [synthetic_jpeg(*size) for size in _LARGE]
    pixels: list[NDArray[np.uint8] | None] = [read(data) for data in files]
    damaged = []
    for data in files[: options.damaged]:
        broken = bytearray(data)
        first = data.rindex(b"\xff\xda") + 20
        for place in rng.integers(first, len(data) - 2, 8):
            if 0xFF not in data[place - 1 : place + 2]:  # markers stay where they are
                broken[place] = int(rng.integers(0, 0xFF))
        damaged.append(len(files))
        files.append(bytes(broken))
        pixels.append(None)
    picture = _picture(rng, 200, 150)
    others = [_encode(picture, "PNG"), _encode(picture, progressive=True), b""]
    others += [files[0][: len(files[0]) // 2], files[0] * 2]
    return Corpus([*files, *others], [*pixels, *[None] * len(others)], frozenset(damaged))


def _draw(rng: np.random.Generator, index: int) -> bytes:
    if index % 4 == 0:  # sizes that several files share, as on a server
        width, height = [(500, 375), (375, 500), (640, 480), (224, 224)][index // 4 % 4]
    else:
        width, height = (int(16 * 2 ** rng.uniform(0, 6.2)) for _ in range(2))
    options: dict[str, Any] = {"quality": int(rng.integers(25, 99)), "optimize": bool(rng.random() < 0.3)}
    if rng.random() < 0.2:
        options["restart_marker_blocks"] = int(rng.integers(1, 20))
    sampling = _SAMPLINGS[rng.integers(len(_SAMPLINGS))]
    picture = _picture(rng, width, height)
    if sampling == "gray":
        return _encode(picture.convert("L"), **options)
    return _encode(picture, subsampling=sampling, **options)


def _picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    with Image.open(io.BytesIO(synthetic_jpeg(width, height, int(rng.integers(2**31))))) as image:
        return image.convert("RGB")


def _encode(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:  # noqa: A002 - Pillow's word
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def check(reader: GpuJpegReader, corpus: Corpus, calls: int, seed: int) -> Tally:
    """Read random mixes in `calls` calls."""
    rng = np.random.default_rng(seed)
    tally, first = Tally(), dict[int, tuple[NDArray[np.uint8], bool]]()
    for _ in range(calls):
        length = int(rng.integers(1, _LONGEST)) if rng.random() < 0.5 else int(rng.integers(1, 20))
        chosen = rng.integers(0, len(corpus.files), length)
        if rng.random() < 0.3:
            chosen[:] = chosen[0]
        elif rng.random() < 0.3:
            chosen = np.sort(chosen)
        for index, found in zip(chosen, reader([corpus.files[index] for index in chosen]), strict=True):
            expected = corpus.pixels[index]
            if expected is None:
                tally.taken += found is not None and index not in corpus.damaged
            elif found is None:
                tally.left += 1
            else:
                tally.answers += 1
                if index in first and np.array_equal(found.pixels, first[index][0]):
                    tally.wrong += not first[index][1]
                    continue
                tally.unlike += index in first
                close = _close(tally, found.pixels, expected)
                first.setdefault(index, (found.pixels.copy(), close))
                if not close and tally.wrong <= _SHOWN:
                    print(f"wrong: file {index}, {plain_frame(corpus.files[index])}", flush=True)
    return tally


def _close(tally: Tally, pixels: NDArray[np.uint8], expected: NDArray[np.uint8]) -> bool:
    difference = np.abs(pixels.astype(np.int16) - expected)
    most, mean = int(difference.max()), float(difference.mean())
    tally.most, tally.mean = max(tally.most, most), max(tally.mean, mean)
    close = most <= MOST_OFF and mean <= MEAN_OFF
    tally.wrong += not close
    return close


def keep_busy(device: str, stop: Any) -> None:
    """Large products, one after the other, as a tower computes while decoders run."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    while not stop.is_set():
        for _ in range(20):
            a = (a @ a).clamp_(-1, 1)
        torch.cuda.synchronize()


def work(
    options: argparse.Namespace, number: int, given: Corpus | list[bytes], shared: tuple[Any, Any]
) -> None:
    """One process: check a corpus, or be timed with calls of these files. The result goes to the queue."""
    results, ready = shared
    torch.set_num_threads(1)
    reader = GpuJpegReader(image_config(options.size), options.device, ImageLimits())
    if isinstance(given, Corpus):
        ready.wait()
        results.put(check(reader, given, options.calls, options.seed + number))
        return
    for _ in range(5):
        reader(given)
    ready.wait()
    images, cpu, begin = 0, time.process_time(), time.perf_counter()
    while time.perf_counter() < begin + options.seconds:
        images += sum(found is not None for found in reader(given))
    # A call of large files takes long: the last one ends later than was asked for.
    results.put((images, time.perf_counter() - begin, time.process_time() - cpu))


def run(options: argparse.Namespace, given: Corpus | list[bytes]) -> list[Any]:
    """The results of all processes."""
    context = multiprocessing.get_context("spawn")
    results, stop = context.Queue(), context.Event()
    shared = (results, context.Barrier(options.processes))
    workers = [
        context.Process(target=work, args=(options, number, given, shared))
        for number in range(options.processes)
    ]
    if isinstance(given, Corpus):
        workers.append(context.Process(target=keep_busy, args=(options.device, stop)))
    for worker in workers:
        worker.start()
    try:
        found = []
        for _ in tqdm(range(options.processes), "processes", disable=None):
            while results.empty():
                if any(worker.exitcode for worker in workers):
                    raise RuntimeError("a process died")
                time.sleep(0.05)
            found.append(results.get())
        return found
    finally:
        stop.set()
        for worker in workers:
            worker.join(timeout=20)
            worker.kill()


def checked(options: argparse.Namespace) -> tuple[Tally, dict[str, str]]:
    """All processes' answers, and the columns that tell of them."""
    total = Tally()
    for tally in run(options, make_corpus(options)):
        total.add(tally)
    columns = {name: str(value) for name, value in asdict(total).items()} | {"mean": f"{total.mean:.4f}"}
    return total, columns


def timed(options: argparse.Namespace, picture: str, batch: int) -> dict[str, str]:
    """The columns of a timing with calls of `batch` files."""
    found = run(options, [_timed_file(picture, number % _TIMED) for number in range(batch)])
    images = sum(images for images, _, _ in found)
    return {
        "picture": picture,
        "batch": str(batch),
        "images_per_second": f"{sum(images / seconds for images, seconds, _ in found):.1f}",
        "cpu_ms": f"{1000 * sum(cpu for _, _, cpu in found) / max(1, images):.3f}",
    }


@cache
def _timed_file(picture: str, seed: int) -> bytes:
    width, height = (int(side) for side in picture.split("x"))
    return synthetic_jpeg(width, height, seed)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--size", type=int, default=default_size(), help="side of the resized square, default %(default)s")
    add("--device", default="cuda:0", help="default %(default)s")
    add("--processes", type=int, default=4, help="readers at once, default %(default)s")
    add("--pictures", type=int, default=192, help="different plain files, default %(default)s")
    add("--damaged", type=int, default=24, help="further damaged files, default %(default)s")
    add("--calls", type=int, default=1000, help="mixes that each process reads, default %(default)s")
    add("--picture", nargs="+", default=["500x375"], help="timed sizes, width x height, default 500x375")
    add("--batches", type=int, nargs="+", default=[1, 8, 32, 64], help="files a call, default 1 8 32 64")
    add("--seconds", type=float, default=5, help="time for each of these, default %(default)s")
    add("--seed", type=int, default=0, help="default %(default)s")
    add("--output", type=Path, help="CSV file to append to, for example results/gpu_jpeg.csv")
    return parser.parse_args(arguments)


def main() -> None:
    """Check, time, print, append to a CSV if asked to. Exit with 1 if an answer was wrong."""
    options = parse()
    total, columns = checked(options)
    print(
        f"{total.answers} answers, {total.wrong} wrong, {total.unlike} unlike the first; "
        f"{total.left} left to the CPU, {total.taken} that were not for the GPU; "
        f"off by at most {total.most} levels, in the mean {total.mean:.4f}",
        flush=True,
    )
    named = about(["torch", "triton", "nvidia-nvjpeg"], torch.cuda.get_device_name(options.device))
    named |= {"size": str(options.size), "processes": str(options.processes), "calls": str(options.calls)}
    for picture, batch in product(options.picture, options.batches):
        row = {**named, **columns, **timed(options, picture, batch)}
        print(
            f"{picture}, {batch:>3} a call: {row['images_per_second']:>9} images/s, "
            f"{row['cpu_ms']} ms CPU an image",
            flush=True,
        )
        if options.output:
            write_csv(options.output, [row], append=True)
    # A picture that ends near black may rightly be left to the CPU; many cannot be.
    if total.wrong or total.taken or total.left > total.answers // 100:
        sys.exit(1)


if __name__ == "__main__":
    main()
