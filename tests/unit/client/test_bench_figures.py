"""Figures of `siglip-serve bench`, each by its value."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from siglip_serve_client.commands.bench.record import Summary, summarise
from siglip_serve_client.commands.bench.report import Row, table_line, write_csv
from siglip_serve_client.commands.bench.run import Plan, Point

Record = tuple[float, float, float, float, str]


def record(folder: Path, name: str, rows: list[Record]) -> None:
    """Write what one process saw: due, sent, ended, CPU time, fault."""
    with (folder / name).open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_the_warm_up_begins_when_the_last_process_sends_its_first(tmp_path: Path) -> None:
    slow: list[Record] = [(100.0, 100.0, 102.5, 0.0, "")]
    fast: list[Record] = [(103.0 + n, 103.0 + n, 103.5 + n, 0.0, "") for n in range(12)]
    late: list[Record] = [(101.0, 101.0, 101.5, 0.0, "")]
    record(tmp_path, "1.csv", slow + fast)
    record(tmp_path, "2.csv", late)
    found = summarise(tmp_path, 2.0, 10.0, is_open=False)
    assert found.seconds == pytest.approx(10)
    assert found.latencies.tolist() == pytest.approx([0.5] * 10)  # the slow one ended in the warm-up
    assert found.answered == 10


def test_an_answer_at_the_end_of_the_measured_time_does_not_count(tmp_path: Path) -> None:
    rows: list[Record] = [(100.0, 100.0, 100.0 + n, 0.0, "") for n in range(6)]
    record(tmp_path, "1.csv", rows)
    found = summarise(tmp_path, 1.0, 3.0, is_open=False)  # 101 to 104
    assert found.answered == 3
    assert found.latencies.tolist() == [1, 2, 3]


def test_columns_are_named_after_the_percentiles_that_they_hold(tmp_path: Path) -> None:
    latencies = np.arange(1, 101) / 1000
    row = Row(Point(8), Summary(10.0, 400, latencies, Counter({"full": 3}), 0, (2.5, 5.0)))
    assert row.columns() == {
        "concurrency": "8",
        "rate": "",
        "requests_per_second": "40.0",
        "p50_ms": "50.50",
        "p95_ms": "95.05",
        "p99_ms": "99.01",
        "errors": "3",
        "late": "",
        "seconds": "10.00",
        "client_cores": "0.75",
    }
    assert table_line(row, False).split() == ["8", "40.0", "50.50", "95.05", "99.01", "3", "0.75"]
    heads = table_line(None, False)
    assert [heads.index(f"p{percent}, ms") for percent in (50, 95, 99)] == sorted(
        heads.index(f"p{percent}, ms") for percent in (50, 95, 99)
    )
    write_csv(Plan("host:1", processes=2), [row], tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        (written,) = csv.DictReader(file)
    assert (written["p95_ms"], written["p99_ms"]) == ("95.05", "99.01")
    assert (written["url"], written["processes"]) == ("host:1", "2")


def test_a_request_is_late_five_milliseconds_after_its_time(tmp_path: Path) -> None:
    rows: list[Record] = [(100.0, 100.0, 100.5, 0.0, "")]
    rows += [
        (101.0, 101.004, 101.5, 0.0, ""),
        (102.0, 102.006, 102.5, 0.0, ""),
        (103.0, 103.0, 103.5, 0.0, ""),
    ]
    record(tmp_path, "1.csv", rows)
    assert summarise(tmp_path, 0.5, 10.0, is_open=True).late == 1
    assert summarise(tmp_path, 0.5, 10.0, is_open=False).late == 0
