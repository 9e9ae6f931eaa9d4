"""The command: `python -m tests.chaos`."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from paths import JERSEY, TINY

from benchmarks.crafted_files import KINDS
from tests.chaos.canaries import TOLERANCE
from tests.chaos.cases import SHARES
from tests.chaos.context import Context
from tests.chaos.report import Report
from tests.chaos.server import ChaosError, Recipe

__all__ = ["PARTS", "main", "parse"]

PARTS = (
    "fuzz",
    "gateway",
    "bulk",
    "kills",
    "starts",
    "overload",
    "deadlines",
    "abandoned",
    "neighbours",
    "front",
    "soak",
)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Attack a real server and print a table. The exit code is 1 if a line of it is a fault.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--only", default=",".join(PARTS), help="parts to run, separated by commas")
    add(
        "--output",
        type=Path,
        default=Path("build/chaos"),
        help="folder of the table, the findings and the logs",
    )
    add("--seed", type=int, default=1, help="of all random choices")
    server = parser.add_argument_group("the server; each part starts its own unless --url is given")
    add = server.add_argument
    add("--url", help="host:port of gRPC of a server that runs")
    add("--http-url", help="its host:port of HTTP; without it no part speaks HTTP")
    add("--metrics-url", help="its host:port of metrics")
    add(
        "--launcher-pid",
        type=int,
        default=0,
        help="process id of its siglip-serve serve, to watch its processes",
    )
    add("--checkpoint", default=str(TINY), help="directory or hub id")
    add("--teams-checkpoint", default=str(JERSEY), help="directory or hub id")
    add(
        "--setting",
        nargs="+",
        default=["dtype=float32"],
        metavar="NAME=VALUE",
        help="settings of own servers",
    )
    add("--tolerance", type=float, default=TOLERANCE, help="largest difference of a right answer")
    _add_fuzz(parser)
    _add_others(parser)
    options = parser.parse_args(words)
    options.only = [part for part in options.only.split(",") if part]
    unknown = [part for part in options.only if part not in PARTS]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: the parts are {', '.join(PARTS)}")
    return options


def _add_fuzz(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("fuzz, gateway").add_argument
    add("--cases", type=int, default=100_000, help="number of cases")
    add("--first-case", type=int, default=0, help="number of the first case, to divide a run")
    add("--kinds", nargs="+", default=[], choices=list(SHARES), help="kinds of cases")
    add(
        "--case",
        nargs="+",
        default=[],
        metavar="KIND:SEED:NUMBER",
        help="send these cases alone, and nothing else",
    )
    add("--in-flight", type=int, default=16, help="cases under way at the same time")
    add("--fuzz-minutes", type=float, default=120, help="longest time")


def _add_others(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("kills").add_argument
    add("--kills", type=int, default=20, help="kills of each kind of process")
    add("--stops", type=int, default=20, help="stops of each kind of process, for 1 to 28 s")
    add("--kill-kinds", nargs="+", default=[], metavar="KIND", help="tritonserver, models, doors")
    add("--callers", type=int, default=3, help="callers of each kind of client, also of soak")
    add("--kills-minutes", type=float, default=240, help="longest time")
    add = parser.add_argument_group("starts").add_argument
    add("--starts", type=int, default=50, help="starts on a busy machine")
    add("--busy", type=int, default=8, help="busy processes")
    add("--frozen-starts", type=int, default=10, help="starts of which a model process is frozen for 3 s")
    add("--starts-minutes", type=float, default=180, help="longest time")
    add = parser.add_argument_group("bulk").add_argument
    add("--pictures", type=int, default=20_000, help="of a job")
    add("--bulk-kills", type=int, default=20, help="kills of each job")
    add(
        "--bulk-on",
        nargs="*",
        default=["local", "ray"],
        choices=("local", "ray"),
        help="jobs: on this machine, on a Ray cluster of three nodes; none: the undisturbed run alone",
    )
    add = parser.add_argument_group("overload, deadlines, soak").add_argument
    add("--overload-seconds", type=float, default=60, help="of each protocol")
    add("--deadline-seconds", type=float, default=60, help="of each kind of impatient caller")
    add(
        "--deadline-kinds",
        nargs="+",
        type=int,
        default=[1, 2, 3, 4, 5, 6],
        metavar="NUMBER",
        help="of deadlines: 0.5-8, 20, 50, 100 ms, cancelled calls, closed HTTP connections",
    )
    add("--minutes", type=float, default=30, help="of soak")
    add = parser.add_argument_group("neighbours").add_argument
    add("--formats", nargs="+", choices=KINDS, default=list(KINDS), metavar="FORMAT", help="of the pictures")
    add("--crafted", type=int, default=150, help="files of each format, of which the costliest is sent")
    add("--neighbours-seconds", type=float, default=30, help="of each format")


def _part(name: str) -> Callable[[Context], Awaitable[None]]:
    part: Callable[[Context], Awaitable[None]] = importlib.import_module(f"tests.chaos.{name}").run
    return part


def main() -> int:
    """Run the parts, print the table, and return 1 if a line of it is a fault."""
    options = parse()
    report = Report(options.output)
    settings = dict(pair.partition("=")[::2] for pair in options.setting)
    recipe = Recipe(options.checkpoint, options.teams_checkpoint, settings=settings)
    if options.case:
        options.only = ["gateway" if options.case[0].startswith("gateway:") else "fuzz"]
    for name in options.only:
        begin = time.monotonic()
        try:
            asyncio.run(_part(name)(Context(options, report, recipe)))  # type: ignore[arg-type]
        except ChaosError as error:
            report.add(name, "could not be run", str(error), "", True)
        report.add(name, "duration", f"{time.monotonic() - begin:.0f} s")
    print(report.markdown())
    print(f"{report.faults} faults. The table and the findings are in {options.output}.")
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
