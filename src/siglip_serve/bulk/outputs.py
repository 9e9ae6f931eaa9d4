"""Files of the output: one per unit with a row per picture, and one for pictures without an embedding."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from siglip_serve_client.compact import compact

from siglip_serve.bulk.job import Format, Job, VectorType
from siglip_serve.bulk.storage import Folder
from siglip_serve.embeddings.unit import l2_normalize

__all__ = ["FINISHED", "Rows", "finish_output", "finished_units", "stored_vectors", "write_unit"]

_EMBEDDINGS, _FAILED, _FRAGMENTS, _DATASET = "embeddings", "failed", "fragments", "embeddings.lance"
# The folder and the suffix of the file that says that a unit is finished. It is written last.
FINISHED: Mapping[Format, tuple[str, str]] = {
    "parquet": (_EMBEDDINGS, ".parquet"),
    "npy": (_EMBEDDINGS, ".npy"),
    "lance": (_FRAGMENTS, ".json"),
}
_TEXTS = ("id", "path", "sha256")


@dataclass
class Rows:
    """Results of a unit.

    Attributes:
        columns: lists of N by name: id, path, sha256, size, height, width, and the kept columns.
        embeddings: of the pictures, parts [n, D] of an array [N, D].
        text_embeddings: of the captions, likewise.
        no_text: True for each of the N rows whose caption has no embedding.
        failed: keys of pictures without an embedding, and the reasons.
    """

    columns: dict[str, list[Any]] = field(default_factory=dict)
    embeddings: list[NDArray[np.float32]] = field(default_factory=list)
    text_embeddings: list[NDArray[np.float32]] = field(default_factory=list)
    no_text: list[bool] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.columns.get("id", ()))


def stored_vectors(vectors: NDArray[np.float32], kind: VectorType, normalized: bool) -> NDArray[Any]:
    """Convert vectors [N, D] float32 to the type that is stored: binary is uint8 [N, ceil(D / 8)]."""
    if kind in ("int8", "binary"):
        return compact(vectors, "ubinary" if kind == "binary" else kind)
    if normalized:
        vectors = l2_normalize(vectors.astype(np.float64)).astype(np.float32)
    return vectors.astype(kind)


def finished_units(folder: Folder, form: Format) -> set[str]:
    """Names of the units that need no more work."""
    where, suffix = FINISHED[form]
    return {name.removesuffix(suffix) for name in folder.names(where) if name.endswith(suffix)}


def write_unit(folder: Folder, job: Job, unit: str, rows: Rows, width: int) -> None:
    """Write the results of a unit. The last file that appears marks it as finished.

    Args:
        folder: of the output.
        job: whose results they are.
        unit: its name.
        rows: in the order of the unit.
        width: D, of vectors that no row has brought.

    Raises:
        OSError: a file cannot be written.
    """
    import pyarrow

    if rows.failed:
        keys, reasons = zip(*rows.failed, strict=True)
        folder.write(f"{_FAILED}/{unit}.parquet", _parquet(pyarrow.table({"id": keys, "reason": reasons})))
    embedding = _stored(rows.embeddings, width, job)
    table = pyarrow.table(_columns(rows, job, width))
    if job.format == "npy":
        folder.write(f"{_EMBEDDINGS}/{unit}.rows.parquet", _parquet(table))
        file = io.BytesIO()
        np.save(file, embedding)
        folder.write(f"{_EMBEDDINGS}/{unit}.npy", file.getbuffer())
        return
    table = table.append_column("embedding", _lists(embedding))
    if job.format == "parquet":
        counts = {"unit": unit, "rows": len(rows), "failed": len(rows.failed)}
        table = table.replace_schema_metadata({"siglip_serve.unit": json.dumps(counts)})
        folder.write(f"{_EMBEDDINGS}/{unit}.parquet", _parquet(table))
    else:
        _write_fragment(folder, unit, table)


def finish_output(folder: Folder, form: Format) -> None:
    """Make one Lance dataset of the fragments of all units. Other formats need no end."""
    if form != "lance":
        return
    import lance

    fragments, schema = [], None
    for name in sorted(folder.names(_FRAGMENTS)):
        described = json.loads(folder.read(f"{_FRAGMENTS}/{name}") or b"{}")
        fragments += [lance.FragmentMetadata.from_json(json.dumps(each)) for each in described["fragments"]]
        schema = schema or _schema_from(described["schema"])
    if fragments:
        operation = lance.LanceOperation.Overwrite(schema, fragments)
        lance.LanceDataset.commit(folder.join(_DATASET), operation)


def _write_fragment(folder: Folder, unit: str, table: Any) -> None:
    from lance.fragment import write_fragments

    written = write_fragments(table, folder.join(_DATASET), mode="create", data_storage_version="stable")
    described = {
        "fragments": [each.to_json() for each in written],
        "schema": table.schema.serialize().to_pybytes().hex(),
    }
    folder.write(f"{_FRAGMENTS}/{unit}.json", json.dumps(described).encode())


def _schema_from(text: str) -> Any:
    import pyarrow

    return pyarrow.ipc.read_schema(pyarrow.py_buffer(bytes.fromhex(text)))


def _stored(parts: Sequence[NDArray[np.float32]], width: int, job: Job) -> NDArray[Any]:
    whole = np.concatenate(parts) if parts else np.empty((0, width), np.float32)
    return stored_vectors(whole, job.vectors, job.normalized)


def _columns(rows: Rows, job: Job, width: int) -> dict[str, Any]:
    """Arrow columns of everything but the embedding, with the same types in every unit."""
    import pyarrow

    kinds = {**dict.fromkeys(_TEXTS, pyarrow.string()), "size": pyarrow.int64()}
    kinds |= {"height": pyarrow.int32(), "width": pyarrow.int32()}
    kinds |= dict.fromkeys(job.columns.all_kept, pyarrow.string())
    if job.labels.names:
        kinds["labels"] = pyarrow.list_(pyarrow.string())
        kinds["probabilities"] = pyarrow.list_(pyarrow.float32())
    columns = {name: pyarrow.array(rows.columns.get(name, []), kind) for name, kind in kinds.items()}
    if job.columns.text:
        columns["text_embedding"] = _lists(_stored(rows.text_embeddings, width, job), rows.no_text)
    return columns


def _lists(vectors: NDArray[Any], missing: Sequence[bool] | None = None) -> Any:
    import pyarrow

    values = pyarrow.array(vectors.reshape(-1))
    mask = None if missing is None else pyarrow.array(missing)
    return pyarrow.FixedSizeListArray.from_arrays(values, vectors.shape[1], mask=mask)


def _parquet(table: Any) -> memoryview:
    """The table as a Parquet file. Vectors do not compress, and take no dictionary."""
    import pyarrow
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    vectors = [field.name for field in table.schema if pyarrow.types.is_fixed_size_list(field.type)]
    texts = [name for name in table.schema.names if name not in vectors]
    parquet.write_table(
        table,
        sink,
        compression={
            **dict.fromkeys(texts, "zstd"),
            **{f"{name}.list.element": "none" for name in vectors},
        },
        use_dictionary=[name for name in texts if name == "path"],
    )
    return memoryview(sink.getvalue())
