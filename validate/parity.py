"""Does the server give what transformers gives, on the same files?

    python -m validate.parity --data DIR --checkpoint CHECKPOINT

Prints cosines of the embeddings, agreement of the predictions and the difference of the accuracies, zero-shot
and few-shot, and what forgetting the text padding costs. The exit status is 1 when an accuracy differs by
more than the tolerance: nothing for a float32 server, 0.2 points for any other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from siglip_serve.embeddings.zero_shot import Floats, cosine, top_k
from validate.dataset import Dataset, few_shot
from validate.errors import ValidationError
from validate.measures.accuracy import CosineStatistics, cosine_statistics, top_k_accuracy
from validate.measures.knn import knn_scores
from validate.protocols import PUBLISHED_PROMPTS
from validate.reference import Reference
from validate.session import Session
from validate.siglip_vision import add_common, open_session

__all__ = ["Agreement", "Side", "compare", "main", "run"]

_POINTS = 0.002


@dataclass(frozen=True)
class Agreement:
    """One classifier on both sides."""

    name: str
    server: float
    reference: float
    agreement: float

    @property
    def difference(self) -> float:
        """Server minus reference, in shares of one."""
        return self.server - self.reference


@dataclass(frozen=True)
class Side:
    """Embeddings of one side: validation images, training images, class texts."""

    valid: Floats
    train: Floats | None
    texts: Floats


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 the server agrees, 1 it does not or an error, 130 stopped."""
    options = _parser().parse_args(arguments)
    try:
        return 0 if run(options) else 1
    except ValidationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what the server answered is kept", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m validate.parity",
        description="Compares the server with transformers on the same files.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_common(made)
    add = made.add_argument
    add("--checkpoint", required=True, help="what the server serves: a directory or owner/name[@revision]")
    add("--shots", type=int, default=10, help="training images per class; 0: no few-shot")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where transformers runs")
    add("--tolerance", type=float, help="largest accuracy difference allowed; 0.002 is 0.2 points")
    return made


def run(options: argparse.Namespace) -> bool:
    """Compare, print and write `parity.json`. True if every accuracy is within the tolerance.

    Raises:
        ValidationError: the data set, the server or the reference does not allow it.
    """
    dataset, session = open_session(options, ["embed_image", "embed_text"])
    prompts = [PUBLISHED_PROMPTS[0].format(text=row.text, label=row.synset) for row in dataset.classes]
    with session:
        server = _server_side(session, dataset, prompts, options.shots)
    model = Reference(options.checkpoint, options.device)
    reference = Side(
        model.embed_images([sample.path for sample in dataset.valid]),
        None if server.train is None else model.embed_images([sample.path for sample in dataset.train]),
        model.embed_texts(prompts),
    )
    unpadded = Side(reference.valid, None, model.embed_texts(prompts, padded=False))
    dtype, tolerance = session.info.dtype, options.tolerance
    if tolerance is None:
        exact = dtype == "float32" and session.info.preprocess == "pil"
        tolerance = 0.0 if exact else _POINTS
    compared, cost = compare(dataset, server, reference), compare(dataset, unpadded, reference)[0]
    cosines = {
        "images": cosine_statistics(server.valid, reference.valid),
        "texts": cosine_statistics(server.texts, reference.texts),
    }
    passed = all(abs(row.difference) <= tolerance for row in compared)
    print(_text(compared, cost, cosines, tolerance, dtype))
    content = {
        "server": session.info.as_dict(),
        "classes": len(dataset.classes),
        "valid_images": len(dataset.valid),
        "tolerance": tolerance,
        "passed": passed,
        "classifiers": [asdict(row) | {"difference": row.difference} for row in compared],
        "without_padding": asdict(cost),
        "cosines": {name: asdict(value) for name, value in cosines.items()},
        "problems": dataset.problems + session.problems,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "parity.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return passed


def _server_side(session: Session, dataset: Dataset, prompts: Sequence[str], shots: int) -> Side:
    """The server's embeddings; `dataset.train` is left with the images that were drawn."""
    valid = session.embed_images(dataset, "valid")
    chosen = few_shot(dataset.train, shots, seed=0) if shots else []
    dataset.train = [dataset.train[position] for position in chosen]
    train = session.embed_images(dataset, "train") if dataset.train else None
    return Side(valid, train, session.embed_texts(prompts))


def compare(dataset: Dataset, server: Side, reference: Side) -> list[Agreement]:
    """Zero-shot, and few-shot where both sides have training images."""
    labels = np.array([sample.label for sample in dataset.valid])
    pairs = [("zero-shot", cosine(server.valid, server.texts), cosine(reference.valid, reference.texts))]
    if server.train is not None and reference.train is not None:
        train_labels = np.array([sample.label for sample in dataset.train])
        scores = [
            knn_scores(side, train_labels, valid, len(dataset.classes))
            for side, valid in ((server.train, server.valid), (reference.train, reference.valid))
        ]
        pairs.append(("few-shot", scores[0], scores[1]))
    return [_agreement(name, ours, theirs, labels) for name, ours, theirs in pairs]


def _agreement(name: str, ours: Floats, theirs: Floats, labels: NDArray[np.int64]) -> Agreement:
    same = (top_k(ours, 1) == top_k(theirs, 1)).mean()
    accuracies = [top_k_accuracy(scores, labels, 1).value for scores in (ours, theirs)]
    return Agreement(name, accuracies[0], accuracies[1], float(same))


def _text(
    compared: Sequence[Agreement],
    cost: Agreement,
    cosines: dict[str, CosineStatistics],
    tolerance: float,
    dtype: str,
) -> str:
    lines = ["| top-1 | server | transformers | difference | same prediction |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {row.server:.4f} | {row.reference:.4f} | {row.difference:+.4f} | {row.agreement:.4f} |"
        for name, row in [*((row.name, row) for row in compared), ("no max_length padding", cost)]
    ]
    lines += ["", "| cosine to transformers | smallest | mean |", "|---|---|---|"]
    lines += [f"| {name} | {value.minimum:.6f} | {value.mean:.6f} |" for name, value in cosines.items()]
    worst = max(abs(row.difference) for row in compared)
    verdict = "within" if worst <= tolerance else "NOT within"
    lines += ["", f"dtype {dtype}: the largest accuracy difference {worst:.4f} is {verdict} {tolerance:.4f}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
