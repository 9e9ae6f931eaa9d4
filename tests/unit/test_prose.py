"""The English of docstrings, comments and messages: first words, phrases, semicolons, long sentences."""

from __future__ import annotations

from pathlib import Path

import pytest
from paths import ROOT
from prose_of_code import LONGEST, figures, hits, python_files, sentences

COVERED = ["src", "clients", "model_repository", "validate", "benchmarks", "training", "docker", "tests"]
MOST_SEMICOLONS = 10  # per 100 sentences
MOST_LONG = 0.05  # of all sentences
LONG = " ".join(["word"] * (LONGEST + 1))


@pytest.fixture(scope="module")
def sources() -> dict[Path, str]:
    files = python_files(ROOT / name for name in COVERED)
    return {file.relative_to(ROOT): file.read_text(encoding="utf-8") for file in files}


def test_covered_folders_have_files() -> None:
    for name in COVERED:
        assert python_files([ROOT / name]), name


def test_no_forbidden_words(sources: dict[Path, str]) -> None:
    found = [f"{file}:{line}: {reason}" for file, text in sources.items() for line, reason in hits(text)]
    assert not found, "\n".join(found)


def test_few_semicolons_and_long_sentences(sources: dict[Path, str]) -> None:
    semicolons, long = figures(sources.values())
    assert semicolons <= MOST_SEMICOLONS
    assert long <= MOST_LONG


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ('"""What the module does."""', "docstring begins with 'What'"),
        ('def f():\n    """Whether it is so."""', "docstring begins with 'Whether'"),
        ('class A:\n    """Of each row."""', "docstring begins with 'Of'"),
        ('async def f():\n    """As before."""', "docstring begins with 'As'"),
        ('"""The same as above."""', "docstring begins with 'The same'"),
        ('"""See `f`."""', "docstring begins with 'See'"),
        ('"""Served by itself."""', "docstring: 'by itself'"),
        ('"""Served in\nturns."""', "docstring: 'in turns'"),
        ("x = 1  # Nobody reads it.", "comment: 'Nobody'"),
        ('raise ValueError(f"{x}: so many")', "message: 'so many'"),
        ('raise Refused("it " "goes on") from error', "message: 'goes on'"),
        ('print("in turns")', "message: 'in turns'"),
        ('parser.error("of whom")', "message: 'of whom'"),
        ('add("--x", help="of which nothing is left")', "message: 'of which nothing'"),
        ('add("--x", help=f"for {x} and whoever")', "message: 'whoever'"),
        ('Parser(description="everybody")', "message: 'everybody'"),
    ],
)
def test_forbidden_words_are_found(source: str, reason: str) -> None:
    assert [found for _, found in hits(source)] == [reason]


def test_hits_name_their_line() -> None:
    assert hits("x = 1\n\n# it goes on\n") == [(3, "comment: 'goes on'")]


@pytest.mark.parametrize(
    "source",
    [
        '"""Whatever fits."""',
        '"""Offsets of rows."""',
        '"""Assets, seen."""',
        'prompt = "nobody"',
        'f("everybody")',
        '"""A row goes only on top."""',
    ],
)
def test_other_words_are_no_hits(source: str) -> None:
    assert hits(source) == []


def test_sentences_of_a_docstring() -> None:
    text = """Read rows; all of them.

    Two `a; b` here. Three?

        python code; is left out

    Args:
        path: of the file; it
            continues.
        other: one.

    - a bullet
    - another
    """
    assert sentences(text) == [
        "Read rows; all of them.",
        "Two x here.",
        "Three?",
        "path: of the file; it continues.",
        "other: one.",
        "- a bullet",
        "- another",
    ]


def test_figures_count_semicolons_and_long_sentences_of_docstrings_alone() -> None:
    source = f'"""One; two. Three. {LONG}. Four."""\n# a; b\nx = "c; d"'
    assert figures([source]) == (25.0, 0.25)
    assert figures([f'"""{LONG.removesuffix(" word")}."""']) == (0.0, 0.0)
    assert figures([]) == (0.0, 0.0)
