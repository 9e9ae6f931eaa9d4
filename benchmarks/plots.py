"""Plots of the results: `python -m benchmarks.plots` makes a PNG of each CSV that it knows and finds.

serve_load.csv: requests in flight against images per second and latencies, closed loop, one device.
vision_waterfall.csv: the gain of each step, one bar per step, with its fidelity.
peers.csv: this server and its peer.
heatmaps.csv: average precision over the number of blocks that are rolled back, and of every other way.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Sequence
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

__all__ = ["PLOTS", "draw", "heatmaps", "peers", "serve_load", "waterfall"]

Row = dict[str, str]

WIDTH = 1000  # pixels
HEIGHT = 900  # at most: what a screen shows at once
_DPI = 100
# Okabe and Ito's colours, which colour-blind readers can tell apart; the order is kept across figures.
_COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"]
_MARKERS = ["o", "s", "^", "D", "v", "P"]
_OURS, _PEER, _BASE = _COLORS[0], _COLORS[1], "#8C8C8C"
_STYLE: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "figure.constrained_layout.use": True,
}


def serve_load(rows: Sequence[Row], device: str | None = None) -> Figure:
    """Throughput and latencies of the closed loop, by default on the device of the last row."""
    closed = [row for row in rows if row.get("loop", "closed") in ("closed", "") and not _faults(row)]
    if not closed:
        raise ValueError("no row of the closed loop without errors")
    device = device or closed[-1]["device"]
    chosen = [row for row in closed if row["device"] == device]
    series = _series(chosen)
    figure, (left, right) = _figure(5.4, 1, 2)
    for number, (name, points) in enumerate(series.items()):
        color, marker = _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]
        x = sorted(points)
        rates = [_value(points[n], "images_per_second") for n in x]
        most = f"{name}: {_thousands(rates[-1])} at {x[-1]}"
        left.plot(x, rates, color=color, marker=marker, label=most)
        for column, line in (("p50_ms", "-"), ("p95_ms", "--"), ("p99_ms", ":")):
            right.plot(
                x, [_value(points[n], column) for n in x], line, color=color, marker=marker, markersize=4
            )
    top = 1.12 * max(_value(row, "images_per_second") for row in chosen)
    left.set(ylabel="images per second", ylim=(0, top + 0.07 * top * len(series)))  # room for the legend
    left.yaxis.set_major_formatter(FuncFormatter(_thousands))
    left.legend(loc="upper left", frameon=False)
    right.set(ylabel="latency, ms", yscale="log")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter(FuncFormatter(_thousands))
    for line, name in (("-", "p50"), ("--", "p95"), (":", "p99")):
        right.plot([], [], line, color="black", label=name)
    right.legend(loc="upper left", frameon=False)
    for axes in (left, right):
        _concurrency_axis(axes, sorted({int(row["concurrency"]) for row in chosen}))
    figure.suptitle(f"Server under load: {device}, {_dates(chosen)}")
    return figure


def waterfall(rows: Sequence[Row], device: str | None = None) -> Figure:
    """One bar per step in the file's order, one panel per geometry and batch size, two panels per line.

    A panel shows one run: the one with the most steps, or the last of several such. Panels without the
    first step are left out, because there is nothing to compare their bars with.
    """
    device = device or rows[-1]["device"]
    chosen = [row for row in rows if row["device"] == device]
    panels = _waterfall_panels(chosen)
    steps = list(dict.fromkeys(step for panel in panels.values() for step in panel))
    lines = math.ceil(len(panels) / 2)
    inches = min(HEIGHT / _DPI, 1.3 + lines * (0.8 + 0.21 * len(steps)))
    figure, grid = _figure(inches, lines, 2, sharey=True)
    for axes, (title, panel) in zip(grid, panels.items(), strict=False):
        _bars(axes, steps, panel)
        axes.set_title(title, loc="left", fontsize=10)
    grid[0].invert_yaxis()  # the first step on top
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel(
        "images per second, gain over the first step, smallest cosine to float32\n"
        "grey: from main memory, blue: images that lie on the GPU",
        fontsize=10,
    )
    shown = [row for panel in panels.values() for row in panel.values()]
    figure.suptitle(f"Vision tower, step by step: {device}, {_dates(shown)}")
    return figure


def _waterfall_panels(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Title of a panel -> step -> its row."""
    runs: dict[tuple[str, str], dict[tuple[str, ...], dict[str, Row]]] = {}
    for row in rows:
        run = tuple(row.get(name, "") for name in ("date", "commit", "command"))
        steps = runs.setdefault((row["geometry"], row["rows"]), {}).setdefault(run, {})
        steps[row["step"]] = row
    panels = {}
    for (geometry, count), found in runs.items():
        panel = max(reversed(found.values()), key=len)
        first = next(iter(panel.values()))
        images = f"{count} image{'s' * (count != '1')} per pass"
        panels[f"{geometry}, {images}, {first['dtype']}"] = panel
    return {title: panel for title, panel in panels.items() if rows[0]["step"] in panel}


