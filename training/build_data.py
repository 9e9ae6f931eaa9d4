"""Fetch the art, render it and pack it into one file that a GPU machine can take.

    python -m training.build_data --cache .cache/art --out .cache/art.npz

The pack is an uncompressed npz: `blob` (all WebP images end to end), `offsets` int64 [N+1], `concept` int32
[N], `style` int16 [N], and `meta`. The last one is a JSON string of styles, concepts and benchmark classes.
"""

import json
import random
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from training.concepts import Concept, benchmark_classes, load_concepts, name_index, plain_hexcode
from training.render import encode, glyph_svgs, icon_svg, render_image, render_svg
from training.sources import STYLES, Style, fetch, icon_styles, verify_licences

__all__ = ["Drawing", "collect", "main"]

NEVER_TRAINED = Path(__file__).with_name("never_trained.txt")
_ICON_SUFFIX = re.compile(
    r"-(outline|outlined|fill|filled|solid|bold|duotone|line|linear|light|thin|twotone|two-tone|rounded|round|sharp|"
    r"regular|broken|remix|flat|color|alt|s|l|\d+|\d+px|\d+-(regular|filled|solid))$"
)
# Words that documentation and demonstrations use stay trained.
_FAMILIAR = {
    "automobile",
    "banana",
    "bicycle",
    "cat",
    "dog",
    "elephant",
    "guitar",
    "house",
    "penguin",
    "pizza",
}
_FAMILIAR |= {"rocket", "snowman", "sun"}
_PER_ICON_SET = 2
_ICONS_PER_CONCEPT = 32


@dataclass(frozen=True)
class Drawing:
    """One drawing before rendering: SVG text, or the path of an image file."""

    style: int
    concept: int
    svg: str = ""
    path: str = ""


def _names_with_code_points(cache: Path) -> dict[str, str]:
    """Names that the sets with code points use, as name -> plain hexcode."""
    found: dict[str, str] = {}
    for prefix in ("noto", "twemoji"):
        data = json.loads((cache / f"iconify/json/{prefix}.json").read_text())
        for hexcode, name in data["chars"].items():
            found.setdefault(name, plain_hexcode(hexcode))
    return found


def _emoji_set(cache: Path, style: Style, number: int, concepts: Sequence[Concept]) -> Iterator[Drawing]:
    data = json.loads((cache / f"iconify/json/{style.where}.json").read_text())
    by_hexcode = {concept.hexcode: concept.index for concept in concepts}
    chars = data.get("chars", {})
    if chars:
        pairs = [(name, by_hexcode.get(plain_hexcode(code))) for code, name in chars.items()]
    else:
        index = name_index(concepts, _names_with_code_points(cache), only_icons=False)
        squeezed = {name.replace("-", ""): concept for name, concept in index.items()}
        names = list(data["icons"]) + list(data.get("aliases", {}))
        pairs = [(name, index.get(name, squeezed.get(name))) for name in names]
    done: set[int] = set()
    for name, concept in pairs:
        known = name in data["icons"] or data.get("aliases", {}).get(name, {}).get("parent") in data["icons"]
        if concept is not None and concept not in done and known:
            done.add(concept)
            yield Drawing(number, concept, svg=icon_svg(data, name))


def _font(cache: Path, style: Style, number: int, concepts: Sequence[Concept]) -> Iterator[Drawing]:
    codes = {int(c.hexcode, 16): c.index for c in concepts if "-" not in c.hexcode}
    for code, svg in glyph_svgs(sorted(cache.glob(style.where)), list(codes)):
        yield Drawing(number, codes[code], svg=svg)


def _images(cache: Path, style: Style, number: int, concepts: Sequence[Concept]) -> Iterator[Drawing]:
    by_hexcode = {concept.hexcode: concept.index for concept in concepts}
    for path in sorted(cache.glob(style.where)):
        concept = by_hexcode.get(plain_hexcode(path.stem))
        if concept is not None:
            yield Drawing(number, concept, path=str(path))


def _icons(cache: Path, style: Style, number: int, index: dict[str, int]) -> Iterator[Drawing]:
    data = json.loads((cache / f"iconify/json/{style.where}.json").read_text())
    per_concept: Counter[int] = Counter()
    for name in data["icons"]:
        bare = name
        while (shorter := _ICON_SUFFIX.sub("", bare)) != bare and bare not in index:
            bare = shorter
        concept = index.get(bare)
        if concept is not None and per_concept[concept] < _PER_ICON_SET:
            per_concept[concept] += 1
            yield Drawing(number, concept, svg=icon_svg(data, name))


