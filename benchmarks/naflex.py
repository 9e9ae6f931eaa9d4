"""SigLIP 2 NaFlex on a CPU: equal to transformers, how much is padding, and how fast beside one size.

Pictures of aspect 1:8 to 8:1, random weights, float32. All ways take the same pictures batch by batch and
alternate, so that a busy machine slows all alike. `ours` and `transformers` keep the aspect ratio. The others
are SigLIP of the same width, which stretches pictures to a square of as many patches. Pictures lie in memory,
resized and cut. The columns of fidelity are those of `ours`.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import (
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from benchmarks.inputs import GEOMETRIES, synthetic_jpeg
from benchmarks.records import about, cosine, write_csv
from benchmarks.vision_tower import engine
from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.model_config import ImageConfig, NaflexImageConfig
from siglip_serve.config import Backend
from siglip_serve.engine.engines import NaflexEngine, TextEngine
from siglip_serve.engine.patches import PatchRows, group_rows
from siglip_serve.engine.plan import Plan
from siglip_serve.images.patches import cut_patches, patch_grid
from siglip_serve.images.resize import fit
from siglip_serve.machine import available_cores
from siglip_serve.towers.load import load_text
from siglip_serve.towers.naflex import load_vision

# As the server sets it, before the first parallel region: threads that spin burn CPU time while they wait.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

PACKAGES = ["torch", "transformers", "openvino", "numpy"]
WIDTHS: dict[str, dict[str, int]] = {
    "narrow": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4},
    "base/16": {name: value for name, value in GEOMETRIES["base/16@224"].items() if name != "image_size"},
}
SIDE, PATCH = 256, 16
MOST = (SIDE // PATCH) ** 2
LARGEST = 8.0  # aspect ratio
TEXTS = 20
BACKENDS: tuple[Backend, ...] = ("torch", "openvino")
Embed = Callable[[slice], NDArray[np.float32]]


def make_model(width: str) -> Siglip2Model:
    """transformers' model with random weights and logits."""
    torch.manual_seed(0)
    config = Siglip2Config(vision_config=WIDTHS[width], text_config=WIDTHS[width])
    return Siglip2Model(config).eval()


def make_square(width: str) -> SiglipVisionModel:
    """transformers' SigLIP of the same width, for squares of as many patches."""
    torch.manual_seed(0)
    return SiglipVisionModel(SiglipVisionConfig(**WIDTHS[width], image_size=SIDE)).eval()


class Pictures:
    """Pictures of all aspect ratios, as each of the towers takes them, in an order without a pattern."""

    def __init__(self, count: int, naflex: NaflexImageConfig) -> None:
        aspects = np.exp(np.linspace(-np.log(LARGEST), np.log(LARGEST), count))
        np.random.default_rng(0).shuffle(aspects)
        shapes = [(round(400 * aspect**0.5), round(400 * aspect**-0.5)) for aspect in aspects.tolist()]
        files = [synthetic_jpeg(width, height, seed) for seed, (width, height) in enumerate(shapes)]
        pictures = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
        pixels = [np.asarray(picture) for picture in pictures]
        grids = np.array([patch_grid(naflex, *one.shape[:2]) for one in pixels])
        self.rows = PatchRows(np.stack([cut_patches(one, naflex, "pil") for one in pixels]), grids)
        square = ImageConfig(SIDE, naflex.resample, naflex.rescale, naflex.mean, naflex.std)
        self.squares = np.stack([fit(one, square, "pil") for one in pixels])
        processor = Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=naflex.max_patches)
        self.theirs: Mapping[str, torch.Tensor] = processor(pictures, return_tensors="pt")


@torch.inference_mode()
def ask_reference(model: Siglip2Model, pictures: Pictures, part: slice) -> NDArray[np.float32]:
    """transformers' pooled embeddings, each picture padded to the most patches."""
    inputs = {name: tensor[part] for name, tensor in pictures.theirs.items()}
    found: NDArray[np.float32] = model.vision_model(**inputs).pooler_output.numpy()
    return found


def ask_ours(ours: NaflexEngine, pictures: Pictures, part: slice) -> NDArray[np.float32]:
    """Our pooled embeddings."""
    return ours(pictures.rows[part]).outputs["EMBEDDING"]


