"""The result as a table on the screen, and as JSON, Markdown and a picture in a folder."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siglip_serve.embeddings.zero_shot import Floats
from validate.dataset import Dataset
from validate.protocols import Row
from validate.server import ServerInfo

__all__ = ["Report", "class_means", "draw", "markdown", "published_table", "write_json"]


@dataclass
class Report:
    """Everything that the files say."""

    server: ServerInfo
    dataset: Dataset
    rows: list[Row]
    problems: list[str]
    groups: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    chance: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def best(self) -> Row:
        """The row with the highest top-1, whose confusions are shown."""
        return max(self.rows, key=lambda row: row.accuracy(1).value)


def published_table(rows: Sequence[Row]) -> str:
    """The layout in which this family of servers publishes its accuracies."""
    lines = ["| | top-1 | top-5 | prompt |", "|---|---|---|---|"]
    for row in rows:
        top1, top5 = row.accuracy(1).value, row.accuracy(5).value
        lines.append(f"| {row.name} | {top1:.4f} | {top5:.4f} | {row.prompt} |".replace("  |", " |"))
    return "\n".join(lines)


def markdown(report: Report) -> str:
    """The whole report: table, intervals, styles, confusions, and the files left out."""
    parts = [
        "# Validation of the image and text embeddings",
        _sentence(report),
        published_table(report.rows),
        "## With 95 % intervals (Wilson)",
        _interval_table(report),
    ]
    if report.groups:
        parts += ["## Top-1 by group", _group_table(report)]
    if report.best().confusions:
        parts += [f"## Most confused classes ({_title(report.best())})", _confusion_table(report)]
    if report.problems:
        parts += [f"## Left out ({len(report.problems)})", "\n".join(f"- {line}" for line in report.problems)]
    return "\n\n".join(parts) + "\n"


def _sentence(report: Report) -> str:
    server, data = report.server, report.dataset
    return (
        f"Checkpoint {server.checkpoint}, revision {server.revision}, dtype {server.dtype}, "
        f"preprocessing {server.preprocess}, "
        f"served by Triton {server.version}.\n"
        f"{len(data.classes)} classes, {len(data.train)} training and {len(data.valid)} validation images."
    )


def _title(row: Row) -> str:
    return f"{row.name}, {row.prompt}" if row.prompt else row.name


def _percent(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"


def _interval_table(report: Report) -> str:
    lines = ["| | prompt | top-1 | 95 % | top-5 | 95 % | top-1 over seeds |", "|---|---|---|---|---|---|---|"]
    for row in report.rows:
        one, five = row.accuracy(1), row.accuracy(5)
        lines.append(
            f"| {row.name} | {row.prompt} | {one.value:.4f} | {_percent(one.interval)} "
            f"| {five.value:.4f} | {_percent(five.interval)} | {_percent(row.spread())} |"
        )
    if report.chance:
        count = len(report.dataset.classes)
        lines.append(f"| chance | | {1 / count:.4f} | | {min(1, 5 / count):.4f} | | |")
    return "\n".join(lines)


def _group_table(report: Report) -> str:
    rows = report.rows
    titles = [f"{row.name}: {row.prompt}" if row.prompt else row.name for row in rows]
    lines = [f"| | images | {' | '.join(titles)} |", "|---" * (len(rows) + 2) + "|"]
    for name, chosen in report.groups.items():
        values = [f"{row.accuracy(1, chosen).value:.4f}" for row in rows]
        lines.append(f"| {name} | {chosen.sum()} | {' | '.join(values)} |")
    return "\n".join(lines)


def _confusion_table(report: Report) -> str:
    classes = report.dataset.classes
    lines = ["| class | taken for | images |", "|---|---|---|"]
    for pair in report.best().confusions:
        names = (classes[pair.target].first_name, classes[pair.predicted].first_name)
        lines.append(f"| {names[0]} | {names[1]} | {pair.count} |")
    return "\n".join(lines)


def write_json(report: Report, file: Path) -> None:
    """The report's figures, for machines."""
    classes = report.dataset.classes
    content = {
        "server": report.server.as_dict(),
        "settings": report.settings,
        "classes": len(classes),
        "train_images": len(report.dataset.train),
        "valid_images": len(report.dataset.valid),
        "chance": {"top1": 1 / len(classes), "top5": min(1, 5 / len(classes))},
        "rows": [_row_figures(row, report) for row in report.rows],
        "problems": report.problems,
    }
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _row_figures(row: Row, report: Report) -> dict[str, Any]:
    figures: dict[str, Any] = {"name": row.name, "prompt": row.prompt, "over_seeds": row.spread()}
    for k in (1, 5):
        accuracy = row.accuracy(k)
        figures[f"top{k}"] = {
            "value": accuracy.value,
            "correct": accuracy.correct,
            "total": accuracy.total,
            "interval": accuracy.interval,
        }
    figures["groups"] = {name: row.accuracy(1, chosen).value for name, chosen in report.groups.items()}
    synsets = [info.synset for info in report.dataset.classes]
    figures["confusions"] = [[synsets[c.target], synsets[c.predicted], c.count] for c in row.confusions]
    return figures


