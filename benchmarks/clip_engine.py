"""CLIP's towers on a CPU: OpenVINO against packed torch and transformers, images and texts.

Random weights at published geometries. All ways alternate, so that a busy machine slows all alike. Cosines
are against transformers in float32.

Texts have 6 tokens to `--longest`, start and end included. `whole` runs an engine's tower on all 77 tokens,
as before texts were shortened. transformers gets texts that are padded to the longest of the batch only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CLIPConfig, CLIPModel

from benchmarks.cpu_engine import Times, in_turns
from benchmarks.records import about, cosine, publish
from siglip_serve.checkpoint.config import load_config
from siglip_serve.config import Backend, Dtype
from siglip_serve.engine.engines import TextEngine, VisionEngine
from siglip_serve.engine.plan import Plan
from siglip_serve.machine import available_cores
from siglip_serve.towers.load import load_text, load_vision

PACKAGES = ["torch", "transformers", "openvino", "numpy"]
# Width, layers, heads and patch of the image tower, width and heads of the text tower, joint space.
GEOMETRIES = {
    "ViT-B/32": (768, 12, 12, 32, 512, 8, 512),
    "ViT-B/16": (768, 12, 12, 16, 512, 8, 512),
    "ViT-L/14": (1024, 24, 16, 14, 768, 12, 768),
    "tiny": (64, 2, 4, 56, 48, 4, 32),  # to try a script
}
SIDE, CONTEXT, START, END = 224, 77, 49406, 49407
SHORTEST = 6
IMAGES, TEXTS = 8, 32  # rows of a batch, which are those of a pass
OURS: list[tuple[Backend, Dtype]] = [
    ("torch", "float32"),
    ("torch", "bfloat16"),
    ("openvino", "float32"),
    ("openvino", "bfloat16"),
]
Way = Callable[[], NDArray[np.float32]]


def random_clip(geometry: str, activation: str = "quick_gelu") -> CLIPModel:
    """transformers' model with random weights."""
    width, layers, heads, patch, text_width, text_heads, joint = GEOMETRIES[geometry]
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "patch_size": patch,
        "image_size": SIDE,
        "hidden_act": activation,
        "projection_dim": joint,  # of a tower that is loaded alone
    }
    text = {
        "hidden_size": text_width,
        "intermediate_size": 4 * text_width,
        "num_attention_heads": text_heads,
        "hidden_act": activation,
        "projection_dim": joint,
        "bos_token_id": START,
        "eos_token_id": END,
    }
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=joint)).eval()


def save(model: CLIPModel, path: Path) -> None:
    """Write the checkpoint that our engines load."""
    model.save_pretrained(path)
    square = {"height": SIDE, "width": SIDE}
    images = {"size": {"shortest_edge": SIDE}, "crop_size": square, "resample": 3}
    (path / "preprocessor_config.json").write_text(json.dumps(images), encoding="utf-8")


def draw_texts(longest: int, rows: int = TEXTS) -> NDArray[np.int64]:
    """Ids [rows, CONTEXT] of texts whose lengths are uniform, padded with the end token as CLIP's are."""
    rng = np.random.default_rng(0)
    ids = np.full((rows, CONTEXT), END)
    ids[:, 0] = START
    for row, length in enumerate(rng.integers(SHORTEST, longest + 1, rows)):
        ids[row, 1 : length - 1] = rng.integers(0, START, length - 2)
    return ids


@torch.inference_mode()
def embed_images(model: CLIPModel, pixels: torch.Tensor) -> NDArray[np.float32]:
    """transformers' embeddings of normalised pixels, computed in the model's dtype."""
    found: NDArray[np.float32] = (
        model.get_image_features(pixels.to(model.dtype)).pooler_output.float().numpy()
    )
    return found


@torch.inference_mode()
def embed_texts(model: CLIPModel, ids: torch.Tensor) -> NDArray[np.float32]:
    """transformers' embeddings of texts that are padded to the longest."""
    longest = int((ids == END).int().argmax(1).max()) + 1
    ids = ids[:, :longest]
    mask = (torch.arange(longest) <= (ids == END).int().argmax(1)[:, None]).long()
    found: NDArray[np.float32] = (
        model.get_text_features(ids, attention_mask=mask).pooler_output.float().numpy()
    )
    return found


