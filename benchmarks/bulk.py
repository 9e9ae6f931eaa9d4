"""`siglip-serve bulk` against its own engine in process, and against transformers with a DataLoader.

Pictures are synthetic photographs in tar archives. The rate of a job is that of its workers, from their first
unit to their last, without the start. Fidelity is the cosine with transformers in float32, whose pixels come
from its own image processor.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from benchmarks.inputs import synthetic_jpeg
from benchmarks.records import about, cosine, gpu_names, write_csv
from siglip_serve.config import Dtype, PreprocessMode
from siglip_serve.machine import available_cores

_DISTINCT = 64  # pictures; the archives repeat them
_COMPARED = 32
_BATCH = 32  # of the DataLoader
_PACKAGES = ["torch", "transformers", "numpy", "pyarrow"]


def write_tars(folder: Path, pictures: int, per_tar: int, size: tuple[int, int]) -> list[Path]:
    """Write archives of pictures."""
    files = [synthetic_jpeg(*size, seed) for seed in range(_DISTINCT)]
    tars = []
    for start in range(0, pictures, per_tar):
        tars.append(folder / f"{start:08}.tar")
        with tarfile.open(tars[-1], "w") as archive:
            for number in range(start, min(start + per_tar, pictures)):
                data = files[number % _DISTINCT]
                member = tarfile.TarInfo(f"{number:08}.jpg")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return tars


def bulk_command(inputs: Sequence[Path], output: Path, checkpoint: Path, device: str) -> list[str]:
    """The words that run a job with this interpreter."""
    program = "from siglip_serve_client.commands.main import main; raise SystemExit(main())"
    words = [sys.executable, "-c", program, "bulk", *map(str, inputs), "-o", str(output)]
    return [*words, "--checkpoint", str(checkpoint), "--device", device]


def child_environment() -> dict[str, str]:
    """Variables of a process that imports from where this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def run_bulk(options: argparse.Namespace, tars: list[Path], output: Path) -> dict[str, Any]:
    """The last line of progress of a job, and the seconds of the whole command."""
    words = [*bulk_command(tars, output, options.checkpoint, options.device), "--dtype", options.dtype]
    words += ["--preprocess", options.preprocess, "--progress", "json", "--decoders", str(options.decoders)]
    begin = time.perf_counter()
    done = subprocess.run(words, env=child_environment(), stdout=subprocess.PIPE, text=True, check=True)
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**last, "command_seconds": time.perf_counter() - begin}


def engine_rate(options: argparse.Namespace, device: str) -> float:
    """Images per second of the engine in a process of its own, over pixels in memory."""
    program = "import sys; from benchmarks.bulk import measure_engine; measure_engine(sys.argv[1:])"
    words = [
        sys.executable,
        "-c",
        program,
        str(options.checkpoint),
        device,
        options.dtype,
        str(options.seconds),
    ]
    return float(
        subprocess.run(words, env=child_environment(), stdout=subprocess.PIPE, text=True, check=True).stdout
    )


def measure_engine(arguments: list[str]) -> None:
    """Program of the process of `engine_rate`: checkpoint, device, dtype and seconds."""
    from siglip_serve.bulk.job import Job
    from siglip_serve.bulk.tower import Towers
    from siglip_serve.config import Settings

    checkpoint, device, dtype, seconds = arguments
    job = Job(Settings(checkpoint=checkpoint, dtype=dtype), "")  # type: ignore[arg-type]
    config = job.load_config()
    with redirect_stdout(sys.stderr):
        towers = Towers(job, config, device, available_cores())
    rows, side = towers.batch_rows, config.image.size
    pixels = np.random.default_rng(0).integers(0, 256, (rows, side, side, 3), dtype=np.uint8)
    sizes = [(side, side)] * rows
    towers.embed_images(pixels, sizes)
    rates: list[float] = []
    end = time.perf_counter() + float(seconds)
    while time.perf_counter() < end or len(rates) < 3:
        begin = time.perf_counter()
        towers.embed_images(pixels, sizes)
        rates.append(rows / (time.perf_counter() - begin))
    print(statistics.median(rates))


