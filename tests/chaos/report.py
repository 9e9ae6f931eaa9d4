"""The table of a run, and the findings with the cases that make them again."""

from __future__ import annotations

import csv
import json
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

__all__ = ["Finding", "Report", "Row", "percentile"]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        part: of the suite.
        check: what was measured.
        result: the figure.
        expected: the limit, or "" where there is none.
        fault: the result is beyond the limit.
    """

    part: str
    check: str
    result: str
    expected: str = ""
    fault: bool = False


@dataclass(frozen=True)
class Finding:
    """One event that is a fault, or may be one.

    Attributes:
        part: of the suite.
        kind: of the fault in one or two words.
        case: name that makes the case again with `--case`, or "".
        message: the rest.
    """

    part: str
    kind: str
    case: str
    message: str


class Report:
    """Rows and findings of a run, written to a folder as they come.

    Args:
        folder: receives `table.md`, `table.csv` and `findings.jsonl`.
        shown: findings of one kind that are printed; the file holds them all. None is whose kind ends with
            ", further".
    """

    def __init__(self, folder: Path, shown: int = 6) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._shown = folder, shown
        self.rows: list[Row] = []
        self.findings: list[Finding] = []
        self._lock = threading.Lock()
        (folder / "findings.jsonl").write_text("")

    def add(self, part: str, check: str, result: object, expected: str = "", fault: bool = False) -> None:
        """Add a line to the table, and print it."""
        row = Row(part, check, str(result), expected, fault)
        self.rows.append(row)
        mark = "  FAULT" if fault else ""
        self._print(f"{part}: {check}: {row.result}{f' (expected {expected})' if expected else ''}{mark}")
        self._write()

    def find(self, part: str, kind: str, message: str, case: str = "") -> None:
        """Note an event, and print the first ones of its kind."""
        finding = Finding(part, kind, case, message)
        with self._lock:
            self.findings.append(finding)
            count = sum(other.kind == kind and other.part == part for other in self.findings)
            with (self.folder / "findings.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(finding)) + "\n")
        if count <= self._shown and not kind.endswith(", further"):
            self._print(f"  {part}: {kind}{f' [--case {case}]' if case else ''}: {message[:800]}")

    @property
    def faults(self) -> int:
        """Lines of the table that are beyond their limit."""
        return sum(row.fault for row in self.rows)

    def markdown(self) -> str:
        """The table."""
        lines = ["| part | check | result | expected | |", "|---|---|---|---|---|"]
        for row in self.rows:
            cells = [row.part, row.check, row.result, row.expected, "FAULT" if row.fault else ""]
            lines.append(
                "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"
            )
        return "\n".join(lines) + "\n"

    def _write(self) -> None:
        (self.folder / "table.md").write_text(self.markdown(), encoding="utf-8")
        with (self.folder / "table.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(Row.__dataclass_fields__))
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)

    def _print(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)


def percentile(values: list[float], share: float) -> float:
    """The value below which the share of all values lies; 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
