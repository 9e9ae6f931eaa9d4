"""Accuracy of a server's heatmaps on the objects of ImageNet-Segmentation's 4,276 photographs.

    python -m validate.imagenet_segmentation --data gtsegs_ijcv.mat

The protocol is that of "Transformer Interpretability Beyond Attention Visualization" (Chefer, Gur and Wolf,
2021, arXiv 2012.09838). The relative maps are those of "Interpreting CLIP's Image Representation via
Text-Based Decomposition" (Gandelsman, Efros and Steinhardt, 2024, arXiv 2310.05916). Such a map is the map of
a class minus the mean over all classes, clipped at 0 and scaled to 0..1. The object is where a map is above
its own mean. Pixel accuracy and mIoU (of object and background) divide sums over all images. mAP is the mean
over images of the average precision of both classes in one ranking. The class is the one that zero-shot
classification predicts, or with `--mapping` the one that the image's name says.

It has not been run on the real file, only on one of the same form. Readers must get the file themselves. Its
form is described in `validate.segments`.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from siglip_serve_client import Client
from siglip_serve_client.errors import ClientError
from tqdm import tqdm

from siglip_serve.embeddings.zero_shot import build_class_embeddings, cosine
from validate.dataset import read_mapping
from validate.errors import DatasetError, ServerError, ValidationError
from validate.measures import localization
from validate.protocols import curated_names, imagenet_classnames, imagenet_templates
from validate.segments import Segment, Segments
from validate.server import Server

__all__ = ["Figures", "Outcome", "judge", "main", "parser", "run", "square", "total"]

_TEMPLATE = "a photo of a {}."
_TEXT_ROWS = 64

Explain = Callable[[bytes, str], NDArray[np.float32]]


@dataclass(frozen=True)
class Outcome:
    """One image: pixels that are right, and of background and object those in both and in either."""

    right: int
    pixels: int
    both: NDArray[np.int64]
    either: NDArray[np.int64]
    precision: float


@dataclass(frozen=True)
class Figures:
    """Figures over all images, 0..1, with the 95 % interval of the mean precision."""

    images: int
    pixel_accuracy: float
    mean_iou: float
    mean_average_precision: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Vocabulary:
    """The names that classes have in prompts; `index` says which one a synset has, if that is known."""

    names: list[str]
    index: dict[str, int]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints the figures, returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        run(options)
    except (ValidationError, ClientError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was kept", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m validate.imagenet_segmentation",
        description="How well a server's heatmaps find the objects of ImageNet-Segmentation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = made.add_argument
    add("--data", type=Path, required=True, help="gtsegs_ijcv.mat")
    add("--url", default="127.0.0.1:8001", help="host:port of the server's gRPC endpoint")
    add("--output", type=Path, default=Path("validation"), help="folder for segmentation.json")
    add("--mapping", type=Path, help="LOC_synset_mapping.txt: take the class that an image's name says")
    add("--templates", choices=("openai", "one"), default="openai", help="of the classes that are predicted")
    add(
        "--bank", type=int, default=0, help="classes that make the mean, evenly chosen; 0: all, which is slow"
    )
    add("--size", type=_positive, default=224, help="side to which maps and masks are scaled; published: 224")
    add("--images", type=int, default=0, help="most images, evenly chosen; 0: all")
    add("--concurrency", type=_positive, default=4, help="requests under way at once")
    add("--timeout", type=float, default=120.0, help="seconds to wait for one answer")
    return made


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def run(options: argparse.Namespace) -> Figures:
    """Measure, print and write `segmentation.json`.

    Raises:
        ValidationError: the file or the server does not allow it.
        ClientError: the server does not explain an image.
    """
    server = Server(options.url, options.timeout)
    with Segments(options.data) as segments:
        if not len(segments):
            raise DatasetError(f"{options.data}: no images in it")
        server.require(["embed_image", "embed_text", "explain_image"])
        words = vocabulary(options.mapping)
        classify = None if options.mapping else _classifier(server, words, options.templates)
        chosen = _evenly(len(segments), options.images)
        with Client(server.url, options.concurrency, options.timeout) as client:
            explain = _explainer(client, words, options.bank, options.size)
            work = partial(_outcome, words=words, classify=classify, explain=explain)
            with ThreadPoolExecutor(options.concurrency) as pool:
                read = (segments[index] for index in chosen)
                answers = _bounded(pool, work, read, 2 * options.concurrency)
                outcomes = list(tqdm(answers, total=len(chosen), unit="image", disable=None))
    known = [outcome for outcome in outcomes if outcome is not None]
    if not known:
        raise DatasetError(f"{options.data}: no image is of a class in {options.mapping}")
    figures = total(known)
    print(table(figures))
    left_out = len(outcomes) - len(known)
    if left_out:
        print(f"left out: {left_out} images whose class is not in {options.mapping}", file=sys.stderr)
    options.output.mkdir(parents=True, exist_ok=True)
    written = {
        "server": server.info().as_dict(),
        "options": {name: str(value) for name, value in vars(options).items()},
        "left_out": left_out,
        "figures": asdict(figures),
    }
    file = options.output / "segmentation.json"
    file.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {file}", file=sys.stderr)
    return figures


def vocabulary(mapping: Path | None) -> Vocabulary:
    """ImageNet's curated names, or a mapping's classes, under the curated names if they are ImageNet's."""
    if mapping is None:
        return Vocabulary(imagenet_classnames(), {})
    classes = read_mapping(mapping)
    names = curated_names(classes) or [row.first_name for row in classes]
    return Vocabulary(names, {row.synset: number for number, row in enumerate(classes)})


