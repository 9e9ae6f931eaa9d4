"""Exact and approximate search over a million stored vectors, next to NumPy's own product.

    python -m benchmarks.search --output benchmarks/results/search.csv
    python -m benchmarks.search --part index --append --output benchmarks/results/search.csv
    python -m benchmarks.search --part lance --append --output benchmarks/results/search.csv

The vectors are drawn from a seed: clusters of clusters around a common mean, in directions of falling
variance, which is how embeddings of photographs lie. Queries near rows stand for pictures, and queries with
another mean and half of the length in no cluster's direction for texts. Every kind of stored number is a
folder as `siglip-serve bulk` writes it. `numpy_ms` is `matrix @ query` on the float32 vectors in memory, in
the same run. Resident memory is that of a process that opens the folder and searches. Mapped
pages count there, and private memory is without them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from siglip_serve_client.commands.search.build import build_index
from siglip_serve_client.commands.search.collection import Collection, open_collection
from siglip_serve_client.commands.search.duplicates import estimated_seconds
from siglip_serve_client.commands.search.exact import ExactSearch, Hit
from siglip_serve_client.compact import compact

from benchmarks.records import about, write_csv

__all__ = ["main", "make_folder", "overlap", "times", "vectors"]

Floats = NDArray[np.float32]
Search = Callable[[Floats], list[int]]

NEAREST, QUERIES, BLOCK, SEED = 10, 40, 20_000, 7
KINDS = ("float32", "float16", "int8", "binary")
PROBES = (4, 8, 16, 32, 64, 128)
PACKAGES = ("numpy", "pyarrow", "pylance")
COLUMNS = (
    *("search", "default", "image_best_ms", "image_ms", "image_overlap", "text_best_ms", "text_ms"),
    *("text_overlap", "load_s", "private_mb", "resident_mb", "disk_mb", "duplicates_s"),
)
# Lists that Lance reads, and how many times as many rows it scores once more from the file.
LANCE = ((20, 10), (50, 10), (50, 50), (100, 50))


def vectors(rows: int, width: int, seed: int = SEED) -> Iterator[Floats]:
    """Unit vectors [rows, width] in blocks, of 20 clusters that each have many clusters of their own."""
    generator = np.random.default_rng(seed)
    directions = _directions(width)
    large = generator.standard_normal((20, width), np.float32)
    small = large[generator.integers(0, 20, max(20, rows // 50))] * 0.6
    small += generator.standard_normal(small.shape, np.float32)
    # Few clusters are large, as subjects of photographs are.
    weights = 1 / np.arange(1, len(small) + 1) ** 0.8
    mean = generator.standard_normal(width).astype(np.float32) * 0.05
    for start in range(0, rows, BLOCK):
        count = min(BLOCK, rows - start)
        owners = generator.choice(len(small), count, p=weights / weights.sum())
        block = small[owners] + generator.standard_normal((count, width), np.float32)
        yield _unit(block @ directions + mean)


def text_queries(rows: Floats, seed: int = SEED + 1) -> Floats:
    """Queries [Q, D] that lie apart from all rows, each a little nearer to one of them."""
    generator = np.random.default_rng(seed)
    mean = _unit(generator.standard_normal((1, rows.shape[1]), np.float32))
    noise = _unit(generator.standard_normal(rows.shape, np.float32))
    return _unit(0.35 * rows + 0.5 * noise + 0.8 * mean)


def image_queries(rows: Floats, seed: int = SEED + 2) -> Floats:
    """Queries [Q, D] with a cosine of about 0.9 with a row each."""
    noise = np.random.default_rng(seed).standard_normal(rows.shape, np.float32)
    return _unit(rows + 0.5 * _unit(noise))


def _directions(width: int) -> Floats:
    """Orthogonal directions [D, D], scaled so that the variances fall as 1 / n."""
    generator = np.random.default_rng(SEED)
    turned = np.linalg.qr(generator.standard_normal((width, width)))[0]
    return (turned / np.sqrt(np.arange(1, width + 1))[:, None]).astype(np.float32)


def _unit(rows: Floats) -> Floats:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def make_folder(folder: Path, kind: str, rows: int, width: int) -> Path:
    """Write the vectors as a folder of `siglip-serve bulk` in the format npy."""
    import pyarrow
    import pyarrow.parquet

    (folder / "embeddings").mkdir(parents=True, exist_ok=True)
    stored, dtype = (-(-width // 8), np.uint8) if kind == "binary" else (width, np.dtype(kind))
    file = folder / "embeddings" / "unit-000.npy"
    array = np.lib.format.open_memmap(file, "w+", dtype, (rows, stored))  # type: ignore[no-untyped-call]
    start = 0
    for block in vectors(rows, width):
        small = {"int8": "int8", "binary": "ubinary"}.get(kind)
        array[start : start + len(block)] = compact(block, small) if small else block
        start += len(block)
    array.flush()
    ids = pyarrow.table({"id": [f"{row}.jpg" for row in range(rows)]})
    pyarrow.parquet.write_table(ids, file.with_suffix(".rows.parquet"))
    described = {"version": 1, "format": "npy", "dtype": kind, "width": width, "normalized": True}
    (folder / "bulk.json").write_text(json.dumps(described))
    return folder


def measured(search: Search, queries: Floats) -> tuple[list[list[int]], list[float]]:
    """Rows found for each query, and the milliseconds of each. The first query is asked twice."""
    search(queries[0])
    found, spent = [], []
    for query in queries:
        begin = time.perf_counter()
        found.append(search(query))
        spent.append((time.perf_counter() - begin) * 1000)
    return found, spent


def times(kind: str, spent: list[float]) -> dict[str, str]:
    """Columns of the fastest and the median query."""
    return {f"{kind}_best_ms": f"{min(spent):.1f}", f"{kind}_ms": f"{np.median(spent):.1f}"}


def overlap(found: list[list[int]], exact: list[list[int]]) -> float:
    """Share of the exact rows that were found, over all queries."""
    pairs = zip(found, exact, strict=True)
    return float(np.mean([len(set(some) & set(all_)) / len(all_) for some, all_ in pairs]))


def main() -> None:
    """Make the folders, measure, and write the table."""
    options = _parser().parse_args()
    folders = {kind: options.data / kind for kind in KINDS}
    for kind, folder in folders.items():
        if not (folder / "bulk.json").is_file():
            make_folder(folder, kind, options.rows, options.width)
    # One process at a time, so that the memory of each is its own.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        matrix = pool.apply(_matrix, (folders["float32"],))
        exact = matrix.pop("found")
        if options.part == "exact":
            rows = [pool.apply(_exact, (folder, exact)) for folder in folders.values()]
        else:
            rows = pool.apply(_lists if options.part == "index" else _lance, (folders["float32"], exact))
    constant = {"rows": str(options.rows), "width": str(options.width), **about(PACKAGES)}
    filled = [{**{name: row.get(name, "") for name in COLUMNS}, **matrix, **constant} for row in rows]
    for row in filled:
        print(row, flush=True)
    write_csv(options.output, filled, options.append)


def _queries(collection: Collection) -> dict[str, Floats]:
    chosen = np.random.default_rng(SEED + 3).choice(len(collection), QUERIES, replace=False)
    rows = collection.unit(collection.take(np.sort(chosen)))
    return {"image": image_queries(rows), "text": text_queries(rows)}


def _rows_of(hits: list[Hit]) -> list[int]:
    return [hit.index for hit in hits]


def _matrix(folder: Path) -> dict[str, Any]:
    """Rows and time of NumPy's product with all vectors in memory."""
    collection = open_collection(folder)
    matrix = np.load(next((folder / "embeddings").glob("*.npy")))

    def search(query: Floats) -> list[int]:
        scores = matrix @ query
        best = np.argpartition(scores, -NEAREST)[-NEAREST:]
        return [int(row) for row in best[np.argsort(-scores[best])]]

    queries = _queries(collection)
    _, spent = measured(lambda query: (matrix @ query)[:1].tolist(), queries["image"])
    found = {name: [search(query) for query in asked] for name, asked in queries.items()}
    return {"found": {**found, "queries": queries}, **times("numpy", spent)}


