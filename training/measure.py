"""Measure a checkpoint on the benchmark's files with transformers alone, apart from any server.

    python -m training.measure --data data/drawings --out training/results.json

Zero-shot and 10-nearest-neighbour accuracy per held-out style, and the same neighbours on raw pixels, which
says how much of the result a model is needed for.
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import AutoProcessor, SiglipModel

from training.tokenizer import PROMPTS

__all__ = ["main", "top", "vote"]

NEIGHBOURS = 10
_BATCH = 128
_RAW = 16


@dataclass(frozen=True)
class _Part:
    """Embedded files: unit rows [n, width], unit rows [n, pixels], class [n] and style [n]."""

    embedding: Tensor
    pixels: Tensor
    label: Tensor
    style: list[str]


def _output(found: Any) -> Tensor:
    """`get_*_features` gives a tensor in transformers 4 and an object from 5 on."""
    tensor: Tensor = getattr(found, "pooler_output", found)
    return F.normalize(tensor.float(), dim=1)


def _files(folder: Path, synsets: Sequence[str]) -> list[tuple[Path, int]]:
    return [
        (path, label) for label, synset in enumerate(synsets) for path in sorted((folder / synset).iterdir())
    ]


def _batches(files: Sequence[tuple[Path, int]], title: str) -> Iterator[list[Image.Image]]:
    for start in tqdm(range(0, len(files), _BATCH), desc=title, unit="batch"):
        yield [Image.open(path).convert("RGB") for path, _ in files[start : start + _BATCH]]


@torch.no_grad()
def _embed(model: Any, processor: Any, folder: Path, synsets: Sequence[str]) -> _Part:
    files = _files(folder, synsets)
    embeddings, pixels = [], []
    for images in _batches(files, folder.name):
        values = processor(images=images, return_tensors="pt")["pixel_values"]
        embeddings.append(_output(model.get_image_features(pixel_values=values)))
        small = F.interpolate(values, (_RAW, _RAW), mode="area").flatten(1)
        pixels.append(F.normalize(small - small.mean(1, keepdim=True), dim=1))
    return _Part(
        torch.cat(embeddings),
        torch.cat(pixels),
        torch.tensor([label for _, label in files]),
        [path.stem.rsplit("_", 1)[0] for path, _ in files],
    )


@torch.no_grad()
def _classes(model: Any, processor: Any, labels: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """[classes, width]: mean over prompts of normalised embeddings, normalised."""
    total = torch.zeros(())
    for prompt in prompts:
        texts = [prompt.format(label) for label in labels]
        ids = processor(text=texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        total = total + _output(model.get_text_features(input_ids=ids))
    return F.normalize(total, dim=1)


def vote(queries: Tensor, gallery: Tensor, label: Tensor, classes: int) -> Tensor:
    """Votes of the nearest neighbours, weighted by cosine: [q, D], [g, D], int64 [g] -> [q, classes]."""
    parts = []
    for part in queries.split(256):
        near = (part @ gallery.T).topk(NEIGHBOURS, dim=1)
        parts.append(torch.zeros(len(part), classes).scatter_add_(1, label[near.indices], near.values))
    return torch.cat(parts)


def top(scores: Tensor, label: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy of scores [n, classes] against int64 [n]."""
    hit = scores.topk(5, dim=1).indices == label[:, None]
    return {
        "top1": round(hit[:, 0].float().mean().item(), 4),
        "top5": round(hit.any(1).float().mean().item(), 4),
    }


def _by_style(scores: Tensor, part: _Part, unseen: Tensor) -> dict[str, dict[str, dict[str, float]]]:
    """Per style: trained classes and all classes among all, never-trained classes among themselves."""
    among, is_unseen = unseen.nonzero()[:, 0], unseen[part.label]
    renumbered = torch.cumsum(unseen, 0) - 1
    out = {}
    for style in sorted(set(part.style)):
        mine = torch.tensor([name == style for name in part.style])
        out[style] = {
            "trained": top(scores[mine & ~is_unseen], part.label[mine & ~is_unseen]),
            "all": top(scores[mine], part.label[mine]),
            "never_trained": top(
                scores[mine & is_unseen][:, among], renumbered[part.label[mine & is_unseen]]
            ),
        }
    return out


def measure(model: Any, processor: Any, data: Path) -> dict[str, Any]:
    """All results for one benchmark folder; `valid_clean` is measured if it is there."""
    rows = [line.split(" ", 1) for line in (data / "LOC_synset_mapping.txt").read_text().splitlines()]
    synsets, labels = [row[0] for row in rows], [row[1].split(",")[0] for row in rows]
    never = {line.split(" ", 1)[0] for line in (data / "never_trained.txt").read_text().splitlines()}
    unseen = torch.tensor([synset in never for synset in synsets])
    prompted = {"ensemble": PROMPTS, "a photo of a {}.": ("a photo of a {}.",), "{}": ("{}",)}
    texts = {name: _classes(model, processor, labels, prompts) for name, prompts in prompted.items()}
    gallery = _embed(model, processor, data / "train", synsets)
    out: dict[str, Any] = {}
    for name in ("valid", "valid_clean"):
        if not (data / name).is_dir():
            continue
        part = _embed(model, processor, data / name, synsets)
        found = {
            f"zero_shot {name}": _by_style(part.embedding @ text.T, part, unseen)
            for name, text in texts.items()
        }
        found["knn"] = _by_style(
            vote(part.embedding, gallery.embedding, gallery.label, len(rows)), part, unseen
        )
        found["pixel_knn"] = _by_style(
            vote(part.pixels, gallery.pixels, gallery.label, len(rows)), part, unseen
        )
        out[name] = found
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/siglip-tiny")
    parser.add_argument("--data", type=Path, required=True, help="folder that build_benchmark wrote")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    model = SiglipModel.from_pretrained(args.checkpoint).eval()
    processor = AutoProcessor.from_pretrained(args.checkpoint)
    results = measure(model, processor, args.data)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    for part, methods in results.items():
        for method, styles in methods.items():
            print(
                f"{part:12} {method:28}",
                {style: groups["trained"]["top1"] for style, groups in styles.items()},
            )


if __name__ == "__main__":
    main()