def image_ways(path: Path, model: CLIPModel, rough: CLIPModel) -> dict[str, Way]:
    """Ways to embed a batch of random pixels."""
    config = load_config(path)
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8)
    mean, std = (torch.tensor(values) for values in (config.image.mean, config.image.std))
    inputs = ((torch.from_numpy(pixels) * config.image.rescale - mean) / std).permute(0, 3, 1, 2)
    ways: dict[str, Way] = {
        "transformers float32": partial(embed_images, model, inputs),
        "transformers bfloat16": partial(embed_images, rough, inputs),
    }
    for backend, dtype in OURS:
        engine = VisionEngine(load_vision(path), config.image, Plan("cpu", dtype, backend))
        ways[f"{backend} {dtype}"] = lambda engine=engine: engine(pixels).outputs["EMBEDDING"]  # type: ignore[misc]
    return ways


def text_ways(path: Path, model: CLIPModel, rough: CLIPModel, longest: int) -> dict[str, Way]:
    """Ways to embed a batch of texts."""
    ids = draw_texts(longest)
    inputs = torch.from_numpy(ids)
    ways: dict[str, Way] = {
        "transformers float32": partial(embed_texts, model, inputs),
        "transformers bfloat16": partial(embed_texts, rough, inputs),
    }
    for backend, dtype in OURS:
        engine = TextEngine(load_text(path), Plan("cpu", dtype, backend))
        ways[f"{backend} {dtype}"] = lambda engine=engine: engine(ids).outputs["EMBEDDING"]  # type: ignore[misc]
        ways[f"{backend} {dtype}, whole"] = lambda engine=engine: (  # type: ignore[misc]
            engine.runner(ids, ["EMBEDDING"])()["EMBEDDING"]
        )
    return ways


def compare(columns: dict[str, str], rows: int, ways: dict[str, Way], seconds: float) -> list[dict[str, str]]:
    """One row for each way."""
    exact = ways["transformers float32"]()
    near = {name: float(cosine(way(), exact).min()) for name, way in ways.items()}
    times: dict[str, Times] = in_turns(ways, seconds)
    wall = {name: statistics.median(one for one, _ in found) for name, found in times.items()}
    cpu = {name: statistics.median(one for _, one in found) for name, found in times.items()}
    theirs = [name for name in ways if name.startswith("transformers")]
    return [
        {
            **about(PACKAGES),
            **columns,
            "way": name,
            "rows": str(rows),
            "cores": str(available_cores()),
            "load_average": f"{os.getloadavg()[0]:.1f}",
            "per_second": f"{rows / wall[name]:.2f}",
            "best_per_second": f"{rows / min(found)[0]:.2f}",
            "ratio_to_fastest_transformers": f"{min(wall[one] for one in theirs) / wall[name]:.2f}",
            "cpu_ms": f"{1000 * cpu[name] / rows:.2f}",
            "cpu_ratio_to_fastest_transformers": f"{min(cpu[one] for one in theirs) / cpu[name]:.2f}",
            "cosine_min": f"{near[name]:.7f}",
        }
        for name, found in times.items()
    ]


def main() -> None:
    """Measure, print, and add to the CSV if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--geometry", choices=GEOMETRIES, default="ViT-B/32", help="default %(default)s")
    add("--tower", choices=["image", "text"], nargs="+", default=["image", "text"], help="default both")
    add("--longest", type=int, nargs="+", default=[20, CONTEXT], help="tokens of texts, default 20 77")
    add("--seconds", type=float, default=60, help="time for each table, default %(default)s")
    add("--output", type=Path, help="CSV file to add to")
    options = parser.parse_args()
    torch.set_num_threads(available_cores())
    table = []
    model = random_clip(options.geometry)
    with tempfile.TemporaryDirectory(prefix="clip-engine-") as folder:
        save(model, Path(folder))
        rough = CLIPModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
        about_images = {"geometry": options.geometry, "tower": "image", "longest": ""}
        if "image" in options.tower:
            ways = image_ways(Path(folder), model, rough)
            table += compare(about_images, IMAGES, ways, options.seconds)
        for longest in options.longest if "text" in options.tower else []:
            ways = text_ways(Path(folder), model, rough, longest)
            columns = {**about_images, "tower": "text", "longest": str(longest)}
            table += compare(columns, TEXTS, ways, options.seconds)
    publish(table, PACKAGES, options.output)


if __name__ == "__main__":
    main()
