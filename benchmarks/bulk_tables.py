"""The tables and figures of bulk jobs in `docs/bulk.md`."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.table_parts import Cell, Column, Key, Source, Summary, Table

__all__ = ["BULK", "BULK_FIGURES"]

_GPU = {"device": "NVIDIA H200"}
_CHECKPOINTS = {"so400m": "so400m/14@384", "base-16-224": "base/16@224"}
_DECODING = {"fast": "processes", "gpu": "the GPU"}
_LOOP_TYPES = {"auto": "bfloat16", "float32": "float32"}
_KEYS = (
    Key("checkpoint", "checkpoint", _CHECKPOINTS),
    Key("dtype", "dtype"),
    Key("decoded by", "preprocess", _DECODING),
)


def _column(heading: str, template: str) -> Column:
    return Column(heading, Cell(template, {}))


BULK: Mapping[str, Table | Summary] = {
    "bulk": Table(
        Source("bulk.csv", _GPU),
        _KEYS,
        (
            _column("img/s", "{images_per_second:,.0f}"),
            _column("engine alone", "{engine_images_per_second:,.0f}"),
            _column("ratio", "{engine_ratio:.3f}"),
            _column("GPU busy", "{embed_busy:.2f}"),
            _column("decoders busy", "{decode_busy:.2f}"),
            _column("fidelity", "{cosine_min:.5f}"),
        ),
    ),
    "bulk-loop": Table(
        Source("bulk.csv", {"device": "AMD EPYC"}),
        (Key("checkpoint", "checkpoint", _CHECKPOINTS), Key("dtype", "dtype", _LOOP_TYPES)),
        (
            _column("img/s", "{images_per_second:.1f}"),
            _column("engine alone", "{engine_images_per_second:.1f}"),
            _column("other loop", "{transformers_images_per_second:.1f}"),
            _column("ratio", "{transformers_ratio:.2f}"),
            _column("fidelity", "{cosine_min:.5f}"),
        ),
    ),
}

_DRIVER = Source("bulk_driver.csv", {"lines": "100000000"})
BULK_FIGURES: Mapping[str, tuple[Source, Cell]] = {
    "bulk-driver": (_DRIVER, Cell("{driver_megabytes:.0f}", {})),
    "bulk-driver-start": (_DRIVER, Cell("{first_unit_seconds:.0f}", {})),
}
