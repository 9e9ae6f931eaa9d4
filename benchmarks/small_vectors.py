"""Recall@10 of small vectors against the exact search in float32, on the drawings.

    python -m benchmarks.small_vectors --data data/drawings --output benchmarks/results/small_vectors.csv

Half of the training drawings, chosen by a seed, is the database. Projections are fitted to the other half.
Queries are drawings of held-out vendors, and the first name of every class in a prompt. Recall@10 is the
share of the ten nearest images by the cosine of float32 vectors that a search with small vectors finds among
its ten. The database lies in random order, so equal distances favour no class.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from siglip_serve_client.compact import compact, unit
from siglip_serve_client.projection import Moments, Projection
from tqdm import tqdm

from benchmarks.records import about, write_csv
from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.files import resolve
from siglip_serve.engine.engines import TextEngine, VisionEngine
from siglip_serve.engine.plan import Plan
from siglip_serve.images.preprocess import Preprocessor
from siglip_serve.machine import available_cores
from siglip_serve.texts.tokenizer import load_tokenizer
from siglip_serve.towers.siglip import load_text, load_vision
from validate.dataset import Sample, load_dataset

__all__ = ["Vectors", "Way", "found", "main", "recall", "ways"]

Floats: TypeAlias = NDArray[np.float32]
# Queries and database, as they are stored, to distances [queries, database].
Search: TypeAlias = Callable[[Floats, Floats], NDArray[Any]]

NEAREST, CANDIDATES, BLOCK, CHUNK = 10, 40, 500, 64
PROMPT = "a photo of a {}."
PACKAGES = ("openvino", "numpy")


@dataclass(frozen=True)
class Vectors:
    """Unit vectors [N, D] of one checkpoint.

    Attributes:
        database, fit: of images.
        images, texts: queries.
    """

    database: Floats
    fit: Floats
    images: Floats
    texts: Floats


@dataclass(frozen=True)
class Way:
    """One kind of small vectors, and the search in them.

    Attributes:
        projection: how vectors were shortened.
        size: bytes per vector of the database.
        shorten: vectors [N, D] to [N, dimensions].
    """

    encoding: str
    dimensions: int
    size: float
    search: Search
    projection: str = ""
    shorten: Callable[[Floats], Floats] = lambda vectors: vectors


def by_float32(queries: Floats, database: Floats) -> NDArray[Any]:
    """Negative cosines of unit vectors."""
    return -(queries @ database.T)


def by_float16(queries: Floats, database: Floats) -> NDArray[Any]:
    """Negative cosines of both sides in float16."""
    return by_float32(queries.astype(np.float16).astype(np.float32), _half(database))


def by_int8(queries: Floats, database: Floats) -> NDArray[Any]:
    """Negative inner products of the levels of both sides."""
    levels = compact(queries, "int8"), compact(database, "int8")
    return -(levels[0].astype(np.float32) @ levels[1].T.astype(np.float32))


def by_int8_database(queries: Floats, database: Floats) -> NDArray[Any]:
    """Negative inner products of float32 queries with the levels of the database."""
    return -(queries @ compact(database, "int8").T.astype(np.float32))


def by_uint8(queries: Floats, database: Floats) -> NDArray[Any]:
    """Negative inner products of the levels less 127, the level of 0."""
    left, right = (compact(side, "uint8").astype(np.float32) - 127 for side in (queries, database))
    return -(left @ right.T)


def by_uint8_distance(queries: Floats, database: Floats) -> NDArray[Any]:
    """Euclidean distances of the levels, on which their offset has no influence.

    The square of the query is left out, which does not change the order.
    """
    left, right = (compact(side, "uint8").astype(np.float32) for side in (queries, database))
    return (right**2).sum(1) - 2 * left @ right.T


def by_uint8_product(queries: Floats, database: Floats) -> NDArray[Any]:
    """Negative cosines of the levels with their offset."""
    left, right = (compact(side, "uint8").astype(np.float32) for side in (queries, database))
    return -(unit(left) @ unit(right).T)


def by_bits(queries: Floats, database: Floats) -> NDArray[Any]:
    """Hamming distances."""
    left, right = (np.where(side > 0, 1, -1).astype(np.float32) for side in (queries, database))
    return ((left.shape[1] - left @ right.T) / 2).astype(np.int32)


def by_bits_rescored(queries: Floats, database: Floats) -> NDArray[Any]:
    """Hamming distances, and of the nearest candidates the inner product of float32 query and signs."""
    return _rescored(queries, by_bits(queries, database), np.where(database > 0, 1, -1).astype(np.float32))


def by_bits_then_int8(queries: Floats, database: Floats) -> NDArray[Any]:
    """Hamming distances, and of the nearest candidates the inner product of float32 query and int8."""
    return _rescored(queries, by_bits(queries, database), compact(database, "int8").astype(np.float32))


def _rescored(queries: Floats, distances: NDArray[Any], database: Floats) -> NDArray[Any]:
    candidates = nearest(distances, CANDIDATES)
    scores = np.full(distances.shape, np.inf, np.float32)
    products = np.einsum("qd,qcd->qc", queries, database[candidates])
    np.put_along_axis(scores, candidates, -products, 1)
    return scores


def _half(vectors: Floats) -> Floats:
    return vectors.astype(np.float16).astype(np.float32)


def nearest(distances: NDArray[Any], count: int) -> NDArray[np.intp]:
    """The places of the smallest distances of each row. Of equal ones the first counts."""
    places: NDArray[np.intp] = np.argsort(distances, axis=1, kind="stable")[:, :count]
    return places


def found(way: Way, queries: Floats, database: Floats) -> NDArray[np.intp]:
    """The nearest images [N, 10] of each query."""
    short, stored = way.shorten(queries), way.shorten(database)
    blocks = range(0, len(short), BLOCK)
    return np.concatenate(
        [nearest(way.search(short[start : start + BLOCK], stored), NEAREST) for start in blocks]
    )


def recall(places: NDArray[np.intp], exact: NDArray[np.intp]) -> tuple[float, float]:
    """Recall of each row's places, its mean over rows, and half of the 95 % interval of the mean."""
    shares = (places[:, :, None] == exact[:, None, :]).any(1).mean(1)
    return float(shares.mean()), float(1.96 * shares.std(ddof=1) / np.sqrt(len(shares)))