def judge(heat: localization.Floats, mask: NDArray[np.bool_]) -> Outcome:
    """Outcome of a relative map [H, W] for an image with a mask of the same size."""
    scores = np.maximum(heat, 0)
    found = localization.foreground(scores)
    both, either = localization.intersections_and_unions(found, mask)
    precision = localization.two_class_precision(localization.min_max(scores), mask)
    return Outcome(int((found == mask).sum()), mask.size, both, either, precision)


def total(outcomes: Sequence[Outcome]) -> Figures:
    """The published figures of at least one image."""
    both, either = (np.sum([getattr(each, name) for each in outcomes], axis=0) for name in ("both", "either"))
    precisions = np.array([each.precision for each in outcomes])
    return Figures(
        len(outcomes),
        sum(each.right for each in outcomes) / sum(each.pixels for each in outcomes),
        float((both / np.maximum(either, 1)).mean()),
        float(precisions.mean()),
        localization.bootstrap_interval(precisions),
    )


def table(figures: Figures) -> str:
    """The figures as a table, in percent."""
    low, high = figures.interval
    return (
        "| images | pixel accuracy | mIoU | mAP |\n|---|---|---|---|\n"
        f"| {figures.images} | {100 * figures.pixel_accuracy:.2f} | {100 * figures.mean_iou:.2f} "
        f"| {100 * figures.mean_average_precision:.2f} ({100 * low:.2f} to {100 * high:.2f}) |"
    )


def square(segment: Segment) -> bytes:
    """The photograph stretched to a square, as published: a server that cuts one out sees all of it too."""
    side, file = max(segment.mask.shape), io.BytesIO()
    picture = Image.fromarray(segment.picture).resize((side, side), Image.Resampling.BICUBIC)
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _outcome(
    segment: Segment, words: Vocabulary, classify: Callable[[bytes], int] | None, explain: Explain
) -> Outcome | None:
    """None where the class is not known."""
    picture = square(segment)
    number = words.index.get(segment.synset) if classify is None else classify(picture)
    if number is None:
        return None
    heat = explain(picture, words.names[number])
    mask = Image.fromarray(segment.mask).resize((heat.shape[1], heat.shape[0]), Image.Resampling.NEAREST)
    return judge(heat, np.asarray(mask))


def _classifier(server: Server, words: Vocabulary, templates: str) -> Callable[[bytes], int]:
    """Class of an image, by the cosine with the mean over the templates."""
    forms = imagenet_templates() if templates == "openai" else [_TEMPLATE]
    texts = [form.replace("{}", name) for name in words.names for form in forms]
    rows = min(_TEXT_ROWS, server.rows_per_request("embed_text") or _TEXT_ROWS)
    starts = range(0, len(texts), rows)
    parts = [
        server.embed_texts(texts[start : start + rows])
        for start in tqdm(starts, desc="texts", unit="request", disable=None)
    ]
    classes = build_class_embeddings(np.concatenate(parts).reshape(len(words.names), len(forms), -1))
    return lambda picture: int(cosine(server.embed_images([picture]), classes)[0].argmax())


def _explainer(client: Client, words: Vocabulary, bank: int, size: int) -> Explain:
    """The map of a name, relative to the bank, over the whole picture at size x size."""
    background = [words.names[number] for number in _evenly(len(words.names), bank)]

    def explain(picture: bytes, name: str) -> NDArray[np.float32]:
        found = client.explain(
            picture,
            [name],
            templates=[_TEMPLATE],
            background=background,
            mode="relative",
            normalize="none",
            size=(size, size),
        )
        if found.heatmaps.shape != (1, size, size):
            raise ServerError(f"explain_image: got HEATMAPS {list(found.heatmaps.shape)}")
        return found.heatmaps[0]

    return explain


def _evenly(count: int, most: int) -> list[int]:
    """At most `most` of 0 to count - 1, evenly chosen, or all for 0."""
    if most < 1 or most >= count:
        return list(range(count))
    return [int(number) for number in np.linspace(0, count - 1, most).round()]


def _bounded(
    pool: ThreadPoolExecutor,
    work: Callable[[Segment], Outcome | None],
    segments: Iterator[Segment],
    ahead: int,
) -> Iterator[Outcome | None]:
    """Results in order. The file is read here, by one thread, and only so far ahead."""
    waiting = [pool.submit(work, segment) for segment in islice(segments, ahead)]
    try:
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(work, segment) for segment in islice(segments, 1)]
    finally:
        for future in waiting:
            future.cancel()


if __name__ == "__main__":
    sys.exit(main())
