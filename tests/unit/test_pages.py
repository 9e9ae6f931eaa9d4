"""The pages: their length, their links, their prose, and that they list what there is."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from pages import PAGES, PROSE, anchors, blocks, links, name
from prose_of_pages import measure, paragraphs, sentences
from wire import ROOT

from siglip_serve.config import PREFIX, Settings

HEADINGS = ["Stages", "Example Request", "Performance Analysis", "Validation", "Results", "Code"]
LIMITS = {"README.md": 150, "CONTRIBUTING.md": 60}
LANGUAGES = {"bash", "python", "sh", "mermaid"}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_are_short(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) <= LIMITS.get(name(page), 250)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def test_the_readme_leads_to_every_page() -> None:
    seen: set[Path] = set()
    todo = [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        targets = [target.partition("#")[0] for target in links(page) if "://" not in target]
        todo += [(page.parent / target).resolve() for target in targets if target]
    unlinked = {name(page) for page in PAGES if page not in seen}
    assert unlinked == set()


@pytest.mark.parametrize("page", PROSE, ids=name)
def test_pages_begin_with_their_purpose(page: Path) -> None:
    title, first = page.read_text(encoding="utf-8").split("\n\n")[:2]
    assert title.startswith("# ")
    assert re.match(r"\w", first), first
    assert next(sentences(first)).rstrip().endswith((".", ":")), first


@pytest.mark.parametrize("page", PROSE, ids=name)
def test_pages_have_short_sentences_and_few_semicolons(page: Path) -> None:
    found = measure([page.read_text(encoding="utf-8")])
    assert found.semicolons_per_hundred <= 10
    assert found.long_share <= 0.05, found.long


@pytest.mark.parametrize("page", PROSE, ids=name)
def test_blocks_name_their_language(page: Path) -> None:
    assert {language for language, _ in blocks(page)} <= LANGUAGES


@pytest.mark.parametrize("page", sorted((ROOT / "deployments").glob("*.md")), ids=name)
def test_pages_of_models_have_the_fixed_headings(page: Path) -> None:
    assert re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE) == HEADINGS


def test_the_page_of_settings_lists_every_setting() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    chosen_by_the_launcher = {
        "tower",
        "checkpoint_name",
        "checkpoint_revision",
        "checkpoint_note",
        "heatmaps",
    }
    for setting in fields(Settings):
        if setting.name not in chosen_by_the_launcher:
            option = f"`--{setting.name.replace('_', '-')}`"
            assert f"| {option} | `{PREFIX}{setting.name.upper()}` |" in page, setting.name


def test_the_page_of_models_lists_every_model() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    for config in (ROOT / "model_repository").glob("*/config.pbtxt"):
        assert f"`{config.parent.name}`" in page, config.parent.name


def test_the_page_of_heatmaps_lists_the_words_that_one_prompt_is_compared_with() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")]
    (source,) = [source for source in sources if "\n_BACKGROUND = (" in source]
    words = re.findall(r'"(\w+)"', source.partition("\n_BACKGROUND = (")[2].partition(")")[0])
    page = (ROOT / "docs" / "heatmaps.md").read_text(encoding="utf-8")
    assert len(words) > 10
    assert f"{', '.join(words)}." in page.replace("\n", " ")


def test_prose_leaves_out_what_is_not_prose() -> None:
    page = """# A title; with a semicolon

A sentence with `code; and more` and a [link; text](a;b.md). Another one
over two lines!

| a; table | b |
|---|---|

```sh
a; b; c
```

An example:

    indented; code

- An item. Its second sentence
  goes over two lines.
- Another item <!-- a comment; -->

![a picture; here](x.png)
"""
    assert list(paragraphs(page)) == [
        "A sentence with code and a link; text. Another one over two lines!",
        "An example:",
        "An item. Its second sentence goes over two lines.",
        "Another item",
    ]
    found = measure([page])
    assert (found.sentences, found.semicolons, found.long) == (6, 1, ())


def test_prose_counts_long_sentences() -> None:
    long = " ".join(["word"] * 31) + "."
    found = measure([f"{long} Short one.\n\n{' '.join(['word'] * 30)} – ."])
    assert found.long == (long,)
    assert found.long_share == pytest.approx(1 / 3)
    assert measure(["One; two; three. Four."]).semicolons_per_hundred == 100
