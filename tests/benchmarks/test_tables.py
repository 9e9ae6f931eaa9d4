"""Tables of figures in the pages: written from the CSV files, and in the pages as the CSV files have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.table_parts import Cell, Column, Key, Source, Summary, Table, TableError, figure, markdown
from benchmarks.table_specs import FIGURES, TABLES

CSV = """date,device,way,rows,speed,cosine
2026-01-01,cpu,slow,1,1.0,1.0
2026-01-01,cpu,fast,1,3.0,
2026-01-02,cpu,slow,16,2.0,0.5
2026-01-02,cpu,fast,16,1000.0,-0.00001
2026-01-03,cpu,fast,16,5000.0,-0.00001
2026-01-03,gpu,fast,16,9.0,0.1
"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "speed.csv").write_text(CSV)
    return tmp_path / "results"


def _speed(way: str, reduce: str = "last") -> Column:
    return Column(way, Cell("{speed:,.1f}", {"way": way}, reduce))


def _lines(text: str) -> list[str]:
    return text.partition("\n\n")[0].splitlines()[2:]


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: str(page.relative_to(tables.ROOT)))
def test_pages_show_what_the_results_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == tables.rewrite(text, page), "run `python -m benchmarks.tables`"
    # Markdown takes a comment at the begin of a line for the end of the paragraph.
    assert "\n<!-- figure" not in text


def test_every_declared_table_stands_in_one_page() -> None:
    texts = [page.read_text(encoding="utf-8") for page in tables.pages()]
    for kind, names in (("table", TABLES), ("figure", FIGURES)):
        for name in names:
            assert sum(text.count(f"<!-- {kind}: {name} -->") for text in texts) == 1, name


def test_takes_the_last_of_several_runs_and_sorts_numbers_by_size(results: Path) -> None:
    table = Table(
        Source("speed.csv", {"device": "cpu"}), (Key("rows", "rows"),), (_speed("slow"), _speed("fast"))
    )
    assert _lines(markdown(table, results / "page.md", results)) == [
        "| 1 | 1.0 | 3.0 |",
        "| 16 | 2.0 | 5,000.0 |",
    ]


def test_reduces_several_runs_as_told(results: Path) -> None:
    source = Source("speed.csv", {"device": "cpu", "rows": "16", "way": "fast"})
    assert figure(Cell("{speed:.0f}", {}, "mean"), source, results) == "3000"
    assert figure(Cell("{speed:.0f}", {}, "largest"), source, results) == "5000"


def test_divides_by_the_row_to_compare_with(results: Path) -> None:
    cell = Cell("{speed:.1f}", {"way": "fast", "rows": "1"}, over={"way": "slow"})
    assert figure(cell, Source("speed.csv", {"device": "cpu"}), results) == "3.0"


def test_prints_named_values_alone_and_in_their_order(results: Path) -> None:
    keys = (Key("", "way", {"slow": "S", "fast": "F"}), Key("rows", "rows", {"16": "many"}))
    table = Table(Source("speed.csv", {"device": "cpu"}), keys, (Column("x", Cell("{cosine:.3f}", {})),))
    assert _lines(markdown(table, results / "page.md", results)) == [
        "| S | many | 0.500 |",
        "| F | many | 0.000 |",
    ]


def test_leaves_the_cell_of_a_missing_value_empty(results: Path) -> None:
    table = Table(
        Source("speed.csv", {"rows": "1"}), (Key("", "way"),), (Column("x", Cell("{cosine:.1f}", {})),)
    )
    assert _lines(markdown(table, results / "page.md", results)) == ["| slow | 1.0 |", "| fast |  |"]


def test_names_devices_days_and_the_file_below_the_table(results: Path) -> None:
    table = Summary(("a", "b"), ((Source("speed.csv", {"way": "fast"}), ("x", Cell("{speed:.0f}", {}))),))
    text = markdown(table, results.parent / "docs" / "page.md", results)
    assert text.endswith("cpu; gpu. 2026-01-01 to 2026-01-03. [speed.csv](../results/speed.csv).")


def test_refuses_a_source_without_rows(results: Path) -> None:
    with pytest.raises(TableError, match=r"speed\.csv: no row with \{'way': 'none'\}"):
        figure(Cell("{speed}", {}), Source("speed.csv", {"way": "none"}), results)


def test_refuses_unknown_names_in_a_page() -> None:
    with pytest.raises(TableError, match=r"page\.md: no table nosuch"):
        tables.rewrite("<!-- table: nosuch -->\n<!-- end -->", Path("page.md"))
    with pytest.raises(TableError, match=r"page\.md: no figure nosuch"):
        tables.rewrite("so <!-- figure: nosuch --><!-- end -->", Path("page.md"))


def test_check_prints_the_difference_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text("<!-- figure: peer-gpu -->0.1<!-- end --> times\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "pages", lambda: [page])
    assert tables.main(["--check"]) == 1
    assert "-<!-- figure: peer-gpu -->0.1<!-- end --> times" in capsys.readouterr().out
    assert "0.1" in page.read_text()
    assert tables.main([]) == 0
    assert "0.1" not in page.read_text()
    assert tables.main(["--check"]) == 0
