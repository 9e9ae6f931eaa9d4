"""Build the offline benchmark: ImageNet's layout, filled with drawings.

    python -m training.build_benchmark --out data/drawings

Writes `train/<synset>/*` (drawings of the training vendors), `valid/<synset>/*` (five held-out drawings a
class, each placed four times), `LOC_synset_mapping.txt` and `never_trained.txt`. A file's name begins with
its style. The pack of drawings is fetched and rendered first if it is not there.
"""

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from training import build_data
from training.pack import Pack, load_pack, premultiplied
from training.scenes import Random, compose, plain

__all__ = ["build", "main", "mapping_row"]

_BATCH = 256


@dataclass(frozen=True)
class _Job:
    """One batch of files of one part: drawing numbers and file names without ending."""

    drawings: list[int]
    paths: list[Path]


def mapping_row(concept: dict[str, Any]) -> str:
    """A line of LOC_synset_mapping.txt: `n00000169 copyright, copyright sign`."""
    names = [name for name in concept["aliases"] if "," not in name][:4]
    return f"{concept['synset']} {', '.join(dict.fromkeys([concept['label'], *names]))}"


def _jobs(pack: Pack, part: Path, drawings: Sequence[int]) -> Iterator[_Job]:
    seen: Counter[tuple[int, str]] = Counter()
    paths = []
    for drawing in drawings:
        concept, style = int(pack.concept[drawing]), pack.styles[int(pack.style[drawing])]["name"]
        number = seen[concept, style]
        seen[concept, style] += 1
        paths.append(part / pack.concepts[concept]["synset"] / (f"{style}-{number}" if number else style))
    for start in range(0, len(drawings), _BATCH):
        yield _Job(list(drawings[start : start + _BATCH]), paths[start : start + _BATCH])


def _save(picture: Tensor, path: Path) -> None:
    image = Image.fromarray((picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    if path.suffix == ".jpg":
        image.save(path, quality=94, subsampling=0)
    else:
        image.save(path)


def _write(pack: Pack, job: _Job, canvas: int, placements: int, random: Random) -> None:
    """Write each drawing `placements` times as `_p0.jpg` ..., or once, centred on white, as `_clean.png`."""
    rows = np.array(job.drawings)
    art, mono = premultiplied(pack.rgba(rows)), pack.mono(rows)
    for number in range(max(1, placements)):
        pictures = compose(art, mono, canvas, random) if placements else plain(art, mono, canvas)
        ending = f"_p{number}.jpg" if placements else "_clean.png"
        paths = [path.with_name(path.name + ending) for path in job.paths]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(_save, pictures, paths))


def _of_styles(pack: Pack, role: str, styles: Sequence[str] | None, classes: Sequence[int]) -> list[int]:
    names = {style["name"] for style in pack.styles if style["role"] == role}
    unknown = set(styles or ()) - {style["name"] for style in pack.styles}
    if unknown:
        raise ValueError(f"unknown styles: {', '.join(sorted(unknown))}")
    wanted = names & set(styles) if styles else names
    numbers = np.flatnonzero(np.isin(pack.concept, classes))
    return [int(n) for n in numbers if pack.styles[int(pack.style[n])]["name"] in wanted]


def build(pack: Pack, args: Namespace) -> None:
    """Write the whole folder. Files that are there are overwritten.

    Args:
        pack: the drawings.
        args: as `main` parses them.
    """
    step = len(pack.classes) / min(args.classes, len(pack.classes))
    classes = [pack.classes[int(number * step)] for number in range(min(args.classes, len(pack.classes)))]
    parts = [
        (args.out / "train", _of_styles(pack, "train", args.styles, classes), 1, 1),
        (args.out / "valid", _of_styles(pack, "held-out", args.styles, classes), 4, 2),
    ]
    if args.clean:
        parts.append((args.out / "valid_clean", parts[1][1], 0, 3))
    for part, drawings, placements, salt in parts:
        for concept in classes:
            (part / pack.concepts[concept]["synset"]).mkdir(parents=True, exist_ok=True)
        random = Random(args.seed * 10 + salt)
        with tqdm(total=len(drawings) * max(1, placements), desc=part.name, unit="image") as bar:
            for job in _jobs(pack, part, drawings):
                _write(pack, job, args.canvas, placements, random)
                bar.update(len(job.drawings) * max(1, placements))
    rows = [mapping_row(pack.concepts[concept]) for concept in classes]
    (args.out / "LOC_synset_mapping.txt").write_text("\n".join(rows) + "\n")
    never = [pack.concepts[concept] for concept in classes if concept in set(pack.never_trained)]
    (args.out / "never_trained.txt").write_text("".join(f"{c['synset']} {c['label']}\n" for c in never))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--pack", type=Path, default=Path(".cache/art.npz"), help="what build_data writes")
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/art"), help="fetched packages, for a new pack"
    )
    parser.add_argument("--classes", type=int, default=1000, help="number of classes")
    parser.add_argument("--styles", nargs="+", help="only these styles, of either part")
    parser.add_argument("--canvas", type=int, default=128, help="pixels per side of each image")
    parser.add_argument("--clean", action="store_true", help="also write valid_clean: centred on white")
    parser.add_argument("--seed", type=int, default=0, help="chooses placements, backgrounds and tints")
    args = parser.parse_args(argv)
    if not args.pack.exists():
        build_data.main(["--cache", str(args.cache), "--out", str(args.pack)])
    build(load_pack(args.pack), args)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
