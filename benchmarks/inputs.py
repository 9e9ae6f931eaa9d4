"""Inputs of benchmarks: published geometries, a synthetic photograph, texts, and settings of a server."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["GEOMETRIES", "parse_settings", "synthetic_jpeg", "synthetic_texts"]

# Names and values as in a Hugging Face config.json.
GEOMETRIES = {
    "base/16@224": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
    },
    "so400m/14@384": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}


def parse_settings(given: Sequence[str]) -> dict[str, str]:
    """Settings from NAME=VALUE, as a command line has them. Exits with a message on anything else."""
    for text in given:
        if "=" not in text:
            sys.exit(f"--setting: got {text!r}, expected NAME=VALUE")
    return dict(text.split("=", 1) for text in given)


def synthetic_jpeg(width: int, height: int, seed: int | None = None) -> bytes:
    """A JPEG of about a photograph's size, 80 kB at 500x375: smooth colour, edges, and grain."""
    rng = np.random.default_rng(width if seed is None else seed)
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    colors = [127 + 100 * np.sin(5 * x + 3 * y * (channel + 1)) for channel in range(3)]
    image = Image.fromarray(np.stack(colors, axis=-1).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(40):
        left, top = int(rng.integers(0, width)), int(rng.integers(0, height))
        red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
        draw.ellipse((left, top, left + width // 8, top + height // 6), fill=(red, green, blue))
    grain = rng.normal(0, 9, (height, width, 1))
    image = Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def synthetic_texts(count: int, mark: str = "") -> list[str]:
    """Different texts of 3 to 9 words, a number, and a mark that tells them from those of other calls."""
    words = ["a", "photo", "of", "the", "red", "dog", "pizza", "house", "on", "water"]
    texts = (" ".join(words[(n * 7 + k * (n % 3 + 1)) % 10] for k in range(3 + n % 7)) for n in range(count))
    return [f"{text} {n} {mark}".rstrip() for n, text in enumerate(texts)]
