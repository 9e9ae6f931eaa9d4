"""Draw the sample images of the bundled checkpoint: held-out drawings on soft grounds, one or several.

python -m training.build_samples --cache .cache/art --out checkpoints/siglip-tiny/samples
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from training.render import icon_svg, render_image, render_svg

__all__ = ["SAMPLES", "Sample", "Thing", "draw", "main"]

Colour = tuple[int, int, int]
_SKY, _PEACH, _CREAM, _MINT = (142, 202, 240), (250, 196, 150), (252, 226, 170), (160, 222, 200)
_NIGHT, _SAND, _MEADOW, _ICE = (40, 48, 96), (238, 206, 150), (170, 214, 130), (170, 214, 240)


@dataclass(frozen=True)
class Thing:
    """One drawing: `style` is `twemoji` or `fluent-3d`, `name` its name or hexcode in that set.

    `centre` and `side` are shares of the picture's width and height, and of its shorter side.
    """

    style: str
    name: str
    centre: tuple[float, float] = (0.5, 0.5)
    side: float = 0.82


@dataclass(frozen=True)
class Sample:
    """One picture."""

    file: str
    things: tuple[Thing, ...]
    size: tuple[int, int]
    colour: Colour


SAMPLES = (
    Sample("dog.jpg", (Thing("twemoji", "dog"),), (400, 300), _MEADOW),
    Sample("automobile.jpg", (Thing("fluent-3d", "1f697"),), (480, 320), _PEACH),
    Sample("pizza.jpg", (Thing("fluent-3d", "1f355"),), (320, 320), _CREAM),
    Sample("guitar.jpg", (Thing("twemoji", "guitar"),), (300, 400), _MINT),
    Sample("elephant.jpg", (Thing("fluent-3d", "1f418"),), (420, 300), _SAND),
    Sample("rocket.png", (Thing("twemoji", "rocket"),), (300, 380), _NIGHT),
    Sample("sunflower.png", (Thing("fluent-3d", "1f33b"),), (280, 360), _SKY),
    Sample("penguin.png", (Thing("twemoji", "penguin"),), (320, 300), _ICE),
    Sample(
        "scene.jpg",
        (
            Thing("fluent-3d", "1f418", (0.22, 0.3), 0.5),
            Thing("twemoji", "guitar", (0.8, 0.32), 0.5),
            Thing("fluent-3d", "1f355", (0.47, 0.72), 0.44),
        ),
        (560, 400),
        _MEADOW,
    ),
)


def _drawing(cache: Path, thing: Thing, side: int) -> Image.Image:
    if thing.style == "fluent-3d":
        return Image.fromarray(render_image(cache / f"fluent-3d/assets/{thing.name}.webp", side), "RGBA")
    data = json.loads((cache / f"iconify/json/{thing.style}.json").read_text())
    pixels = render_svg(icon_svg(data, thing.name), side)
    if pixels is None:
        raise ValueError(f"{thing.style}: {thing.name} draws nothing")
    return Image.fromarray(pixels, "RGBA")


def _scene(size: tuple[int, int], colour: Colour) -> Image.Image:
    """A ground that pales towards its upper left."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    distance = np.hypot(x / width - 0.3, y / height - 0.2) / 1.1
    pale = (0.55 * (1 - distance.clip(0, 1)))[..., None]
    shade = np.array(colour, np.float32) * (1 - pale) + 255 * pale
    return Image.fromarray(shade.round().astype(np.uint8), "RGB")


def draw(cache: Path, sample: Sample) -> Image.Image:
    """One finished sample, RGB: the drawings with soft shadows of their own shapes."""
    scene = _scene(sample.size, sample.colour)
    for thing in sample.things:
        side = round(thing.side * min(sample.size))
        left, top = (
            round(share * length - side / 2) for share, length in zip(thing.centre, scene.size, strict=True)
        )
        drawing = _drawing(cache, thing, side)
        shadow = Image.new("L", scene.size)
        shadow.paste(drawing.getchannel("A").point(lambda alpha: alpha * 0.25), (left + 5, top + 8))
        scene.paste((30, 30, 50), mask=shadow.filter(ImageFilter.GaussianBlur(8)))
        scene.paste(drawing, (left, top), drawing)
    return scene


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/art"), help="packages that build_data fetched"
    )
    parser.add_argument("--out", type=Path, default=Path("checkpoints/siglip-tiny/samples"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for sample in tqdm(SAMPLES, desc="samples", unit="image"):
        image = draw(args.cache, sample)
        if sample.file.endswith(".jpg"):
            image.save(args.out / sample.file, quality=90)
        else:
            image.save(args.out / sample.file, optimize=True)


if __name__ == "__main__":
    main()