def collect(cache: Path, styles: Sequence[Style], concepts: Sequence[Concept], seed: int) -> list[Drawing]:
    """All drawings of all styles, but of plain icons at most 32 per concept, taken at random."""
    index = name_index(concepts, {}, only_icons=True)
    drawings: list[Drawing] = []
    icons: dict[int, list[Drawing]] = {}
    for number, style in enumerate(tqdm(styles, desc="reading sets", unit="set")):
        if style.kind == "iconify":
            drawings += _emoji_set(cache, style, number, concepts)
        elif style.kind == "font":
            drawings += _font(cache, style, number, concepts)
        elif style.kind == "webp":
            drawings += _images(cache, style, number, concepts)
        else:
            for drawing in _icons(cache, style, number, index):
                icons.setdefault(drawing.concept, []).append(drawing)
    rng = random.Random(seed)
    for found in icons.values():
        drawings += rng.sample(found, min(len(found), _ICONS_PER_CONCEPT))
    return drawings


def _render(task: tuple[Drawing, int]) -> bytes:
    drawing, size = task
    pixels = render_image(Path(drawing.path), size) if drawing.path else render_svg(drawing.svg, size)
    return b"" if pixels is None else encode(pixels)


def _pack(out: Path, drawings: Sequence[Drawing], images: Sequence[bytes], meta: dict[str, Any]) -> None:
    offsets = np.concatenate([[0], np.cumsum([len(image) for image in images])]).astype(np.int64)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("wb") as file:
        np.savez(
            file,
            blob=np.frombuffer(b"".join(images), np.uint8),
            offsets=offsets,
            concept=np.array([drawing.concept for drawing in drawings], np.int32),
            style=np.array([drawing.style for drawing in drawings], np.int16),
            meta=np.array(json.dumps(meta)),
        )


def _classes(
    concepts: Sequence[Concept], styles: Sequence[Style], drawings: Sequence[Drawing], count: int, seed: int
) -> tuple[list[int], list[int]]:
    """The benchmark's classes, and the tenth of them that is never trained."""
    used = [(styles[d.style].name, d.concept) for d in drawings if styles[d.style].role != "choose"]
    held_out = [style.name for style in styles if style.role == "held-out"]
    classes = benchmark_classes(concepts, used, held_out, count)
    candidates = [number for number in classes if concepts[number].label not in _FAMILIAR]
    return classes, sorted(random.Random(seed).sample(candidates, count // 10))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/art"), help="where fetched packages are kept"
    )
    parser.add_argument("--out", type=Path, default=Path(".cache/art.npz"), help="the pack to write")
    parser.add_argument("--size", type=int, default=96, help="pixels per side of each drawing")
    parser.add_argument("--classes", type=int, default=1000, help="classes of the benchmark")
    parser.add_argument("--workers", type=int, default=2, help="rendering processes")
    parser.add_argument("--seed", type=int, default=0, help="chooses icons and the never-trained classes")
    args = parser.parse_args(argv)

    fetch(args.cache)
    verify_licences(args.cache)
    concepts = load_concepts(args.cache)
    styles = [*STYLES, *icon_styles(args.cache)]
    drawings = collect(args.cache, styles, concepts, args.seed)
    with ProcessPoolExecutor(args.workers) as pool:
        rendering = pool.map(_render, [(drawing, args.size) for drawing in drawings], chunksize=64)
        images = list(tqdm(rendering, total=len(drawings), desc="rendering", unit="drawing"))
    visible = [number for number, image in enumerate(images) if image]
    drawings, images = [drawings[n] for n in visible], [images[n] for n in visible]
    classes, never = _classes(concepts, styles, drawings, args.classes, args.seed)
    meta = {
        "size": args.size,
        "styles": [asdict(style) for style in styles],
        "concepts": [{**asdict(concept), "synset": concept.synset} for concept in concepts],
        "classes": classes,
        "never_trained": never,
    }
    _pack(args.out, drawings, images, meta)
    NEVER_TRAINED.write_text("".join(f"{concepts[n].synset} {concepts[n].label}\n" for n in never))
    per_style = Counter(
        styles[d.style].name if styles[d.style].kind != "icons" else "icons" for d in drawings
    )
    for name, number in per_style.items():
        print(f"{name:20} {number:6}")
    size = args.out.stat().st_size / 1e6
    print(f"{len(drawings)} drawings of {len(concepts)} concepts, {size:.1f} MB: {args.out}")


if __name__ == "__main__":
    main()
