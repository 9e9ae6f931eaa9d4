"""This server beside others: the same checkpoint, machine, inputs and client, in alternating rounds.

    python -m benchmarks.peers --checkpoint data/base-16-224 --dtype float32 \\
        --python fastapi=ENV/bin/python --python litserve=ENV/bin/python --python infinity=ENV2/bin/python \\
        --python weaviate=ENV3/bin/python --weaviate multi2vec-clip-inference --output FILE.csv

All chosen servers are started one after the other. Then one runs at a time, while the processes of the others
are stopped: some poll when they are idle. Each is asked in its own dialect by the client of `load.py`, whose
requests are made before. Texts of a round are new to every server, so that none answers from a cache.
`docs/peers.md` tells how to install the environments. Embeddings are compared with those of transformers in
float32.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from benchmarks.cpu_time import memory_of
from benchmarks.inputs import synthetic_jpeg, synthetic_texts
from benchmarks.load import Expected, Load, Result, first_answers, run
from benchmarks.load_clients import Target
from benchmarks.peer_servers import NAMES, Choice, Input, Server, bodies, run_server, stopped
from benchmarks.records import about, cosine, gpu_names, write_csv
from benchmarks.serve_load import device_name

_ROOT = Path(__file__).parents[1]
_TEXT = "text"
_WAYS = ("ours", "gateway", *NAMES[1:])
_TEXTS_PER_SECOND = 400  # more than any server here embeds


@dataclass(frozen=True)
class Given:
    """Inputs of one kind and size.

    Attributes:
        name: `text`, or width x height of images.
        values: files of images, or texts.
        reference: the embeddings [n, D] by transformers in float32.
    """

    name: str
    values: Sequence[bytes] | Sequence[str]
    reference: NDArray[np.float32]

    @property
    def kind(self) -> Input:
        """The kind of input that servers are asked for."""
        return "text" if self.name == _TEXT else "image"


@dataclass(frozen=True)
class Asked:
    """A way to a server, and how well it answers one kind of input.

    Attributes:
        first: its embeddings [n, D] of the inputs.
    """

    name: str
    server: Server
    target: Target
    first: NDArray[np.float32]


def main() -> None:
    """Start the servers, measure all of them with all inputs, print and write the rows."""
    options = _parser().parse_args()
    options.label = options.label or options.checkpoint.name
    options.checkpoint = options.checkpoint.resolve()
    inputs = _inputs(options)
    image = synthetic_jpeg(64, 64)
    wanted = dict.fromkeys("ours" if name == "gateway" else name for name in options.servers)
    with ExitStack() as stack:
        servers = {}
        for name in wanted:
            servers[name] = stack.enter_context(
                run_server(name, _choice(options), image, options.start_timeout)
            )
            print(f"{name}: first answer after {servers[name].start_seconds:.1f} s", flush=True)
        for given in inputs:
            _measure(options, servers, given)


def _measure(options: argparse.Namespace, servers: Mapping[str, Server], given: Given) -> None:
    """Ask all servers for inputs of one kind and size, at each number of requests in flight."""
    asked = [_ask(name, servers["ours" if name == "gateway" else name], given) for name in options.servers]
    for concurrency in options.concurrency:
        _compare(options, asked, given, concurrency)


def _compare(options: argparse.Namespace, asked: Sequence[Asked], given: Given, concurrency: int) -> None:
    """Measure all ways with the same inputs in flight, and write their rows."""
    results: dict[str, list[Result]] = {way.name: [] for way in asked}
    for turn in range(options.rounds):
        for way in asked if turn % 2 == 0 else reversed(asked):
            load, expected = _load(options, way, given, concurrency, turn)
            with stopped({other.server.pid for other in asked} - {way.server.pid}):
                results[way.name].append(run(load, expected))
    rows = []
    for way in asked:
        rows.append(
            {
                **about(["tritonclient", "transformers", "numpy"], device_name(options.device_name)),
                "label": options.label,
                "input": given.kind,
                "size": "" if given.kind == "text" else given.name,
                "server": way.name,
                "dtype": way.server.program.dtype,
                "asked_dtype": options.dtype,
                "software": way.server.software,
                **_measured(results[way.name]),
                "memory_mb": f"{memory_of(way.server.pid) / 1e6:.0f}",
                "start_seconds": f"{way.server.start_seconds:.1f}",
                "cosine_min": f"{cosine(way.first, given.reference).min():.6f}",
                "cosine_of_others": f"{_closest(given.reference):.6f}",
                **_ratios(results, way.name),
            }
        )
        _print(rows[-1])
    if options.output:
        write_csv(options.output, rows, append=True)


def _load(
    options: argparse.Namespace, way: Asked, given: Given, concurrency: int, turn: int
) -> tuple[Load, Expected]:
    """One measurement, and the embeddings that are expected of it: none for texts, which are new."""
    values, expected = given.values, dict(enumerate(way.first))
    if given.kind == "text":
        count = round(_TEXTS_PER_SECOND * (options.seconds + options.warmup))
        values = synthetic_texts(count, f"{concurrency} {turn}")
        expected = {}
    load = Load(
        way.target,
        bodies(way.target, given.kind, values),
        concurrency,
        min(options.processes, concurrency),
        options.seconds,
        options.warmup,
        check=options.check,
        server_pid=way.server.pid,
    )
    return load, expected


def _ask(name: str, server: Server, given: Given) -> Asked:
    target = server.program.ways[name].target(given.kind)
    first = first_answers(target, bodies(target, given.kind, given.values))
    return Asked(name, server, target, first)


def _measured(results: Sequence[Result]) -> dict[str, str]:
    """The columns of all rounds of one way: medians of rates and costs, and percentiles of all latencies."""
    load = results[0].load
    latencies = np.concatenate([result.latencies for result in results])
    p50, p99 = np.percentile(latencies if len(latencies) else [np.nan], [50, 99]) * 1000
    costs = [(1000 * sum(r.server_cpu.values()), 1000 * r.client_cpu, r.completed or np.nan) for r in results]
    return {
        "concurrency": str(load.concurrency),
        "processes": str(load.processes),
        "seconds": f"{load.seconds:g}",
        "rounds": str(len(results)),
        "answers": str(len(latencies)),
        "per_second": f"{median(result.rate for result in results):.2f}",
        "p50_ms": f"{p50:.2f}",
        "p99_ms": f"{p99:.2f}",
        "server_cpu_ms": f"{median(server / done for server, _, done in costs):.2f}",
        "client_cpu_ms": f"{median(client / done for _, client, done in costs):.3f}",
        "busy_cores": f"{median(result.busy_cores for result in results):.2f}",
        "other_cores": f"{max(_other_cores(result) for result in results):.2f}",
        "errors": str(sum(sum(result.statuses.values()) for result in results)),
        "checked": str(sum(result.checked for result in results)),
    }


def _other_cores(result: Result) -> float:
    """Cores that neither the server nor its client kept busy: zero on a quiet machine."""
    used = sum(result.server_cpu.values()) + result.client_cpu
    return max(0.0, result.busy_cores - used / result.load.seconds)


def _ratios(results: Mapping[str, Sequence[Result]], name: str) -> dict[str, str]:
    """This server over another in answers per second: median, lowest and highest of the rounds."""
    names = ("ratio", "lowest_ratio", "highest_ratio")
    if name == "ours" or "ours" not in results:
        return dict.fromkeys(names, "")
    pairs = zip(results["ours"], results[name], strict=True)
    ratios = [ours.rate / (other.rate or np.nan) for ours, other in pairs]
    return dict(
        zip(names, (f"{value:.2f}" for value in (median(ratios), min(ratios), max(ratios))), strict=True)
    )


def _closest(reference: NDArray[np.float32]) -> float:
    """The largest cosine of two different inputs: what a wrong answer could reach."""
    unit = reference / np.linalg.norm(reference, axis=1, keepdims=True)
    products = unit @ unit.T
    return float(products[~np.eye(len(unit), dtype=bool)].max())


def _inputs(options: argparse.Namespace) -> list[Given]:
    """Inputs of each kind and their reference, from a process of its own, which frees its memory."""
    chosen: dict[str, list[bytes] | list[str]] = {}
    for name in options.inputs:
        if name == _TEXT:
            chosen[name] = synthetic_texts(options.pictures, "reference")
            continue
        width, height = (int(side) for side in name.split("x"))
        chosen[name] = [synthetic_jpeg(width, height, seed) for seed in range(options.pictures)]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(_reference, options.checkpoint, list(chosen.values())).result()
    return [Given(name, chosen[name], rows) for name, rows in zip(chosen, found, strict=True)]


def _reference(
    checkpoint: Path, inputs: Sequence[Sequence[bytes] | Sequence[str]]
) -> list[NDArray[np.float32]]:
    from benchmarks.peer_model import TransformersModel

    model = TransformersModel(checkpoint)
    found = []
    for values in inputs:
        texts = [value for value in values if isinstance(value, str)]
        images = [model.decode(value) for value in values if isinstance(value, bytes)]
        found.append(model.embed_texts(texts) if texts else model.embed_pixels(model.pixels(images)))
    return found


def _choice(options: argparse.Namespace) -> Choice:
    device = options.device
    if device == "auto":
        device = "cuda" if gpu_names() else "cpu"
    arguments: dict[str, list[str]] = {}
    for name, argument in options.argument:
        arguments.setdefault(name, []).append(argument)
    return Choice(
        options.checkpoint, device, options.dtype, dict(options.python), options.weaviate, arguments
    )


def _print(row: Mapping[str, str]) -> None:
    print(
        f"{row['input']} {row['size']} {row['concurrency']} in flight, {row['server']} {row['dtype']}: "
        f"{row['per_second']}/s, p50 {row['p50_ms']} p99 {row['p99_ms']} ms, CPU {row['server_cpu_ms']} ms, "
        f"ours/this {row['ratio'] or '-'} ({row['lowest_ratio']} to {row['highest_ratio']}), "
        f"cosine {row['cosine_min']} (others {row['cosine_of_others']}), {row['memory_mb']} MB, "
        f"errors {row['errors']}, checked {row['checked']}, cores: {row['busy_cores']} busy, "
        f"{row['other_cores']} by others, client {row['client_cpu_ms']} ms",
        flush=True,
    )


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or name not in NAMES:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=VALUE, NAME of {', '.join(NAMES)}")
    return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, default=_ROOT / "checkpoints/siglip-tiny", help="default: the bundled one")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default %(default)s")
    add("--dtype", default="float32", help="of all servers that have the choice, default %(default)s")
    add("--servers", nargs="+", choices=_WAYS, default=["ours", "fastapi"], help="default ours fastapi")
    add("--python", type=_pair, action="append", default=[], metavar="NAME=FILE", help="of an environment")
    add("--argument", type=_pair, action="append", default=[], metavar="NAME=ARGUMENT", help="of a server")
    add("--weaviate", type=Path, metavar="FOLDER", help="clone of weaviate/multi2vec-clip-inference")
    add("--inputs", nargs="+", default=["500x375"], metavar="WxH|text", help="default 500x375")
    add("--pictures", type=int, default=8, help="different inputs, sent in turn, default %(default)s")
    add("--concurrency", type=int, nargs="+", default=[8, 1], help="requests in flight, default 8 1")
    add("--processes", type=int, default=1, help="client processes, default %(default)s")
    add("--rounds", type=int, default=2, help="each server once per round, default %(default)s")
    add("--seconds", type=float, default=5, help="measured time of a round, default %(default)s")
    add("--warmup", type=float, default=1, help="time before, default %(default)s")
    add("--check", type=int, default=4, help="compare one answer in N with the first, default %(default)s")
    add("--start-timeout", type=float, default=600, help="seconds, default %(default)s")
    add("--device-name", help="for the table; default: this machine's GPUs, else its CPU")
    add("--label", help="of the checkpoint in the table, default: its folder's name")
    add("--output", type=Path, help="CSV file to append to")
    return parser


if __name__ == "__main__":
    main()
