"""Resident memory of a running server by process, at rest and after load.

    python -m benchmarks.memory --checkpoint data/base-16-224 --models embed_image embed_text --output FILE

The server is `siglip-serve serve` with its doors and its gateway. Sizes are in MB of 10^6 bytes. `pss_mb` is
the proportional size, which shares pages among the processes that map them, so that the sum over all is what
the server takes. Its parts are anonymous memory (heaps and weights), mapped files (libraries,
checkpoints) and shared memory. `own_mb` is what would be free if this process alone ended.

The moments are `rest`, after the start, and `load`, after `--seconds` of images and as many of texts with
`--concurrency` requests in flight, if these models are served. All texts are different.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from benchmarks.cpu_time import family, what
from benchmarks.inputs import parse_settings, synthetic_jpeg, synthetic_texts
from benchmarks.load import Load, first_answers, run
from benchmarks.load_clients import Kind, Target
from benchmarks.records import about, write_csv

_ROOT = Path(__file__).parents[1]
_SIZES = {
    "pss_mb": ("Pss",),
    "anonymous_mb": ("Pss_Anon",),
    "files_mb": ("Pss_File",),
    "shared_mb": ("Pss_Shmem",),
    "own_mb": ("Private_Clean", "Private_Dirty"),
}

_TEXTS = 100_000  # more than are answered, so that all are new

Sizes = dict[str, float]


def main() -> None:
    """Start the server, measure, print and write the table."""
    options = _parser().parse_args()
    with _serve(options) as (server, addresses, seconds):
        moments = {"rest": _by_process(server.pid)}
        if options.seconds:
            _load(options, addresses["gRPC"])
            moments["load"] = _by_process(server.pid)
        if options.mappings:
            _print_mappings(server.pid, options.mappings)
    run_columns = {
        **about(["torch", "openvino", "numpy"]),
        "label": options.label or options.checkpoint.name,
        "models": " ".join(options.models) or "all",
        "settings": " ".join(options.setting),
        "seconds_to_start": f"{seconds:.1f}",
        "concurrency": str(options.concurrency),
    }
    rows = []
    for moment, processes in moments.items():
        print(f"{run_columns['label']}, {run_columns['models']}, {run_columns['settings']}: {moment}")
        for name, sizes in processes.items():
            columns = {key: f"{value:.0f}" for key, value in sizes.items()}
            print(f"  {name:30}", *(f"{key} {value:>5}" for key, value in columns.items()))
            rows.append({**run_columns, "moment": moment, "process": name, **columns})
    if options.output:
        write_csv(options.output, rows, append=True)


@contextmanager
def _serve(options: argparse.Namespace) -> Iterator[tuple[subprocess.Popen[str], dict[str, str], float]]:
    """Run `siglip-serve serve`: its process, its addresses by protocol, and the seconds of its start."""
    command = [str(Path(sys.executable).with_name("siglip-serve")), "serve", "--device", "cpu"]
    command += ["--checkpoint", str(options.checkpoint.resolve())]
    command += ["--model-repository", str(_ROOT / "model_repository")]
    for name in ("http", "grpc", "metrics", "gateway"):
        command += [f"--{name}-port", "0"]
    if options.models:
        command += ["--models", ",".join(options.models)]
    for name, value in parse_settings(options.setting).items():
        command += [f"--{name.replace('_', '-')}", value]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield process, *_wait(process.stdout)
    finally:
        process.terminate()
        process.wait(60)


def _wait(output: IO[str]) -> tuple[dict[str, str], float]:
    """Read what the command prints until it is ready."""
    addresses, seconds = {}, 0.0
    for line in output:
        if found := re.search(r"ready after ([\d.]+) s", line):
            seconds = float(found[1])
        if found := re.match(r"\s+(\w+)\s+(?:http://)?([\d.]+:\d+)", line):
            addresses[found[1]] = found[2]
        if line.startswith("Ctrl-C"):
            return addresses, seconds
    raise RuntimeError("the server did not start")


def _load(options: argparse.Namespace, url: str) -> None:
    """Send images, then texts."""
    bodies: dict[str, tuple[Kind, list[bytes]]] = {
        "embed_image": ("grpc", [synthetic_jpeg(500, 375, seed) for seed in range(16)]),
        "embed_text": ("grpc_texts", [text.encode() for text in synthetic_texts(_TEXTS)]),
    }
    for model, (kind, inputs) in bodies.items():
        if model in (options.models or bodies):
            target = Target(kind, url, model)
            load = Load(target, inputs, options.concurrency, 1, options.seconds)
            result = run(load, dict(enumerate(first_answers(target, inputs[:16]))))
            print(f"{model}: {result.rate:.1f} per second, errors {sum(result.statuses.values())}")


def _by_process(root: int) -> dict[str, Sizes]:
    """The sizes in MB of a server's processes, summed over those that are the same thing, and of all."""
    found: defaultdict[str, Sizes] = defaultdict(lambda: dict.fromkeys(("processes", *_SIZES), 0.0))
    for process in family(root):
        name = "launcher" if process.pid == root else what(process.cmdline(), process.name())
        sizes = _sizes(process.pid)
        for total in (found[name], found["all"]):
            total["processes"] += 1
            for key, value in sizes.items():
                total[key] += value
    return dict(sorted(found.items(), key=lambda item: -item[1]["pss_mb"]))


def _sizes(pid: int) -> Sizes:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    fields = {name: int(kilobytes) for name, kilobytes in re.findall(r"(\w+):\s+(\d+) kB", text)}
    return {key: sum(fields[name] for name in names) * 1024 / 1e6 for key, names in _SIZES.items()}


def _print_mappings(root: int, least: float) -> None:
    """Print what is mapped, by process and file, from `least` MB on."""
    for process in family(root):
        print(f"{process.pid} {what(process.cmdline(), process.name())}")
        for name, (size, count) in _mappings(process.pid).items():
            if size >= least:
                print(f"    {size:7.1f} MB in {count:3} of {name}")


def _mappings(pid: int) -> Mapping[str, Sequence[float]]:
    """The proportional size in MB, and the number, of the mappings of each file of a process."""
    found: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    name = ""
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        if mapping := re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+\s*(.*)", line):
            name = mapping[1] or "anonymous"
            found[name][1] += 1
        elif size := re.match(r"Pss:\s+(\d+) kB", line):
            found[name][0] += int(size[1]) * 1024 / 1e6
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="directory of the checkpoint that is served")
    add("--models", nargs="+", default=[], help="models that are served, default all")
    add("--setting", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the server")
    add("--concurrency", type=int, default=8, help="requests in flight, default %(default)s")
    add("--seconds", type=float, default=10, help="of images, and of texts; 0: no load; default %(default)s")
    add(
        "--mappings",
        type=float,
        metavar="MB",
        help="print mappings of at least this size too",
    )
    add("--label", default="", help="name of the checkpoint in the table")
    add("--output", type=Path, help="CSV file to append to")
    return parser


if __name__ == "__main__":
    main()
