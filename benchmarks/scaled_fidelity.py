"""Distance of `--preprocess scaled` from `pil`, by scale, by pixels to spare, and by content.

Pictures of each content are drawn, or photographs made smaller, to as many pixels as give a ratio, and saved
as JPEGs. Each is read at a fraction of its size and by Pillow. Levels are compared, and the embeddings of a
checkpoint. With `--data` it is the zero-shot answers to a folder in ImageNet's layout that are compared, each
picture saved as a JPEG of its own size.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from siglip_serve_client.compact import unit
from tqdm import tqdm

from benchmarks.inputs import synthetic_jpeg
from benchmarks.records import about, cosine, write_csv
from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.files import resolve
from siglip_serve.checkpoint.model_config import ImageConfig
from siglip_serve.engine.engines import TextEngine, VisionEngine
from siglip_serve.engine.plan import Plan
from siglip_serve.images.jpeg import plain_scan
from siglip_serve.images.preprocess import Preprocessor, ReadMode
from siglip_serve.images.resize import resize
from siglip_serve.images.scaled.reader import read_scaled
from siglip_serve.machine import available_cores
from siglip_serve.texts.tokenizer import load_tokenizer
from siglip_serve.towers.siglip import load_text, load_vision
from validate.dataset import load_dataset

SIDES = (1, 2, 4)
# Scaled pixels per pixel of the result, down and across: 1.2 x 2.1 is 1920x1080 at a quarter for a square of
# 224, 1.7 x 2.2 is 4000x3000 at an eighth.
RATIOS = ((1.0, 1.0), (1.2, 1.2), (1.2, 2.1), (1.5, 1.5), (1.7, 2.2), (3.0, 3.0))
CONTENTS = ("photographs", "shapes", "texture", "text")
_PER_CONTENT = 4
_WORDS = "The quick brown fox jumps over the lazy dog 0123456789"


def pictures(content: str, height: int, width: int, photographs: list[Path]) -> Iterator[Image.Image]:
    """Pictures of a content."""
    if content == "photographs":
        for path in photographs:
            with Image.open(path) as image:
                if image.width >= width and image.height >= height:  # enlarged, it would have nothing fine
                    yield image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        return
    for seed in range(_PER_CONTENT):
        if content == "shapes":
            yield Image.open(io.BytesIO(synthetic_jpeg(width, height, seed)))
        else:
            yield (_texture if content == "texture" else _text)(height, width, np.random.default_rng(seed))


def _texture(height: int, width: int, rng: np.random.Generator) -> Image.Image:
    """Waves of all lengths down to two pixels, and noise: the worst for any reduction."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    planes = np.zeros((height, width, 3), np.float32)
    for _ in range(12):
        wave, angle = float(2 ** rng.uniform(1, 6)), float(rng.uniform(0, np.pi))
        phase = 2 * np.pi / wave * (x * np.cos(angle) + y * np.sin(angle))
        planes += np.sin(phase)[..., None] * rng.uniform(-40, 40, 3).astype(np.float32)
    planes += rng.normal(0, 20, planes.shape).astype(np.float32)
    return Image.fromarray(np.clip(planes + 128, 0, 255).astype(np.uint8))


def _text(height: int, width: int, rng: np.random.Generator) -> Image.Image:
    """Lines of black and coloured text on white, from a hundredth to an eighth of the picture's height."""
    image = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(image), 0
    while top < height:
        letters = int(height * rng.uniform(0.01, 0.12)) + 4
        color = (0, 0, 0) if rng.random() < 0.6 else tuple(int(level) for level in rng.integers(0, 200, 3))
        start = int(rng.integers(0, len(_WORDS)))
        text = (_WORDS[start:] + _WORDS) * 4
        draw.text((0, top), text, fill=color, font=ImageFont.load_default(letters))
        top += int(letters * 1.3)
    return image


