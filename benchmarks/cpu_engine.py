"""The CPU engine: OpenVINO against packed torch and transformers, and what int8 costs in accuracy.

`speed`: random weights at base/16@224. All ways alternate, so that a busy machine slows all alike. Cosines
are against transformers in float32. `accuracy`: zero-shot top-1 of a checkpoint in float32, bfloat16 and
int8. int8 is calibrated on pictures of DATA/train, and pictures of DATA/valid are embedded.

On a busy machine the CPU time of a way tells more than its wall time: `cpu_ms_per_image` and its ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from benchmarks.records import about, cosine, publish
from benchmarks.vision_tower import engine, reference
from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.files import resolve
from siglip_serve.checkpoint.model_config import ImageConfig
from siglip_serve.config import Backend, Dtype
from siglip_serve.embeddings import zero_shot
from siglip_serve.engine.engines import TextEngine, VisionEngine
from siglip_serve.engine.plan import Plan
from siglip_serve.images.preprocess import Preprocessor
from siglip_serve.machine import available_cores
from siglip_serve.texts.tokenizer import load_tokenizer
from siglip_serve.towers.siglip import load_text, load_vision

# As the server sets it, before the first parallel region: threads that spin burn CPU time while they wait.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

GEOMETRY = "base/16@224"
OURS: list[tuple[Backend, Dtype]] = [
    ("torch", "float32"),
    ("torch", "bfloat16"),
    ("openvino", "float32"),
    ("openvino", "bfloat16"),
    ("openvino", "int8"),
]
PACKAGES = ["torch", "transformers", "openvino", "nncf", "numpy"]
CHUNK = 512
Pixels = NDArray[np.uint8]


def pictures(folder: Path, image: ImageConfig, most: int) -> tuple[Pixels, list[str]]:
    """At most `most` pictures evenly drawn from `folder`'s subfolders, and those subfolders' names."""
    files = sorted(file for file in folder.glob("*/*") if file.is_file())
    files = files[:: max(1, len(files) // most)][:most]
    preprocess = Preprocessor(image)
    read = [preprocess(file.read_bytes()) for file in tqdm(files, desc=folder.name, unit="picture")]
    return np.stack(read), [file.parent.name for file in files]


Times = list[tuple[float, float]]


def in_turns(ways: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Times]:
    """Wall and CPU seconds of each call, at least five of each way."""
    times: dict[str, Times] = {name: [] for name in ways}
    for way in ways.values():
        way()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, way in ways.items():
            start, used = time.perf_counter(), time.process_time()
            way()
            times[name].append((time.perf_counter() - start, time.process_time() - used))
    return times


def load(model: Any, plan: Plan, pixels: Pixels) -> tuple[VisionEngine, float]:
    """An engine that has answered once, and the seconds until then from a tower in memory."""
    start = time.perf_counter()
    ours = engine(model, plan)
    ours(pixels[:1])
    return ours, time.perf_counter() - start


@torch.inference_mode()
def theirs(model: Any, inputs: Tensor) -> NDArray[np.float32]:
    """transformers' pooled embeddings, computed in the model's dtype."""
    found: NDArray[np.float32] = model(inputs.to(model.dtype)).pooler_output.float().numpy()
    return found


def embed(ours: VisionEngine, pixels: Pixels) -> NDArray[np.float32]:
    """Our pooled embeddings."""
    return ours(pixels).outputs["EMBEDDING"]


def speed(options: argparse.Namespace, cache: Path) -> list[dict[str, str]]:
    """One row for each number of rows and way."""
    model, rough = reference(GEOMETRY), reference(GEOMETRY).to(torch.bfloat16)
    size = model.config.image_size
    image = ImageConfig(size, "bicubic", 1 / 255, (0.5,) * 3, (0.5,) * 3)
    pixels, _ = pictures(options.data / "valid", image, max(options.rows))
    inputs = (torch.from_numpy(pixels).permute(0, 3, 1, 2) * (1 / 255) - 0.5) / 0.5
    engines: dict[str, VisionEngine] = {}
    loads: dict[str, tuple[float, float]] = {}
    for backend, dtype in OURS:
        if options.only and not any(word in f"{backend} {dtype}" for word in options.only):
            continue
        plan = Plan("cpu", dtype, backend, 0, available_cores(), cache, options.data / "train")
        _, cold = load(model, plan, pixels)
        engines[f"{backend} {dtype}"], again = load(model, plan, pixels)
        loads[f"{backend} {dtype}"] = cold, again
    table = []
    for rows in options.rows:
        ways: dict[str, Callable[[], NDArray[np.float32]]] = {
            "transformers float32": partial(theirs, model, inputs[:rows]),
            "transformers bfloat16": partial(theirs, rough, inputs[:rows]),
            **{name: partial(embed, ours, pixels[:rows]) for name, ours in engines.items()},
        }
        exact = ways["transformers float32"]()
        near = {name: cosine(way(), exact) for name, way in ways.items()}
        table += compare(in_turns(ways, options.seconds), rows, near, loads)
    return table


def compare(
    times: dict[str, Times],
    rows: int,
    near: dict[str, NDArray[np.float32]],
    loads: dict[str, tuple[float, float]],
) -> list[dict[str, str]]:
    """One row for each way."""
    wall = {name: statistics.median(seconds for seconds, _ in found) for name, found in times.items()}
    cpu = {name: statistics.median(seconds for _, seconds in found) for name, found in times.items()}
    theirs = [name for name in times if name.startswith("transformers")]
    return [
        {
            **about(PACKAGES),
            "geometry": GEOMETRY,
            "way": name,
            "rows": str(rows),
            "cores": str(available_cores()),
            "load_average": f"{os.getloadavg()[0]:.1f}",
            "images_per_second": f"{rows / wall[name]:.2f}",
            "best_images_per_second": f"{rows / min(found)[0]:.2f}",
            "ratio_to_fastest_transformers": f"{min(wall[one] for one in theirs) / wall[name]:.2f}",
            "cpu_ms_per_image": f"{1000 * cpu[name] / rows:.1f}",
            "cpu_ratio_to_fastest_transformers": f"{min(cpu[one] for one in theirs) / cpu[name]:.2f}",
            "cosine_mean": f"{near[name].mean():.7f}",
            "cosine_min": f"{near[name].min():.7f}",
            "load_seconds": f"{loads[name][0]:.2f}" if name in loads else "",
            "load_again_seconds": f"{loads[name][1]:.2f}" if name in loads else "",
        }
        for name, found in times.items()
    ]


def class_embeddings(path: Path, plan: Plan, names: Sequence[str]) -> NDArray[Any]:
    """[classes, P] of `a photo of a {name}.`"""
    config = load_config(path)
    tokenizer, text = load_tokenizer(config), TextEngine(load_text(path), plan)
    ids = np.stack([tokenizer(f"a photo of a {name}.", True) for name in names])
    found: NDArray[Any] = zero_shot.build_class_embeddings(text(ids).outputs["EMBEDDING"][:, None])
    return found


def accuracy(options: argparse.Namespace, cache: Path) -> list[dict[str, str]]:
    """One row for each dtype."""
    path = resolve(options.checkpoint)
    config = load_config(path)
    lines = (options.data / "LOC_synset_mapping.txt").read_text(encoding="utf-8").splitlines()
    synsets, names = zip(*(line.split(" ", 1) for line in lines), strict=True)
    pixels, folders = pictures(options.data / "valid", config.image, options.pictures)
    labels = np.array([synsets.index(folder) for folder in folders])
    exact, table, top1 = None, [], {}
    dtypes: list[Dtype] = ["float32", "bfloat16", "int8"]
    for dtype in dtypes:
        plan = Plan("cpu", dtype, "openvino", 0, available_cores(), cache, options.data / "train")
        ours = VisionEngine(load_vision(path), config.image, plan)
        classes = class_embeddings(path, plan, [name.split(",")[0] for name in names])
        start = time.perf_counter()
        chunks = range(0, len(pixels), CHUNK)
        found = [ours(pixels[n : n + CHUNK]).outputs["EMBEDDING"] for n in tqdm(chunks, desc=dtype)]
        seconds = time.perf_counter() - start
        embeddings = np.concatenate(found)
        exact = embeddings if exact is None else exact
        best = zero_shot.top_k(zero_shot.cosine(embeddings, classes), 1)[:, 0]
        top1[dtype] = float((best == labels).mean())
        near = cosine(embeddings, exact)
        table.append(
            {
                **about(PACKAGES),
                "checkpoint": path.name,
                "dtype": dtype,
                "pictures": str(len(pixels)),
                "top1": f"{top1[dtype]:.4f}",
                "points_to_float32": f"{100 * (top1[dtype] - top1['float32']):+.2f}",
                "cosine_mean": f"{near.mean():.6f}",
                "cosine_min": f"{near.min():.6f}",
                "images_per_second": f"{len(pixels) / seconds:.1f}",
            }
        )
    return table


def main() -> None:
    """Measure, print, and write CSV if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("question", choices=["speed", "accuracy"])
    add("--data", type=Path, required=True, help="pictures in ImageNet's layout: train, valid, mapping")
    add("--only", nargs="+", help="for speed, words of which the name of a way of ours must have one")
    add("--rows", type=int, nargs="+", default=[8, 1], help="images in one batch, default 8 1")
    add("--seconds", type=float, default=60, help="time for each number of rows, default %(default)s")
    add("--checkpoint", default="checkpoints/siglip-tiny", help="for accuracy, default %(default)s")
    add("--pictures", type=int, default=20_000, help="for accuracy, at most; default %(default)s")
    add("--cache", type=Path, help="folder for the int8 model; default: a new one, removed at the end")
    add("--output", type=Path, help="CSV file to write")
    options = parser.parse_args()
    torch.set_num_threads(available_cores())
    with tempfile.TemporaryDirectory(prefix="cpu-engine-") as cache:
        measure = speed if options.question == "speed" else accuracy
        table = measure(options, options.cache or Path(cache))
    publish(table, PACKAGES, options.output, append=False)


if __name__ == "__main__":
    main()
