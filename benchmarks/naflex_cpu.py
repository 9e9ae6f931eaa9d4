"""Ways to embed pictures with NaFlex on a CPU: transformers, our backends, and towers for squares."""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

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

from benchmarks.inputs import synthetic_jpeg
from benchmarks.naflex_ways import MOST, PATCH, SIDE, WIDTHS, Setup, Way, aspects, padding
from benchmarks.records import cosine
from benchmarks.vision_tower import engine
from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.model_config import ImageConfig, NaflexImageConfig
from siglip_serve.config import Backend, Dtype
from siglip_serve.engine.engines import NaflexEngine, TextEngine, VisionEngine
from siglip_serve.engine.patches import PatchRows
from siglip_serve.engine.plan import Plan
from siglip_serve.images.patches import cut_patches, patch_grid
from siglip_serve.images.resize import fit
from siglip_serve.machine import available_cores
from siglip_serve.towers.load import load_text
from siglip_serve.towers.naflex import load_vision

__all__ = ["prepare"]

TEXTS = 20
NAFLEX: tuple[tuple[Backend, Dtype], ...] = (
    ("openvino", "float32"),
    ("openvino", "bfloat16"),
    ("torch", "float32"),
    ("torch", "bfloat16"),
)
SQUARES: tuple[Backend, ...] = ("torch", "openvino")


def prepare(width: str, options: argparse.Namespace) -> Setup:
    """All ways for a tower of a width, with random weights."""
    torch.set_num_threads(available_cores())
    torch.manual_seed(0)
    config = Siglip2Config(vision_config=WIDTHS[width], text_config=WIDTHS[width])
    model = Siglip2Model(config).eval()
    torch.manual_seed(0)
    square = SiglipVisionModel(SiglipVisionConfig(**WIDTHS[width], image_size=SIDE)).eval()
    with tempfile.TemporaryDirectory(prefix="naflex-") as folder:
        model.save_pretrained(folder)
        ours = load_config(Path(folder))
        assert isinstance(ours.image, NaflexImageConfig)
        texts = _text_cosine(model, Path(folder))
        engines = [
            NaflexEngine(load_vision(Path(folder)), ours.image, _plan(backend, dtype))
            for backend, dtype in NAFLEX
        ]
    pictures = Pictures(options.pictures, options.largest_aspect, ours.image)
    counts = pictures.rows.counts
    theirs = partial(_ask_reference, model, pictures)
    ways = [Way("naflex", "transformers", "float32", theirs, 1 - float(counts.mean()) / MOST)]
    for found in engines:
        share = padding(counts, options.batch, found.runner.max_rows)
        plan = found.plan
        ways.append(Way("naflex", plan.backend, plan.dtype, partial(_ask_naflex, found, pictures), share))
    for backend in SQUARES:
        fixed = engine(square, _plan(backend, "float32"))
        ways.append(Way("square", backend, "float32", partial(_ask_square, fixed, pictures)))
    return Setup(ways, texts)


class Pictures:
    """Pictures as each of the towers takes them."""

    def __init__(self, count: int, largest: float, naflex: NaflexImageConfig) -> None:
        shapes = [(round(400 * one**0.5), round(400 * one**-0.5)) for one in aspects(count, largest)]
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
def _ask_reference(model: Siglip2Model, pictures: Pictures, part: slice) -> NDArray[np.float32]:
    """transformers' pooled embeddings, each picture padded to the most patches."""
    inputs = {name: tensor[part] for name, tensor in pictures.theirs.items()}
    found: NDArray[np.float32] = model.vision_model(**inputs).pooler_output.numpy()
    return found


def _ask_naflex(ours: NaflexEngine, pictures: Pictures, part: slice) -> NDArray[np.float32]:
    return ours(pictures.rows[part]).outputs["EMBEDDING"]


def _ask_square(ours: VisionEngine, pictures: Pictures, part: slice) -> NDArray[np.float32]:
    return ours(pictures.squares[part]).outputs["EMBEDDING"]


def _plan(backend: Backend, dtype: Dtype) -> Plan:
    return Plan("cpu", dtype, backend, threads=available_cores())


@torch.inference_mode()
def _text_cosine(model: Siglip2Model, path: Path) -> float:
    """Smallest cosine of our text embeddings to transformers'."""
    config = model.config.text_config
    shape = TEXTS, config.max_position_embeddings
    ids = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    expected = model.text_model(torch.from_numpy(ids)).pooler_output.numpy()
    ours = TextEngine(load_text(path), _plan("torch", "float32"))
    return float(cosine(ours(ids).outputs["EMBEDDING"], expected).min())