def in_turns(ways: Mapping[str, Embed], count: int, batch: int) -> dict[str, tuple[float, float]]:
    """Wall and CPU seconds of each way for all pictures, in batches."""
    times = dict.fromkeys(ways, (0.0, 0.0))
    for way in ways.values():
        way(slice(0, min(batch, 4)))
    for first in range(0, count, batch):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            way(slice(first, first + batch))
            before = times[name]
            times[name] = before[0] + time.perf_counter() - wall, before[1] + time.process_time() - cpu
    return times


def padding(counts: NDArray[np.int64], most: int) -> float:
    """Share of the computed tokens that is padding."""
    computed = sum(len(group) * int(counts[group].max()) for group in group_rows(counts, most))
    return 1 - float(counts.sum()) / computed


@torch.inference_mode()
def text_cosine(model: Siglip2Model, path: Path) -> float:
    """Smallest cosine of our text embeddings to transformers'."""
    config = model.config.text_config
    shape = TEXTS, config.max_position_embeddings
    ids = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    expected = model.text_model(torch.from_numpy(ids)).pooler_output.numpy()
    ours = TextEngine(load_text(path), Plan("cpu", "float32", threads=available_cores()))
    return float(cosine(ours(ids).outputs["EMBEDDING"], expected).min())


def measure(width: str, options: argparse.Namespace) -> list[dict[str, str]]:
    """One row for each way."""
    model, plan = make_model(width), Plan("cpu", "float32", "torch", threads=available_cores())
    with tempfile.TemporaryDirectory(prefix="naflex-") as folder:
        model.save_pretrained(folder)
        config = load_config(Path(folder))
        assert isinstance(config.image, NaflexImageConfig)
        texts = text_cosine(model, Path(folder))
        ours = NaflexEngine(load_vision(Path(folder)), config.image, plan)
    pictures, square = Pictures(options.pictures, config.image), make_square(width)
    ways: dict[str, Embed] = {
        "ours": partial(ask_ours, ours, pictures),
        "transformers": partial(ask_reference, model, pictures),
    }
    for backend in BACKENDS:
        fixed = engine(square, Plan("cpu", "float32", backend, threads=available_cores()))
        ways[f"square, {backend}"] = partial(_squares, fixed, pictures)
    times = in_turns(ways, options.pictures, options.batch)
    everything = slice(0, options.pictures)
    together = ways["ours"](everything)
    alone = np.concatenate([ways["ours"](slice(n, n + 1)) for n in range(options.pictures)])
    chunks = [slice(n, n + 8) for n in range(0, options.pictures, 8)]
    expected = np.concatenate([ways["transformers"](chunk) for chunk in chunks])
    fidelity = {
        "difference_to_transformers": f"{np.abs(together - expected).max():.1e}",
        "difference_one_by_one": f"{np.abs(together - alone).max():.1e}",
        "image_cosine_min": f"{cosine(together, expected).min():.8f}",
        "text_cosine_min": f"{texts:.8f}",
    }
    counts = pictures.rows.counts
    waste = {
        "ours": padding(counts, ours.runner.max_rows),
        "transformers": 1 - float(counts.mean()) / MOST,
    }
    return [
        {
            **about(PACKAGES),
            "width": width,
            "way": name,
            "pictures": str(options.pictures),
            "batch": str(options.batch),
            "cores": str(available_cores()),
            "padding": f"{waste.get(name, 0):.4f}",
            "images_per_second": f"{options.pictures / wall:.2f}",
            "cpu_ms_per_image": f"{1000 * cpu / options.pictures:.1f}",
            **(fidelity if name == "ours" else dict.fromkeys(fidelity, "")),
        }
        for name, (wall, cpu) in times.items()
    ]


def _squares(fixed: Any, pictures: Pictures, part: slice) -> NDArray[np.float32]:
    found: NDArray[np.float32] = fixed(pictures.squares[part]).outputs["EMBEDDING"]
    return found


def main() -> None:
    """Measure, print, and write CSV if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--width", choices=WIDTHS, nargs="+", default=list(WIDTHS), help="default: all")
    add("--pictures", type=int, default=200, help="default %(default)s")
    add("--batch", type=int, default=40, help="pictures of one call while time is taken, default %(default)s")
    add("--output", type=Path, help="CSV file to append to")
    options = parser.parse_args()
    torch.set_num_threads(available_cores())
    table = [row for width in options.width for row in measure(width, options)]
    for row in table:
        print({key: row[key] for key in list(row)[len(about(PACKAGES)) :]}, flush=True)
    if options.output:
        write_csv(options.output, table, append=True)


if __name__ == "__main__":
    main()
