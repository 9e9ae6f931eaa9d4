"""Columns that every benchmark shares, a picture to measure with, and the CSV files."""

from __future__ import annotations

import csv
import datetime
import io
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

__all__ = ["GEOMETRIES", "about", "cosine", "parse_settings", "synthetic_jpeg", "write_csv"]

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


def about(packages: Sequence[str], device: str | None = None) -> dict[str, str]:
    """The columns that name the run: date, commit, device, versions, command."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "device": device or _cpu_name(),
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, str]], append: bool = False) -> None:
    """Write rows that all have the columns of the first one."""
    kept: list[Mapping[str, str]] = []
    if append and path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != list(rows[0]):
                raise ValueError(f"{path}: its columns are {reader.fieldnames}, not {list(rows[0])}")
            kept = list(reader)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])


def cosine(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """Cosine of each row of one array with the same row of the other."""
    product: NDArray[Any] = (a * b).sum(-1)
    return product / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


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


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