def class_means(embeddings: Floats, labels: NDArray[np.int64]) -> Floats:
    """Mean embedding [classes present, d] of each class that has images."""
    present = np.unique(labels)
    return np.stack([embeddings[labels == label].mean(axis=0) for label in present])


def draw(report: Report, means: Floats, file: Path) -> None:
    """Accuracy with intervals, the class means in their two main directions, the worst confusions."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, scatter, worst) = plt.subplots(1, 3, figsize=(20, 7), constrained_layout=True)
    figure.suptitle(_sentence(report), fontsize=10)
    _draw_bars(bars, report)
    _draw_means(scatter, means)
    _draw_confusions(worst, report)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _draw_bars(axes: Any, report: Report) -> None:
    rows = report.rows[::-1]
    values = [row.accuracy(1) for row in rows]
    # At 0 and 1 an end of the interval differs from the value by rounding, to either side.
    errors = [
        [max(0.0, accuracy.value - accuracy.interval[0]) for accuracy in values],
        [max(0.0, accuracy.interval[1] - accuracy.value) for accuracy in values],
    ]
    axes.barh(range(len(rows)), [accuracy.value for accuracy in values], xerr=errors, color="#4477aa")
    axes.set_yticks(range(len(rows)), [_wrapped(_title(row)) for row in rows], fontsize=8)
    for place, accuracy in enumerate(values):
        axes.text(accuracy.interval[1] + 0.01, place, f"{accuracy.value:.4f}", va="center", fontsize=8)
    axes.set(xlabel="top-1 accuracy, 95 % interval", xlim=(0, 1), title="Accuracy")


def _wrapped(name: str) -> str:
    """The whole name in lines of a panel's width, in letters that matplotlib's font has."""
    return textwrap.fill(name.encode("ascii", "replace").decode(), 44)


def _draw_means(axes: Any, means: Floats) -> None:
    from sklearn.decomposition import PCA

    if min(means.shape) >= 2:
        points = PCA(2).fit_transform(means)
        axes.scatter(points[:, 0], points[:, 1], s=8, alpha=0.6, color="#aa3377")
    axes.set(title="Class means, first two principal components", xlabel="first", ylabel="second")


def _draw_confusions(axes: Any, report: Report) -> None:
    pairs = report.best().confusions[:15][::-1]
    classes = report.dataset.classes
    names = [f"{classes[p.target].first_name} > {classes[p.predicted].first_name}" for p in pairs]
    axes.barh(range(len(pairs)), [pair.count for pair in pairs], color="#cc6677")
    axes.set_yticks(range(len(pairs)), [_wrapped(name) for name in names], fontsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title=f"Most confused ({report.best().name})", xlabel="images")
