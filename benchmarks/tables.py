"""Write the tables of figures in the pages from the committed results: `python -m benchmarks.tables`.

A page holds `<!-- table: NAME -->` and `<!-- end -->`. The lines between them are a table of
`benchmarks/table_specs.py`, written from a CSV in `benchmarks/results`. A figure within a sentence stands
between `<!-- figure: NAME -->` and `<!-- end -->` on one line. `--check` changes nothing: it prints what
differs and exits with 1.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.table_parts import RESULTS, TableError, figure, markdown
from benchmarks.table_specs import FIGURES, TABLES

__all__ = ["main", "pages", "rewrite"]

ROOT = Path(__file__).parents[1]
_FOLDERS = ("benchmarks", "checkpoints", "clients", "deployments", "docker", "docs", "training", "validate")
_BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_FIGURE = re.compile(r"(<!-- figure: ([\w-]+) -->)[^\n]*?(<!-- end -->)")


def rewrite(text: str, page: Path, results: Path = RESULTS) -> str:
    """The page's text with all of its tables and figures as the results have them.

    Args:
        text: the page, in Markdown.
        page: where it lies, for relative links.
        results: directory of the CSV files.

    Raises:
        TableError: the page names an unknown table or figure, or one finds no row.
    """

    def block(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        table = TABLES.get(name)
        if table is None:
            raise TableError(f"{page.name}: no table {name}; there are {', '.join(sorted(TABLES))}")
        return f"{begin}{markdown(table, page, results)}\n{end}"

    def inline(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in FIGURES:
            raise TableError(f"{page.name}: no figure {name}; there are {', '.join(sorted(FIGURES))}")
        source, cell = FIGURES[name]
        return f"{begin}{figure(cell, source, results)}{end}"

    return _FIGURE.sub(inline, _BLOCK.sub(block, text))


def pages(root: Path = ROOT) -> list[Path]:
    """Every page of the project that holds a table or a figure."""
    found = [*root.glob("*.md")]
    for folder in _FOLDERS:
        found += (root / folder).rglob("*.md")
    return sorted(
        page for page in found if re.search(r"<!-- (table|figure): ", page.read_text(encoding="utf-8"))
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the pages, or compare them with the results; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="print what differs and write nothing")
    options = parser.parse_args(arguments)
    differ = False
    for page in pages():
        old = page.read_text(encoding="utf-8")
        new = rewrite(old, page)
        if old == new:
            continue
        differ = True
        name = str(page.relative_to(ROOT))
        if options.check:
            sys.stdout.writelines(
                difflib.unified_diff(old.splitlines(True), new.splitlines(True), name, "results")
            )
        else:
            page.write_text(new, encoding="utf-8")
            print(f"rewrote {name}")
    return int(differ and options.check)


if __name__ == "__main__":
    raise SystemExit(main())
