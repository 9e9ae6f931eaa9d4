"""The tables of `--preprocess scaled` in `docs/preprocessing.md`."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.table_parts import Cell, Column, Key, Source, Summary, Table

__all__ = ["SCALED"]

SCALED: Mapping[str, Table | Summary] = {
    "preprocess-scaled": Table(
        Source("preprocess_scaled.csv", {}),
        (
            Key("JPEG", "case", {name: name for name in ("500x375", "1080p", "12 MP")}),
            Key("kB", "kilobytes"),
            Key("to", "size"),
        ),
        (
            Column("`fast`, ms", Cell("{ms_per_image:.2f}", {"mode": "fast"})),
            Column("its decoding", Cell("{decode_ms:.2f}", {"mode": "fast"})),
            Column("`scaled`, ms", Cell("{ms_per_image:.2f}", {"mode": "scaled"})),
            Column("ratio", Cell("{ms_per_image:.2f}", {"mode": "fast"}, over={"mode": "scaled"})),
            Column("largest difference", Cell("{max_abs_diff:.0f}", {"mode": "scaled"})),
            Column("mean difference", Cell("{mean_abs_diff:.3f}", {"mode": "scaled"})),
        ),
    ),
    "scaled-serving": Table(
        Source("serve_load.csv", {}),
        (
            Key(
                "checkpoint and JPEG",
                "label",
                {
                    f"{checkpoint}, JPEG {size}, preprocess {mode}": f"{checkpoint}, {name}, `{mode}`"
                    for checkpoint in ("siglip-tiny", "base/16@224")
                    for size, name in (("4032x3024", "12 MP"), ("1920x1080", "1080p"))
                    for mode in ("fast", "scaled")
                },
            ),
        ),
        (
            Column("img/s", Cell("{images_per_second:.1f}", {})),
            Column("CPU ms per image", Cell("{server_cpu_ms:.1f}", {})),
        ),
    ),
    "scaled-fidelity": Table(
        Source("scaled_fidelity.csv", {}),
        (
            Key("content", "content", {name: name for name in ("photographs", "shapes", "texture", "text")}),
            Key(
                "ratio",
                "ratio",
                {ratio: ratio for ratio in ("1.2 x 2.1", "1.5 x 1.5", "1.7 x 2.2", "3 x 3")},
            ),
        ),
        tuple(
            column
            for scale in ("1/8", "2/8", "4/8")
            for column in (
                Column(f"{scale}: mean difference", Cell("{mean_abs_diff:.2f}", {"scale": scale})),
                Column(f"{scale}: cosine", Cell("{cosine_mean:.4f}", {"scale": scale})),
            )
        ),
    ),
    "scaled-accuracy": Table(
        Source("scaled_accuracy.csv", {}),
        (Key("pictures", "pictures"), Key("classes", "classes")),
        (
            Column("top-1 with `pil`", Cell("{top1_pil:.3f}", {})),
            Column("with `scaled`", Cell("{top1_scaled:.3f}", {})),
            Column("same answer", Cell("{agreement:.3f}", {})),
            Column("mean cosine", Cell("{cosine_mean:.5f}", {})),
            Column("smallest cosine", Cell("{cosine_min:.5f}", {})),
        ),
    ),
}
