"""Outputs of `siglip-serve bulk` with vectors that a test chooses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from siglip_serve_client.compact import compact

__all__ = ["as_stored", "write_bulk"]


def as_stored(vectors: NDArray[np.float32], kind: str) -> NDArray[Any]:
    """Vectors [N, D] as the type of an output."""
    if kind in ("int8", "binary"):
        return compact(vectors, "ubinary" if kind == "binary" else kind)
    return vectors.astype(kind)


def write_bulk(
    folder: Path,
    vectors: NDArray[np.float32],
    form: str = "parquet",
    kind: str = "float32",
    ids: Sequence[str] = (),
    digests: Sequence[str] = (),
    **described: Any,
) -> Path:
    """Write vectors [N, D] as two units, of which the first has a third of the rows."""
    import pyarrow
    import pyarrow.parquet

    stored = as_stored(vectors, kind)
    (folder / "embeddings").mkdir(parents=True, exist_ok=True)
    cells = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(stored.reshape(-1)), stored.shape[1])
    columns = {
        "id": list(ids) or [f"{row}.jpg" for row in range(len(vectors))],
        "sha256": list(digests) or [str(row) for row in range(len(vectors))],
        "size": [1] * len(vectors),
    }
    table = pyarrow.table(columns)
    first = len(vectors) // 3
    for unit, part in (("a-0", slice(0, first)), ("b-0", slice(first, len(vectors)))):
        file, texts = folder / "embeddings" / unit, table.slice(part.start, part.stop - part.start)
        if form == "npy":
            np.save(file.with_suffix(".npy"), stored[part])
            pyarrow.parquet.write_table(texts, file.with_suffix(".rows.parquet"))
        elif form == "parquet":
            whole = texts.append_column("embedding", cells[part])
            pyarrow.parquet.write_table(whole, file.with_suffix(".parquet"), row_group_size=7)
    if form == "lance":
        import lance

        lance.write_dataset(table.append_column("embedding", cells), str(folder / "embeddings.lance"))
    about = {"version": 1, "format": form, "dtype": kind, "width": vectors.shape[1], "normalized": False}
    (folder / "bulk.json").write_text(json.dumps({**about, **described}))
    return folder