def ways(vectors: Vectors) -> list[Way]:
    """All kinds, those of the gateway first."""
    width = vectors.fit.shape[1]
    made = [
        Way("float32", width, 4 * width, by_float32),
        Way("float16", width, 2 * width, by_float16),
        Way("int8", width, width, by_int8),
        Way("int8, float32 query", width, width, by_int8_database),
        Way("uint8, less 127", width, width, by_uint8),
        Way("uint8, Euclidean", width, width, by_uint8_distance),
        Way("uint8, cosine", width, width, by_uint8_product),
        Way("binary", width, width / 8, by_bits),
        Way("binary, rescored", width, width / 8, by_bits_rescored),
        Way("binary, rescored with int8", width, width / 8 + width, by_bits_then_int8),
    ]
    for name, shorten in _projections(vectors).items():
        for part in (2, 4, 8):
            short = width // part
            cut = _to(shorten, short)
            made.append(Way("float32", short, 4 * short, by_float32, name, cut))
            made.append(Way("int8", short, short, by_int8, name, cut))
            made.append(Way("binary", short, short / 8, by_bits, name, cut))
            made.append(Way("binary, rescored", short, short / 8, by_bits_rescored, name, cut))
    return made


def _projections(vectors: Vectors) -> dict[str, Callable[[Floats, int], Floats]]:
    """Ways to shorten vectors: that of `siglip-serve fit-projection` and others."""
    fit = vectors.fit.astype(np.float64)
    mean = fit.mean(0)
    served, both = _fitted(vectors.fit), _fitted(np.concatenate([vectors.fit, vectors.texts[::2]]))
    uncentred = np.linalg.svd(fit, full_matrices=False)[2]
    random = np.linalg.qr(np.random.default_rng(0).normal(size=(fit.shape[1],) * 2))[0]
    return {
        "fit-projection": served.project,
        "around 0 instead of the mean": lambda rows, k: unit((rows @ uncentred[:k].T).astype(np.float32)),
        "with the mean subtracted": lambda rows, k: unit(
            ((rows - mean) @ served.matrix[:k].T).astype(np.float32)
        ),
        "fitted to texts too": both.project,
        "random directions": lambda rows, k: unit((rows @ random[:k].T).astype(np.float32)),
        "first values": lambda rows, k: unit(rows[:, :k]),
    }