def loop_with_transformers(options: argparse.Namespace, tars: list[Path]) -> float:
    """Images per second of a loop over a DataLoader, its workers' start not counted."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import AutoImageProcessor, AutoModel

    model = (
        AutoModel.from_pretrained(options.checkpoint, dtype=_torch_dtype(options)).eval().to(options.device)
    )
    processor = AutoImageProcessor.from_pretrained(options.checkpoint)
    loader = DataLoader(
        _images(tars, processor), batch_size=_BATCH, num_workers=max(1, available_cores() // 2)
    )
    done, begin = 0, 0.0
    with torch.inference_mode():
        for batch in loader:
            begin = begin or time.perf_counter()
            pixels = batch.to(options.device, model.dtype)
            model.get_image_features(pixel_values=pixels).pooler_output.float().cpu()
            done += len(batch)
    return done / (time.perf_counter() - begin)


def _torch_dtype(options: argparse.Namespace) -> Any:
    import torch

    from siglip_serve.engine.plan import fastest_dtype

    wanted = fastest_dtype(9 if options.device == "cuda" else None)
    return getattr(torch, wanted if options.dtype in ("auto", "float8", "int8") else options.dtype)


def _images(tars: list[Path], processor: Any) -> Any:
    """A data set of the pixel values of the pictures in archives, shared among the workers of a loader."""
    from PIL import Image
    from torch.utils.data import IterableDataset, get_worker_info

    class Images(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Any]:
            worker = get_worker_info()
            number, count = (worker.id, worker.num_workers) if worker else (0, 1)
            for tar in tars[number::count]:
                with tarfile.open(tar) as archive:
                    for member in archive:
                        file = archive.extractfile(member)
                        image = Image.open(io.BytesIO(file.read() if file else b"")).convert("RGB")
                        yield processor(image, return_tensors="pt")["pixel_values"][0]

    return Images()


def fidelity(options: argparse.Namespace, output: Path, size: tuple[int, int]) -> tuple[float, float]:
    """Least and mean cosine of stored embeddings with transformers in float32."""
    import torch
    from PIL import Image
    from pyarrow import parquet
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(options.checkpoint, dtype=torch.float32).eval().to(options.device)
    processor = AutoImageProcessor.from_pretrained(options.checkpoint)
    first = sorted((output / "embeddings").glob("*.parquet"))[0]
    table = parquet.read_table(first)
    names = [Path(name).stem for name in table["id"].to_pylist()][:_COMPARED]
    ours = np.stack(table["embedding"].to_numpy()[: len(names)]).astype(np.float32)
    images = [Image.open(io.BytesIO(synthetic_jpeg(*size, int(name) % _DISTINCT))) for name in names]
    with torch.inference_mode():
        inputs = processor(images, return_tensors="pt").to(options.device)
        theirs: NDArray[np.float32] = model.get_image_features(**inputs).pooler_output.cpu().numpy()
    found = cosine(ours, theirs)
    return float(found.min()), float(found.mean())


def measure(options: argparse.Namespace) -> dict[str, str]:
    """One row of the table."""
    width, height = (int(side) for side in options.size.split("x"))
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        tars = write_tars(Path(scratch), options.pictures, options.per_tar, (width, height))
        job = run_bulk(options, tars, Path(scratch, "output"))
        least, mean = fidelity(options, Path(scratch, "output"), (width, height))
        loops = [loop_with_transformers(options, tars)] if "transformers" in options.against else []
    devices = job["devices"]
    rate = sum(values["pictures"] / values["seconds"] for values in devices.values())
    row = {
        **about(_PACKAGES, " + ".join(gpu_names()) if options.device == "cuda" else None),
        "checkpoint": options.checkpoint.name,
        "size": options.size,
        "pictures": str(options.pictures),
        "dtype": options.dtype,
        "preprocess": options.preprocess,
        "devices": str(len(devices)),
        "cores": str(available_cores()),
        "images_per_second": f"{rate:.1f}",
        "slowest": job["slowest"],
        **{
            f"{stage}_busy": f"{statistics.mean(values[stage] for values in devices.values()):.2f}"
            for stage in ("read", "decode", "embed", "write")
        },
        "seconds_of_command": f"{job['command_seconds']:.1f}",
        "engine_images_per_second": "",
        "engine_ratio": "",
        "transformers_images_per_second": "",
        "transformers_ratio": "",
        "cosine_min": f"{least:.6f}",
        "cosine_mean": f"{mean:.6f}",
    }
    if "engine" in options.against:
        alone = engine_rate(options, "cuda:0" if options.device == "cuda" else "cpu") * len(devices)
        row |= {"engine_images_per_second": f"{alone:.1f}", "engine_ratio": f"{rate / alone:.3f}"}
    for loop in loops:
        row |= {"transformers_images_per_second": f"{loop:.1f}", "transformers_ratio": f"{rate / loop:.2f}"}
    return row


def main() -> None:
    """Measure, print, and write CSV if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="directory in the Hugging Face layout")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="auto")
    parser.add_argument("--preprocess", choices=get_args(PreprocessMode), default="fast")
    parser.add_argument("--decoders", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=400, help="default %(default)s")
    parser.add_argument("--per-tar", type=int, default=100, help="default %(default)s")
    parser.add_argument("--size", default="500x375", help="of the pictures, default %(default)s")
    parser.add_argument("--against", nargs="*", choices=["engine", "transformers"], default=["engine"])
    parser.add_argument("--seconds", type=float, default=10, help="of the engine alone, default %(default)s")
    parser.add_argument("--folder", help="where the archives are written, default: that of temporary files")
    parser.add_argument("--output", type=Path, help="CSV file to append to")
    options = parser.parse_args()
    row = measure(options)
    print({key: row[key] for key in list(row)[-20:]}, flush=True)
    if options.output:
        write_csv(options.output, [row], append=True)


if __name__ == "__main__":
    main()