def compare(data: bytes, image: ImageConfig, side: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels of a JPEG that is read at `side` eighths, and by Pillow."""
    scan = plain_scan(data)
    scaled = read_scaled(data, scan, side) if scan else None
    if scaled is None:
        raise ValueError("a JPEG of this benchmark cannot be read at a fraction of its size")
    resized = resize(scaled.pixels, (image.size, image.size), image.resample, "fast", scaled.extent)
    return resized, Preprocessor(image, "pil")(data)


def rows(options: argparse.Namespace) -> list[dict[str, str]]:
    """One row per scale, ratio and content."""
    path = resolve(options.checkpoint)
    config = load_config(path)
    engine = VisionEngine(
        load_vision(path), config.image, Plan("cpu", "float32", "openvino", 0, available_cores())
    )
    photographs = sorted(options.photographs.iterdir()) if options.photographs else []
    columns = about(["torch", "pillow", "numba"])
    columns |= {"checkpoint": path.name, "quality": str(options.quality)}
    table = []
    for side in SIDES:
        for down, across in tqdm(RATIOS, desc=f"{side}/8", disable=None):
            height, width = (round(config.image.size * ratio * 8 / side) for ratio in (down, across))
            for content in CONTENTS:
                read = [
                    compare(_encode(picture, options.quality), config.image, side)
                    for picture in pictures(content, height, width, photographs)
                ]
                if read:
                    fields = {"scale": f"{side}/8", "ratio": f"{down:g} x {across:g}", "content": content}
                    table.append({**columns, **fields, **_distances(read, engine)})
    return table


def _encode(picture: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return file.getvalue()


def _distances(
    read: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]], engine: VisionEngine
) -> dict[str, str]:
    scaled, exact = (np.stack(list(side)) for side in zip(*read, strict=True))
    levels = np.abs(scaled.astype(int) - exact)
    cosines = cosine(*(engine(pixels).outputs["EMBEDDING"].copy() for pixels in (scaled, exact)))
    return {
        "pictures": str(len(read)),
        "max_abs_diff": str(levels.max()),
        "mean_abs_diff": f"{levels.mean():.3f}",
        "cosine_mean": f"{cosines.mean():.6f}",
        "cosine_min": f"{cosines.min():.6f}",
    }


def accuracy(options: argparse.Namespace) -> list[dict[str, str]]:
    """One row: zero-shot answers to pictures that are read in both modes."""
    path = resolve(options.checkpoint)
    config = load_config(path)
    plan = Plan("cpu", "float32", "openvino", 0, available_cores())
    vision, tokenizer = VisionEngine(load_vision(path), config.image, plan), load_tokenizer(config)
    data = load_dataset(options.data, "stop")
    ids = np.stack([tokenizer(f"a photo of a {entry.first_name}.", True) for entry in data.classes])
    texts = unit(TextEngine(load_text(path), plan)(ids).outputs["EMBEDDING"])
    modes: tuple[ReadMode, ...] = ("scaled", "pil")
    readers = {mode: Preprocessor(config.image, mode) for mode in modes}
    answers: dict[str, list[int]] = {mode: [] for mode in modes}
    samples = data.valid[:: max(1, len(data.valid) // options.pictures)]
    cosines, labels = [], [sample.label for sample in samples]
    for sample in tqdm(samples, disable=None):
        with Image.open(sample.path) as picture:
            file = _encode(picture.convert("RGB"), options.quality)
        rows = {mode: unit(vision(read(file)[None]).outputs["EMBEDDING"]) for mode, read in readers.items()}
        cosines.append(float((rows["scaled"] * rows["pil"]).sum()))
        for mode, row in rows.items():
            answers[mode].append(int((texts @ row[0]).argmax()))
    scaled, exact = (np.array(answers[mode]) for mode in modes)
    columns = about(["torch", "pillow", "numba"])
    columns |= {"checkpoint": path.name, "quality": str(options.quality)}
    return [
        {
            **columns,
            "pictures": str(len(labels)),
            "classes": str(len(data.classes)),
            "top1_scaled": f"{(scaled == labels).mean():.4f}",
            "top1_pil": f"{(exact == labels).mean():.4f}",
            "agreement": f"{(scaled == exact).mean():.4f}",
            "cosine_mean": f"{np.mean(cosines):.6f}",
            "cosine_min": f"{np.min(cosines):.6f}",
        }
    ]


def main() -> None:
    """Measure, print the table, and write it as CSV if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint", default="checkpoints/siglip-tiny", help="whose embeddings, default %(default)s"
    )
    parser.add_argument("--photographs", type=Path, help="folder of large photographs; default: none")
    parser.add_argument("--data", type=Path, help="folder in ImageNet's layout: compare zero-shot answers")
    parser.add_argument(
        "--pictures", type=int, default=250, help="most pictures of --data, evenly drawn, default %(default)s"
    )
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs, default %(default)s")
    parser.add_argument("--output", type=Path, help="CSV file to append to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = accuracy(options) if options.data else rows(options)
    for row in table:
        print(*(f"{name} {row[name]}" for name in list(row)[list(row).index("quality") + 1 :]), sep="  ")
    if options.output:
        write_csv(options.output, table, append=True)


if __name__ == "__main__":
    main()