def _fitted(vectors: Floats) -> Projection:
    moments = Moments(vectors.shape[1])
    moments.add(vectors)
    return moments.fit(vectors.shape[1] // 2, "")


def _to(shorten: Callable[[Floats, int], Floats], dimensions: int) -> Callable[[Floats], Floats]:
    return lambda vectors: shorten(vectors, dimensions)


def main() -> None:
    """Embed what is not at hand, search in every way, and write the table."""
    options = _parser().parse_args()
    vectors = _vectors(options)
    queries = {"image": vectors.images, "text": vectors.texts}
    exact = {name: nearest_exact(rows, vectors.database) for name, rows in queries.items()}
    named = about(PACKAGES)
    rows = []
    for way in tqdm(ways(vectors), unit="way", disable=None):
        row = {
            "encoding": way.encoding,
            "dimensions": str(way.dimensions),
            "projection": way.projection,
            "bytes": f"{way.size:g}",
        }
        for name, given in queries.items():
            mean, half = recall(found(way, given, vectors.database), exact[name])
            row |= {f"{name}_recall": f"{mean:.4f}", f"{name}_interval": f"{half:.4f}"}
        rows.append(row)
        print(
            f"{way.encoding:27} {way.dimensions:4} {way.projection:29} {row['bytes']:>5} bytes  "
            f"image {row['image_recall']}  text {row['text_recall']}",
            flush=True,
        )
    constant = {
        "checkpoint": options.checkpoint.name,
        "database": str(len(vectors.database)),
        "fitted_to": str(len(vectors.fit)),
        "image_queries": str(len(vectors.images)),
        "text_queries": str(len(vectors.texts)),
    }
    write_csv(options.output, [{**row, **constant, **named} for row in rows])


def nearest_exact(queries: Floats, database: Floats) -> NDArray[np.intp]:
    """The nearest images [N, 10] by the cosine of float32 vectors."""
    return found(Way("float32", database.shape[1], 0, by_float32), queries, database)


def _vectors(options: argparse.Namespace) -> Vectors:
    kept: Path = options.vectors
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez(kept, **_embedded(options))
    with np.load(kept) as content:
        train, valid, texts = content["train"], content["valid"], content["texts"]
    half = len(train) // 2  # they are in random order
    return Vectors(train[:half], train[half:], valid, texts)


def drawn(samples: Sequence[Sample], most: int, seed: int) -> list[Sample]:
    """At most `most` samples in a random order. 0 means all."""
    order = np.random.default_rng(seed).permutation(len(samples))
    return [samples[place] for place in order[: most or None]]


def _embedded(options: argparse.Namespace) -> dict[str, Floats]:
    data = load_dataset(options.data, "stop")
    names = [entry.first_name for entry in data.classes]
    path = resolve(str(options.checkpoint))
    config = load_config(path)
    plan = Plan("cpu", "float32", "openvino", 0, available_cores())
    vision, preprocess = VisionEngine(load_vision(path), config.image, plan), Preprocessor(config.image)
    text, tokenizer = TextEngine(load_text(path), plan), load_tokenizer(config)

    def images(samples: Sequence[Sample], name: str) -> Floats:
        rows = []
        for start in tqdm(range(0, len(samples), CHUNK), desc=name, unit="batch", disable=None):
            pixels = [preprocess(sample.path.read_bytes()) for sample in samples[start : start + CHUNK]]
            rows.append(unit(vision(np.stack(pixels)).outputs["EMBEDDING"]))
        return np.concatenate(rows)

    ids = np.stack([tokenizer(PROMPT.format(name), True) for name in names])
    rows = [text(ids[start : start + CHUNK]).outputs["EMBEDDING"] for start in range(0, len(ids), CHUNK)]
    return {
        "train": images(drawn(data.train, options.images, options.seed), "train"),
        "valid": images(drawn(data.valid, options.queries, options.seed), "valid"),
        "texts": unit(np.concatenate(rows)),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/drawings"), help="ImageNet's layout (default: %(default)s)")
    add("--checkpoint", type=Path, default=Path("checkpoints/siglip-tiny"))
    add("--images", type=int, default=0, help="training drawings, of both halves (default: all)")
    add("--queries", type=int, default=4000, help="drawings that are searched for (default: %(default)s)")
    add("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    add("--vectors", type=Path, default=Path("build/small_vectors.npz"), help="embeddings, kept for reruns")
    add("--output", type=Path, default=Path("build/bench/small_vectors.csv"))
    return parser


if __name__ == "__main__":
    main()