def _exact(folder: Path, exact: dict[str, Any]) -> dict[str, str]:
    begin = time.perf_counter()
    collection = open_collection(folder)
    search = ExactSearch(collection)
    search.search(exact["queries"]["image"][0], NEAREST)
    load = time.perf_counter() - begin
    row = {"search": f"exact, {folder.name}", "load_s": f"{load:.2f}"}
    for name, asked in exact["queries"].items():
        found, spent = measured(lambda query: _rows_of(search.search(query, NEAREST)), asked)
        row |= {**times(name, spent), f"{name}_overlap": f"{overlap(found, exact[name]):.4f}"}
    memory = psutil.Process().memory_info()
    row["private_mb"] = f"{(memory.rss - memory.shared) / 1e6:.0f}"
    row["resident_mb"] = f"{memory.rss / 1e6:.0f}"
    row["disk_mb"] = f"{sum(file.stat().st_size for file in (folder / 'embeddings').glob('*.npy')) / 1e6:.0f}"
    if collection.kind == "float32":
        row["duplicates_s"] = f"{estimated_seconds(collection):.0f}"
    return row


def _lists(folder: Path, exact: dict[str, Any]) -> list[dict[str, str]]:
    """The index at each number of probes, with the time that building it took."""
    shutil.rmtree(folder / "index", ignore_errors=True)
    begin = time.perf_counter()
    lists, _ = build_index(open_collection(folder), 0.95)
    load = f"{time.perf_counter() - begin:.1f}"
    size = sum(file.stat().st_size for file in (folder / "index").iterdir())
    rows = []
    for probes in sorted({*PROBES, lists.probes}):
        row = {"search": f"index, {probes} of {len(lists.centres)} lists", "load_s": load}
        row["default"] = "yes" if probes == lists.probes else ""
        for name, asked in exact["queries"].items():
            found, spent = measured(
                lambda query, probes=probes: _rows_of(lists.search(query, NEAREST, probes)[0]),  # type: ignore[misc]
                asked,
            )
            row |= {**times(name, spent), f"{name}_overlap": f"{overlap(found, exact[name]):.4f}"}
        rows.append({**row, "disk_mb": f"{size / 1e6:.0f}"})
    return rows


