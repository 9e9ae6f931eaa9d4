"""The table, CSV file and picture of `siglip-serve bench`."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from siglip_serve_client.commands.bench.record import Summary
from siglip_serve_client.commands.bench.run import Plan, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Row", "draw_curve", "table_line", "write_csv"]

_COLORS = ("#0072B2", "#009E73", "#E69F00", "#D55E00")  # colour-blind readers can tell them apart
_PERCENTILES = ((50, "o", "-"), (95, "s", "--"), (99, "^", ":"))


@dataclass(frozen=True)
class Row:
    """One load and its figures."""

    point: Point
    summary: Summary

    def columns(self) -> dict[str, str]:
        """The figures by the names that the CSV gives them."""
        summary = self.summary
        return {
            "concurrency": "" if self.point.is_open else f"{self.point.load:g}",
            "rate": f"{self.point.load:g}" if self.point.is_open else "",
            "requests_per_second": f"{summary.rate:.1f}",
            **{f"p{percent}_ms": f"{summary.percentile(percent):.2f}" for percent, _, _ in _PERCENTILES},
            "errors": str(summary.errors),
            "late": str(summary.late) if self.point.is_open else "",
            "seconds": f"{summary.seconds:.2f}",
            "client_cores": f"{sum(summary.client_cpu) / summary.seconds:.2f}",
        }


def table_line(row: Row | None, is_open: bool) -> str:
    """A line of the printed table, or its head if there is no row."""
    heads = {
        **({"rate": "asked/s"} if is_open else {"concurrency": "in flight"}),
        "requests_per_second": "requests/s",
        **{f"p{percent}_ms": f"p{percent}, ms" for percent, _, _ in _PERCENTILES},
        "errors": "errors",
        **({"late": "late"} if is_open else {}),
        "client_cores": "client cores",
    }
    cells = heads if row is None else row.columns()
    return "  ".join(f"{cells[name]:>{max(len(head), 8)}}" for name, head in heads.items())


def write_csv(plan: Plan, rows: Sequence[Row], path: Path) -> None:
    """Write all rows, each with its target and its kind of requests."""
    about = {
        "url": plan.url,
        "model": plan.model,
        "pictures": " ".join(plan.images) or plan.mix,
        "processes": str(plan.processes),
    }
    lines = [{**about, **row.columns()} for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def draw_curve(plan: Plan, given: Sequence[Row], path: Path) -> None:
    """Draw throughput and latency against the load, side by side, as a PNG of 1,200 x 560 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    rows = sorted(given, key=lambda row: row.point.load)
    is_open = rows[0].point.is_open
    figure = Figure(figsize=(12, 5.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{plan.sent}\n{plan.where}")
    throughput, latency = figure.subplots(1, 2)
    _draw_throughput(throughput, rows, is_open)
    loads = [row.point.load for row in rows]
    for color, (percent, marker, line) in zip(_COLORS[1:], _PERCENTILES, strict=True):
        values = [row.summary.percentile(percent) for row in rows]
        latency.plot(loads, values, marker=marker, linestyle=line, color=color, label=f"p{percent}")
    latency.set(ylabel="latency, ms", yscale="log")
    latency.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    latency.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    latency.yaxis.set_major_formatter(FuncFormatter(_number))
    latency.yaxis.set_minor_formatter(NullFormatter())
    for axes in (throughput, latency):
        axes.set_xlabel("requests/s, asked" if is_open else "requests in flight")
        if not is_open:
            axes.set_xscale("log")
        axes.set_xticks(loads, [f"{load:g}" for load in loads])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.08)
        axes.grid(color="#E3E3E3")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _draw_throughput(axes: Axes, rows: Sequence[Row], is_open: bool) -> None:
    loads, rates = [row.point.load for row in rows], [row.summary.rate for row in rows]
    if is_open:
        axes.plot(loads, loads, ":", color="#8C8C8C", label="as many as asked")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    axes.plot(loads, rates, "o-", color=_COLORS[0])
    for load, rate in zip(loads, rates, strict=True):
        place = (0, -18) if is_open else (0, 9)
        axes.annotate(_number(rate), (load, rate), place, textcoords="offset points", ha="center")
    axes.set(ylabel="good answers/s", ylim=(0, 1.15 * max([1.0, *rates, *(loads if is_open else [])])))
    axes.yaxis.set_major_formatter(lambda value, _: _number(value))


def _number(value: float, _: object = None) -> str:
    return f"{value:,.{0 < value < 100 and value % 1 > 0:d}f}"
