"""Measures of the prose of a page: semicolons, and sentences that are too long.

Prose is what is left of a Markdown page without code blocks, tables, headings, pictures and comments. A link
counts with its text, a piece of `code` as one word. A sentence ends at `.`, `!` or `?` before a space, and at
the end of a paragraph or list item.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = ["LONG", "Prose", "measure", "paragraphs", "sentences"]

LONG = 30  # words

_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_PICTURE = re.compile(r"!\[[^\]]*\]\([^)]*\)", re.DOTALL)
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)", re.DOTALL)
_CODE = re.compile(r"`[^`]+`", re.DOTALL)
_ITEM = re.compile(r"^\s*(?:[-*]|\d+\.) ")
_END = re.compile(r"(?<=[.!?])[)*\"]*\s+")


@dataclass(frozen=True)
class Prose:
    """Counts of a page, or of several.

    Attributes:
        sentences: all sentences.
        semicolons: semicolons in them.
        long: sentences of more than `LONG` words.
    """

    sentences: int
    semicolons: int
    long: tuple[str, ...]

    @property
    def semicolons_per_hundred(self) -> float:
        """Semicolons in a hundred sentences."""
        return 100 * self.semicolons / max(1, self.sentences)

    @property
    def long_share(self) -> float:
        """Share of long sentences, 0 to 1."""
        return len(self.long) / max(1, self.sentences)


def paragraphs(page: str) -> Iterator[str]:
    """Paragraphs and list items of a page in Markdown, each on one line."""
    text = page
    for pattern, replacement in (
        (_FENCE, ""),
        (_COMMENT, ""),
        (_PICTURE, ""),
        (_CODE, "code"),
        (_LINK, r"\1"),
    ):
        text = pattern.sub(replacement, text)
    lines: list[str] = []
    listed = False  # within a list, indented lines go on with an item
    for line in [*text.splitlines(), ""]:
        item = bool(_ITEM.match(line))
        code = line.startswith("    ") and not listed and not lines
        if not line.strip() or item or line.startswith(("|", "#")) or code:
            if lines:
                yield " ".join(lines)
            lines = []
        if item:
            listed = True
        elif line.strip() and not line.startswith(" ") and not lines:
            listed = False
        if line.strip() and not line.startswith(("|", "#")) and not code:
            lines.append(_ITEM.sub("", line).strip())


def sentences(page: str) -> Iterator[str]:
    """Sentences of a page in Markdown."""
    for paragraph in paragraphs(page):
        yield from (sentence for sentence in _END.split(paragraph) if re.search(r"\w", sentence))


def measure(pages: Iterable[str]) -> Prose:
    """Counts of all pages together."""
    found = [sentence for page in pages for sentence in sentences(page)]
    long = tuple(
        sentence
        for sentence in found
        if sum(bool(re.search(r"\w", word)) for word in sentence.split()) > LONG
    )
    return Prose(len(found), sum(sentence.count(";") for sentence in found), long)
