"""This server against transformers behind FastAPI (`peer_fastapi.py`): the same work, machine and load.

One after the other: each is started on the same checkpoint, loaded by the same client processes with
the same pictures, and stopped. Where the two need different environments, run `--only peer` and
`--only ours` with the same `--label`, `--output` and `--embeddings`: the second compares with the first.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from benchmarks.inputs import parse_settings
from benchmarks.load import first_answers, run
from benchmarks.load_clients import Kind
from benchmarks.records import about, cosine, gpu_names, write_csv
from benchmarks.serve_load import (
    add_load_options,
    device_name,
    load_columns,
    make_loads,
    pictures,
    print_result,
)
from benchmarks.servers import Running, run_ours, run_peer

_ROOT = Path(__file__).parents[1]


def ours(options: argparse.Namespace) -> AbstractContextManager[Running]:
    """This repository's server."""
    settings = {} if options.dtype == "auto" else {"dtype": options.dtype}
    settings |= parse_settings(options.setting)
    return run_ours(options.checkpoint, options.device, settings, options.start_timeout)


def peer(options: argparse.Namespace) -> AbstractContextManager[Running]:
    """transformers behind FastAPI."""
    arguments = ["--dtype", options.dtype, "--preprocess", options.peer_preprocess]
    arguments += ["--batch", str(options.peer_batch), "--wait", str(options.peer_wait)]
    arguments += ["--threads", str(options.peer_threads)]
    return run_peer(options.checkpoint, _peer_device(options), arguments, options.start_timeout)


SIDES: dict[str, Callable[[argparse.Namespace], AbstractContextManager[Running]]] = {
    "peer": peer,
    "ours": ours,
}


def measure(side: str, options: argparse.Namespace, jpegs: list[bytes]) -> list[dict[str, str]]:
    """The rows of one side, without those that compare."""
    rows = []
    with SIDES[side](options) as running:
        target = running.target
        if side == "ours":
            target = running.aimed_at(options.client)
        expected = first_answers(target, jpegs)
        similar = _compare(side, expected, options.embeddings)
        for load in make_loads(options, target, jpegs, running.pid):
            result = run(load, expected)
            row = {
                **about(
                    ["torch", "transformers", "fastapi", "uvicorn", "tritonclient", "numpy"],
                    options.device_name,
                ),
                "label": options.label,
                "side": side,
                "checkpoint": options.checkpoint.name,
                **running.columns,
                **load_columns(result, options.size),
                "cosine_min": similar,
            }
            print_result(side, row)
            rows.append(row)
    return rows


def with_ratio(row: dict[str, str], others: list[dict[str, str]]) -> dict[str, str]:
    """The row, with what one side does better if the other side is among the others. Its best run counts.

    `ratio` is our images per second over the peer's; `cpu_ratio` the peer's CPU time per image over ours,
    which other programs on the machine disturb less.
    """
    same = ("label", "checkpoint", "size", "loop", "rate", "concurrency")
    matches = [
        other
        for other in others
        if other["side"] != row["side"] and all(other[key] == row[key] for key in same)
    ]
    if not matches:
        return {**row, "ratio": "", "cpu_ratio": ""}
    best = max(matches, key=lambda other: float(other["images_per_second"]))
    pair = {row["side"]: row, best["side"]: best}
    ratio = _quotient(pair["ours"]["images_per_second"], pair["peer"]["images_per_second"])
    cpu_ratio = _quotient(pair["peer"]["server_cpu_ms"], pair["ours"]["server_cpu_ms"])
    print(
        f"{row['label']} {row['concurrency']} in flight: ours / peer = {ratio} in images/s, "
        f"peer / ours = {cpu_ratio} in the server's CPU time; smallest cosine {row['cosine_min'] or '-'}"
    )
    return {**row, "ratio": ratio, "cpu_ratio": cpu_ratio}


def _quotient(a: str, b: str) -> str:
    return f"{float(a) / float(b):.2f}" if a and b and float(b) else ""


def _compare(side: str, found: NDArray[np.float32], file: Path) -> str:
    """The smallest cosine to the other side's embeddings, if those are there. This side's are kept."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kept: dict[str, NDArray[np.float32]] = dict(np.load(file)) if file.is_file() else {}
    kept[side] = found
    np.savez(file, **kept)
    other = kept.get({"ours": "peer", "peer": "ours"}[side])
    if other is None:
        return ""
    if other.shape != found.shape:
        raise ValueError(f"{file}: holds embeddings of another checkpoint or other pictures")
    return f"{cosine(found, other).min():.6f}"


def _peer_device(options: argparse.Namespace) -> str:
    if options.device == "auto":
        return "cuda" if gpu_names() else "cpu"
    return str(options.device)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, default=_ROOT / "checkpoints/siglip-tiny", help="default: the bundled one")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default %(default)s")
    add("--dtype", default="auto", help="of both, default auto: what each finds best")
    add("--only", choices=list(SIDES), help="measure one side")
    add("--setting", nargs="+", default=[], metavar="NAME=VALUE", help="settings of our server")
    clients = [kind for kind in get_args(Kind) if kind != "http"]
    add(
        "--client",
        choices=clients,
        default="triton_http",
        help="of our server; default: the peer's, a plain POST",
    )
    add("--peer-preprocess", choices=["image", "batch"], default="image", help="default %(default)s")
    add("--peer-batch", type=int, default=32, help="largest batch, default %(default)s")
    add("--peer-wait", type=float, default=0.003, help="seconds to wait for company, default %(default)s")
    add("--peer-threads", type=int, default=os.cpu_count(), help="that decode, default: the cores")
    add_load_options(parser)
    add("--start-timeout", type=float, default=600, help="seconds, default %(default)s")
    add("--device-name", help="for the table; default: this machine's GPUs, else its CPU")
    add("--label", help="joins the rows of both sides; default: the checkpoint's name")
    add("--embeddings", type=Path, help="file that joins the two sides of `--only`; default: none is kept")
    add("--output", type=Path, help="CSV file to append to")
    return parser.parse_args()


def main() -> None:
    """Measure both sides or one, print, and append to a CSV if asked to."""
    options = _options()
    options.label = options.label or options.checkpoint.name
    options.device_name = options.device_name or (
        device_name(None) if _peer_device(options) != "cpu" else None
    )
    jpegs = pictures(options)
    known: list[dict[str, str]] = []
    if options.only and options.output and options.output.is_file():
        with options.output.open(newline="", encoding="utf-8") as file:
            known = list(csv.DictReader(file))
    with tempfile.TemporaryDirectory() as folder:
        options.embeddings = options.embeddings or Path(folder) / "embeddings.npz"
        for side in [options.only] if options.only else SIDES:
            for row in measure(side, options, jpegs):
                known.append(with_ratio(row, known))
                if options.output:
                    write_csv(options.output, [known[-1]], append=True)


if __name__ == "__main__":
    main()
