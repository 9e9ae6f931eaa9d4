"""Cost of the doors: the same load on one server through its door and on Triton's own port, alternating.

    python -m benchmarks.doors --checkpoint checkpoints/siglip-tiny --output benchmarks/results/doors.csv

A row has the medians over the rounds, and the median of the ratio of both within a round.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.inputs import parse_settings
from benchmarks.load import first_answers, run
from benchmarks.load_clients import Target
from benchmarks.records import about, write_csv
from benchmarks.serve_load import add_load_options, device_name, load_columns, make_loads, pictures
from siglip_serve.launcher import ServeOptions, TritonServer

_ROOT = Path(__file__).parents[1]
_FIGURES = ("images_per_second", "p50_ms", "p99_ms", "server_cpu_ms", "client_cpu_ms")


def main() -> None:
    """Run the comparison and write the table."""
    options = _parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        served = ServeOptions(
            _ROOT / "model_repository",
            str(options.checkpoint),
            settings=parse_settings(options.setting),
            models=("embed_image",),
            log_file=Path(folder) / "server.log",
        )
        with TritonServer(served) as server:
            rows = _measure(options, server)
    if options.output:
        write_csv(options.output, rows, append=True)


def _measure(options: argparse.Namespace, server: TritonServer) -> list[dict[str, str]]:
    own = server.triton_urls
    if options.client == "grpc":
        ways = {"direct": own["grpc"], "door": server.grpc_url}
    else:
        ways = {"direct": own["http"], "door": server.http_url}
    targets = {way: Target(options.client, url, "embed_image") for way, url in ways.items()}
    jpegs = pictures(options)
    expected = first_answers(targets["door"], jpegs)
    rows = []
    for number, _ in enumerate(options.concurrency):
        rounds: list[dict[str, dict[str, str]]] = []
        for turn in range(options.rounds):
            order = list(targets) if turn % 2 else list(reversed(targets))
            found = {}
            for way in order:
                load = make_loads(options, targets[way], jpegs, server.pid)[number]
                found[way] = load_columns(run(load, expected), options.size)
            rounds.append(found)
        rows += _rows(options, rounds)
    return rows


def _rows(options: argparse.Namespace, rounds: list[dict[str, dict[str, str]]]) -> list[dict[str, str]]:
    rows = []
    ratios = [float(r["door"]["images_per_second"]) / float(r["direct"]["images_per_second"]) for r in rounds]
    for way in ("direct", "door"):
        columns = [found[way] for found in rounds]
        row = {
            **about(["tritonclient", "grpcio", "aiohttp"], device_name(options.device)),
            "label": options.label or options.checkpoint.name,
            "way": way,
            "client": options.client,
            "concurrency": columns[0]["concurrency"],
            "rounds": str(len(rounds)),
            **{name: f"{median(float(column[name] or 'nan') for column in columns):g}" for name in _FIGURES},
            "ratio": f"{median(ratios):.3f}" if way == "door" else "",
            "lowest_ratio": f"{min(ratios):.3f}" if way == "door" else "",
            "highest_ratio": f"{max(ratios):.3f}" if way == "door" else "",
            "errors": str(sum(int(column["errors"]) for column in columns)),
            "checked": str(sum(int(column["checked"]) for column in columns)),
        }
        print(
            f"{row['label']} {row['client']} {row['concurrency']} in flight, {way}: "
            f"{row['images_per_second']} img/s, p50 {row['p50_ms']} p99 {row['p99_ms']} ms, "
            f"ratio {row['ratio'] or '-'}, errors {row['errors']}",
            flush=True,
        )
        rows.append(row)
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="directory of the checkpoint that is served")
    add("--setting", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the server")
    add("--client", choices=["grpc", "triton_http"], default="grpc", help="default %(default)s")
    add("--rounds", type=int, default=3, help="each way once per round, default %(default)s")
    add_load_options(parser)
    add("--device", help="name in the table; default: this machine's GPUs, else its CPU")
    add("--label", default="", help="name of the checkpoint in the table")
    add("--output", type=Path, help="CSV file to append to")
    return parser


if __name__ == "__main__":
    main()
