"""Accuracy of a server's embeddings on an ImageNet-shaped folder.

    python -m validate.siglip_vision --data DIR

The folder holds `train/{synset}/*`, `valid/{synset}/*` and `LOC_synset_mapping.txt`. Images and prompts
are embedded over the wire and kept, so that a stopped run resumes. The table, the figures and a picture are
written to the output folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from siglip_serve.embeddings.zero_shot import Floats
from validate.dataset import Dataset, drawn, load_dataset, read_class_list
from validate.errors import DatasetError, ValidationError
from validate.pixels import pixel_features
from validate.protocols import (
    PROTOCOLS,
    Row,
    few_shot_row,
    linear_probe_row,
    raw_pixel_row,
    zero_shot_protocols,
    zero_shot_row,
)
from validate.report import Report, class_means, draw, markdown, published_table, write_json
from validate.server import Server
from validate.session import Load, Session

__all__ = ["add_common", "main", "open_session", "parser", "run"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints the published table, returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        run(options)
    except ValidationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command resumes from here", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m validate.siglip_vision",
        description="Accuracy of a server's embeddings on an ImageNet-shaped folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_common(made)
    add = made.add_argument
    add("--protocols", nargs="*", choices=PROTOCOLS, default=list(PROTOCOLS), help="zero-shot protocols")
    add("--shots", nargs="*", type=_positive, default=[10], help="images per class, none: no few-shot")
    add("--seeds", type=_positive, default=1, help="draws of the training images, where there is a choice")
    add(
        "--linear-probe", action="store_true", help="add rows with logistic regression (minutes, not seconds)"
    )
    add("--baselines", action="store_true", help="add chance and k-nearest neighbours on raw pixels")
    add("--pixel-side", type=_positive, default=32, help="side to which raw pixels are resized")
    add(
        "--class-list",
        type=Path,
        help="synset ids, one per line: their accuracy and the others' are told apart",
    )
    add("--styles", action="store_true", help="break down by file name prefix: twemoji_p0.png is twemoji")
    return made


def add_common(made: argparse.ArgumentParser) -> None:
    """Options of every script here."""
    add = made.add_argument
    add("--data", type=Path, required=True, help="folder of images by class; see validate/README.md")
    add("--url", default="127.0.0.1:8001", help="host:port of the server's gRPC endpoint")
    add("--output", type=Path, default=Path("validation"), help="folder for the report")
    add("--cache", type=Path, default=Path(".validation-cache"), help="folder for embeddings; safe to delete")
    add("--on-error", choices=("skip", "stop"), default="skip", help="at a bad row, class or file")
    add("--valid-per-class", type=int, default=0, help="most validation images per class; 0: all")
    add("--batch", type=int, default=0, help="rows of one request; 0: 16 images, 64 texts")
    add("--concurrency", type=_positive, default=8, help="requests under way at once")
    add("--timeout", type=float, default=60.0, help="seconds to wait for one answer")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def open_session(options: argparse.Namespace, models: Sequence[str]) -> tuple[Dataset, Session]:
    """The scanned folder and a session with a server of `models`. The options are those of `add_common`."""
    dataset = load_dataset(options.data, options.on_error, options.valid_per_class)
    for problem in dataset.problems:
        print(f"left out: {problem}", file=sys.stderr)
    server, load = Server(options.url, options.timeout), Load(options.batch, options.concurrency)
    server.require(models)
    return dataset, Session(server, options.cache, load, options.on_error)


def run(options: argparse.Namespace) -> Report:
    """Measure, print the table and write `report.json`, `report.md` and `report.png`.

    Raises:
        ValidationError: the data set or the server does not allow it.
    """
    listed = read_class_list(options.class_list) if options.class_list else set()
    models = ["embed_image", "embed_text"] if options.protocols else ["embed_image"]
    dataset, session = open_session(options, models)
    with session:
        valid = session.embed_images(dataset, "valid")
        train = None
        if options.shots and dataset.train:
            dataset.train = drawn(dataset.train, max(options.shots), range(options.seeds))
            train = session.embed_images(dataset, "train")
        labels = np.array([sample.label for sample in dataset.valid])
        rows: list[Row] = []
        if train is not None:
            rows += _few_shot_rows(options, dataset, train, valid)
        for protocol in zero_shot_protocols(options.protocols, dataset.classes):
            rows.append(zero_shot_row(protocol, session.embed_texts, valid, labels))
    if not rows:
        raise DatasetError("nothing to measure: no --protocols, and no training images for --shots")
    report = Report(
        session.info,
        dataset,
        rows,
        dataset.problems + session.problems,
        _groups(dataset, options.styles, listed),
        options.baselines,
        {name: str(value) for name, value in vars(options).items()},
    )
    print(published_table(rows))
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(report, options.output / "report.json")
    (options.output / "report.md").write_text(markdown(report), encoding="utf-8")
    draw(report, class_means(valid, labels), options.output / "report.png")
    print(f"\nwritten: {options.output}/report.md, report.json, report.png", file=sys.stderr)
    return report


def _groups(dataset: Dataset, styles: bool, listed: set[str]) -> dict[str, NDArray[np.bool_]]:
    """Validation images whose accuracy is also told apart, bool [n] by name."""
    groups = {}
    if styles:
        names = np.array([sample.style for sample in dataset.valid])
        groups = {str(name): names == name for name in np.unique(names)}
    if listed:
        inside = np.array([dataset.classes[sample.label].synset in listed for sample in dataset.valid])
        groups |= {f"{name}, classes not listed": chosen & ~inside for name, chosen in groups.items()}
        groups |= {"classes not listed": ~inside, "listed classes": inside}
    return {name: chosen for name, chosen in groups.items() if chosen.any()}


def _few_shot_rows(options: argparse.Namespace, dataset: Dataset, train: Floats, valid: Floats) -> list[Row]:
    seeds = range(options.seeds)
    rows = [few_shot_row(dataset, train, valid, shots, seeds) for shots in options.shots]
    if options.linear_probe:
        rows += [linear_probe_row(dataset, train, valid, shots, seeds) for shots in options.shots]
    if options.baselines:
        pixels = [
            pixel_features(samples, options.pixel_side, f"{part} pixels")
            for part, samples in (("train", dataset.train), ("valid", dataset.valid))
        ]
        rows += [raw_pixel_row(dataset, pixels[0], pixels[1], shots, seeds) for shots in options.shots]
    return rows


if __name__ == "__main__":
    sys.exit(main())
