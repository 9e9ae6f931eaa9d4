"""The text tower on a CPU: OpenVINO with the last block at one position, at every position, and transformers.

    python -m benchmarks.text_tower --checkpoint data/base-16-224 --output FILE.csv

All ways alternate over `--rounds`. Ratios are those of one round to `every position`, and the median counts.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from openvino import Model, PartialShape, Type
from openvino import opset13 as op

from benchmarks.peer_model import TransformersModel
from benchmarks.records import about, cosine, write_csv
from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.model_config import TextConfig
from siglip_serve.config import Dtype
from siglip_serve.engine.openvino import graph
from siglip_serve.engine.openvino.compiled import Compiled
from siglip_serve.engine.plan import Plan
from siglip_serve.engine.texts import embedded_places
from siglip_serve.towers.parameters import Parameters
from siglip_serve.towers.stored import StoredText

Embed = Callable[[NDArray[np.int64]], NDArray[np.float32]]


def build_every_position(parameters: Parameters, config: TextConfig) -> Model:
    """Build the graph of `graph.build_text` with the whole of its last block, for SigLIP."""
    tokens = config.max_position_embeddings
    ids = op.parameter(PartialShape([-1, tokens]), Type.i64, "ids")
    x = op.gather(graph._constant(parameters["embeddings.token_embedding.weight"]), ids, graph._ints(0))
    x = op.add(x, graph._constant(parameters["embeddings.position_embedding.weight"]))
    x = graph._encoder(x, parameters, config, range(config.num_hidden_layers), tokens)
    x = op.gather(x, np.int64(tokens - 1), np.int64(1))
    x = graph._linear(graph._layer_norm(x, parameters, "final_layer_norm", config), parameters, "head")
    return Model([x], [ids], "text")


def transformers(checkpoint: Path, dtype: str) -> Embed:
    """The text tower of transformers, for ids [n, T]."""
    model = TransformersModel(checkpoint, dtype=dtype).model.text_model

    @torch.inference_mode()
    def embed(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = model(input_ids=torch.from_numpy(ids)).pooler_output.float().numpy()
        return found

    return embed


def ways(checkpoint: Path, tower: StoredText, dtype: str) -> dict[str, Embed]:
    """All ways in one dtype."""
    plan = Plan("cpu", cast(Dtype, dtype), "openvino").resolve()
    last = Compiled(graph.build_text(tower.parameters, tower.config), plan)
    return {
        "every position": Compiled(build_every_position(tower.parameters, tower.config), plan),
        "last position": lambda ids: last(ids, embedded_places(tower.config, ids)),
        "transformers": transformers(checkpoint, dtype),
    }


def measure(
    compared: dict[str, Embed], ids: NDArray[np.int64], reference: NDArray[np.float32], rounds: int
) -> list[dict[str, str]]:
    """Time each way with the same ids, in turn, after one pass that is not timed."""
    closeness = {name: cosine(embed(ids), reference).min() for name, embed in compared.items()}
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    for _ in range(rounds):
        for name, embed in compared.items():
            start = time.perf_counter()
            embed(ids)
            seconds[name].append(time.perf_counter() - start)
    whole = seconds["every position"]
    return [
        {
            "way": name,
            "rows": str(len(ids)),
            "texts_per_second": f"{len(ids) / median(times):.2f}",
            "fastest": f"{len(ids) / min(times):.2f}",
            "ratio": f"{median(a / b for a, b in zip(whole, times, strict=True)):.3f}",
            "cosine_min": f"{closeness[name]:.7f}",
        }
        for name, times in seconds.items()
    ]


def main() -> None:
    """Measure all dtypes and numbers of rows, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="directory, as of `random_checkpoint --full-text`")
    add("--label", help="of the checkpoint in the table, default: its folder's name")
    add("--rows", type=int, nargs="+", default=[8, 1], help="texts of a pass, default 8 1")
    add("--rounds", type=int, default=9, help="default %(default)s")
    add("--device-name", help="for the table; default: this machine's CPU")
    add("--output", type=Path, help="CSV file to append to")
    options = parser.parse_args()
    tower = StoredText.open(load_config(options.checkpoint))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, tower.config.vocab_size, (max(options.rows), tower.config.max_position_embeddings))
    reference = transformers(options.checkpoint, "float32")(ids)
    for dtype in ("float32", "bfloat16"):
        compared = ways(options.checkpoint, tower, dtype)
        for rows in options.rows:
            shared: dict[str, Any] = {
                **about(["openvino", "torch", "transformers"], options.device_name),
                "label": options.label or options.checkpoint.name,
                "dtype": dtype,
                "rounds": str(options.rounds),
                "load_average": f"{os.getloadavg()[0]:.1f}",
            }
            found = measure(compared, ids[:rows], reference[:rows], options.rounds)
            for row in found:
                print(dtype, row, flush=True)
            if options.output:
                write_csv(options.output, [{**shared, **row} for row in found], append=True)


if __name__ == "__main__":
    main()