def _lance(folder: Path, exact: dict[str, Any]) -> list[dict[str, str]]:
    """Lance's IVF-PQ, the index of LanceDB, on the same vectors."""
    import lance
    import pyarrow

    vectors = np.load(next((folder / "embeddings").glob("*.npy")), mmap_mode="r")
    rows, width = vectors.shape
    schema = pyarrow.schema(
        [("row", pyarrow.int64()), ("embedding", pyarrow.list_(pyarrow.float32(), width))]
    )

    def batches() -> Iterator[Any]:
        for start in range(0, rows, BLOCK):
            part = np.ascontiguousarray(vectors[start : start + BLOCK])
            numbers = pyarrow.array(np.arange(start, start + len(part)))
            lists = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(part.reshape(-1)), width)
            yield pyarrow.record_batch([numbers, lists], schema=schema)

    place = folder.with_name("lance")
    shutil.rmtree(place, ignore_errors=True)
    data = lance.write_dataset(batches(), str(place), schema=schema)
    written = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    begin = time.perf_counter()
    data.create_index("embedding", "IVF_PQ", num_partitions=1000, num_sub_vectors=width // 8, metric="cosine")
    load = f"{time.perf_counter() - begin:.1f}"
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file()) - written
    found = []
    for probes, refine in LANCE:
        row = {"search": f"Lance IVF-PQ, {probes} of 1000 lists, refine {refine}", "load_s": load}

        def search(query: Floats, probes: int = probes, refine: int = refine) -> list[int]:
            asked = {"column": "embedding", "q": query, "k": NEAREST, "nprobes": probes}
            table = data.to_table(columns=["row"], nearest={**asked, "refine_factor": refine})
            return [int(row) for row in table.column("row").to_pylist()]

        for name, queries in exact["queries"].items():
            rows_found, spent = measured(search, queries)
            row |= {**times(name, spent), f"{name}_overlap": f"{overlap(rows_found, exact[name]):.4f}"}
        found.append({**row, "disk_mb": f"{size / 1e6:.0f}"})
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure the search in stored embeddings.")
    parser.add_argument("--rows", type=int, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=768, help="default: %(default)s")
    parser.add_argument("--data", type=Path, default=Path("data/search"), help="default: %(default)s")
    parser.add_argument(
        "--part", choices=("exact", "index", "lance"), default="exact", help="default: %(default)s"
    )
    parser.add_argument("--append", action="store_true", help="keep the rows of the file")
    parser.add_argument("--output", type=Path, required=True, help="CSV file")
    return parser


if __name__ == "__main__":
    main()