def peers(rows: Sequence[Row], device: str | None = None) -> Figure:
    """Our speed and that of transformers behind FastAPI, one pair of bars per load."""
    device = device or _measured_on_both_sides(rows)
    on_device = [row for row in rows if row["device"] == device and row["size"] == "500x375"]
    chosen = [row for row in on_device if row["server"] in ("ours", "fastapi")]
    pairs: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in sorted(chosen, key=lambda row: _value(row, "per_second")):  # the best run counts
        key = tuple(row[name] for name in ("label", "size", "asked_dtype", "concurrency"))
        pairs.setdefault(key, {})[row["server"]] = row
    complete = {key: pair for key, pair in pairs.items() if {"ours", "fastapi"} <= set(pair)}
    if not complete:
        raise ValueError(f"no load that both sides were measured with on {device}")
    figure, (axes,) = _figure(1.7 + 0.95 * len(complete), 1, 1)
    for place, pair in enumerate(complete.values()):
        for side, offset, color in (("fastapi", -0.2, _PEER), ("ours", 0.2, _OURS)):
            row, value = pair[side], _value(pair[side], "per_second")
            axes.barh(place + offset, value, 0.38, color=color)
            ratio = f", {value / _value(pair['fastapi'], 'per_second'):.2f} x" if side == "ours" else ""
            text = f" {_thousands(value)} (p50 {_value(row, 'p50_ms'):,.0f} ms, {row['dtype']}){ratio}"
            axes.text(value, place + offset, text, va="center", fontsize=10)
    names = [f"{key[0]}, {key[1] or 'texts'}\n{key[3]} in flight" for key in complete]
    axes.set_yticks(range(len(complete)), names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(
        xlabel="images or texts per second", xlim=(0, 1.75 * max(_value(row, "per_second") for row in chosen))
    )
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    for name, color in (("transformers + FastAPI", _PEER), ("SigLIP Serve", _OURS)):
        axes.barh([0], [0], color=color, label=name)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    figure.suptitle(f"The same load on both: {device}, {_dates(chosen)}")
    return figure


def heatmaps(rows: Sequence[Row], device: str | None = None) -> Figure:
    """Average precision over the blocks, and of every way, of the last checkpoint; 95 % intervals."""
    device = device or rows[-1]["device"]
    checkpoint = rows[-1]["checkpoint"]
    chosen = [row for row in rows if (row["device"], row["checkpoint"]) == (device, checkpoint)]
    figure, (left, right) = _figure(5.4, 1, 2)
    names = {"scene": "relative to the scene's prompts", "many": "relative to a bank of prompts"}
    for number, (prompts, name) in enumerate(names.items()):
        # The last run counts.
        points = {int(r["blocks"]): r for r in chosen if (r["method"], r["prompts"]) == ("ours", prompts)}
        x = sorted(points)
        low, mean, high = ([_value(points[k], c) for k in x] for c in ("ap_low", "ap", "ap_high"))
        left.plot(x, mean, color=_COLORS[number], marker=_MARKERS[number], label=name)
        left.fill_between(x, low, high, color=_COLORS[number], alpha=0.15, linewidth=0)
        left.set_xticks(x)
    left.set(xlabel="last blocks that are gone back through", ylabel="average precision", ylim=(0, None))
    left.legend(loc="lower right", frameon=False)
    default = next(row["blocks"] for row in chosen if row["method"] == "ours, untrained")
    shown = [row for row in chosen if row["method"] != "ours" or row["blocks"] == default]
    bars = {row["method"]: row for row in shown if row["prompts"] != "many"}
    for place, (name, row) in enumerate(bars.items()):
        value = _value(row, "ap")
        error = [[value - _value(row, "ap_low")], [_value(row, "ap_high") - value]]
        color = _OURS if name.startswith("ours") else _BASE
        right.barh(place, value, 0.72, xerr=error, color=color, error_kw={"linewidth": 1, "capsize": 3})
    right.set_yticks(range(len(bars)), list(bars))
    right.invert_yaxis()
    right.grid(visible=False, axis="y")
    right.set_xlabel("average precision, relative to the scene's prompts")
    figure.suptitle(f"Heatmaps of {checkpoint} on {chosen[-1]['scenes']} composed scenes, {_dates(chosen)}")
    return figure


def _measured_on_both_sides(rows: Sequence[Row]) -> str:
    sides: dict[str, set[str]] = {}
    for row in rows:
        sides.setdefault(row["device"], set()).add(row["server"])
    both = [device for device, found in sides.items() if {"ours", "fastapi"} <= found]
    return both[-1] if both else rows[-1]["device"]


PLOTS: dict[str, Callable[[Sequence[Row], str | None], Figure]] = {
    "serve_load": serve_load,
    "vision_waterfall": waterfall,
    "peers": peers,
    "heatmaps": heatmaps,
}


def draw(name: str, folder: Path, device: str | None = None, output: Path | None = None) -> Path:
    """Draw `<name>.csv` of a folder to `<name>.png`, and return the PNG's path."""
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{folder / name}.csv holds no row")
    path = (output or folder) / f"{name}.png"
    with plt.rc_context(_STYLE):
        figure = PLOTS[name](rows, device)
        figure.savefig(path, dpi=_DPI)
        plt.close(figure)
    return path


def _figure(inches: float, rows: int, columns: int, *, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    figure, grid = plt.subplots(rows, columns, figsize=(WIDTH / _DPI, inches), squeeze=False, sharey=sharey)
    return figure, list(grid.flat)


def _series(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Lines of the figure: name -> concurrency -> its last row. Lines are named by label and what differs."""
    differ = [name for name in ("size", "client") if len({row.get(name, "") for row in rows}) > 1]
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        name = ", ".join(row.get(column, "") for column in ("label", *differ))
        found.setdefault(name, {})[int(row["concurrency"])] = row
    return found


def _bars(axes: Axes, steps: Sequence[str], panel: dict[str, Row]) -> None:
    values = {step: _speed(row) for step, row in panel.items()}
    base = values[steps[0]]
    for place, step in enumerate(steps):
        if step not in panel:
            continue
        row, value = panel[step], values[step]
        axes.barh(place, value, 0.72, color=_OURS if row.get("device_images_per_second") else _BASE)
        gain = f"  {value / base:.2f} x" if place else ""
        text = f" {_thousands(value)}{gain}  {float(row['cosine_min']):.5f}"
        axes.text(value, place, text, va="center", fontsize=9)
    axes.set_yticks(range(len(steps)), steps, fontsize=9)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.75 * max(values.values()))
    axes.tick_params(axis="x", labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))


def _concurrency_axis(axes: Axes, ticks: list[int]) -> None:
    axes.set(xlabel="requests in flight", xscale="log")
    # On this axis numbers of less than 1.6 times the next would be written into each other.
    following = [*ticks[1:], float("inf")]
    names = [str(tick) if after >= 1.6 * tick else "" for tick, after in zip(ticks, following, strict=True)]
    axes.set_xticks(ticks, names)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.14)


def _thousands(value: float, _: object = None) -> str:
    """12,651, and 26.3 where it is small. Also a tick formatter.

    Halves are rounded up, as in the pages: 10,630.5 is 10,631.
    """
    step = Decimal("0.1") if 0 < value < 100 and value % 1 > 0 else Decimal(1)
    return f"{Decimal(str(float(value))).quantize(step, ROUND_HALF_UP):,f}"


def _faults(row: Row) -> int:
    return int(row.get("errors") or 0)


def _speed(row: Row) -> float:
    """Speed of the tower alone where that was measured: the steps do not change the way to it."""
    return float(row.get("device_images_per_second") or row["images_per_second"])


def _value(row: Row, column: str) -> float:
    return float(row[column])


def _dates(rows: Sequence[Row]) -> str:
    dates = sorted({row["date"] for row in rows})
    return dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"


def main() -> None:
    """Draw the named plots, or one of every CSV that is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"of {', '.join(PLOTS)}; default: all that have a CSV")
    add("--results", type=Path, default=Path(__file__).parent / "results", help="folder of the CSVs")
    add("--output", type=Path, help="folder of the PNGs, default: the same")
    add("--device", help="draw the rows of this device; default: that of the last row")
    options = parser.parse_args()
    names = options.names or [name for name in PLOTS if (options.results / f"{name}.csv").is_file()]
    for name in names:
        if name not in PLOTS:
            parser.error(f"{name!r}: expected one of {', '.join(PLOTS)}")
        print(draw(name, options.results, options.device, options.output))


if __name__ == "__main__":
    main()
