"""A check of the English in docstrings, comments and messages.

`python tests/support/prose_of_code.py FOLDER...` lists the hits below the folders.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

__all__ = ["LONGEST", "Text", "figures", "hits", "python_files", "sentences", "texts"]

LONGEST = 30  # words of a sentence
_FIRST = re.compile(r"(What|Whether|Of|As|The same|See)\b")
_FORBIDDEN = (
    "nobody",
    "whoever",
    "everybody",
    "goes on",
    "so many",
    "in turns",
    "of whom",
    "of which nothing",
    "by itself",
)
_PHRASES = re.compile(r"\b(" + "|".join(_FORBIDDEN).replace(" ", r"\s+") + r")\b", re.IGNORECASE)
_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Example|Examples|Note):$")
_ENTRY = re.compile(r" {4}[*\w][*\w, .]*: ")
_BULLET = re.compile(r"\s*([-*]|\d+\.) ")
_SPEAKING = {"help", "description", "epilog"}
_CALLS = {"print", "error", "warning", "info", "warn", "fail", "skip", "exit"}


@dataclass(frozen=True)
class Text:
    """A docstring, a comment or a part of a message, and the line at which it begins."""

    kind: Literal["docstring", "comment", "message"]
    line: int
    text: str


def python_files(folders: Iterable[Path]) -> list[Path]:
    """All Python files below the folders, sorted; a file stands for itself."""
    found = {file for folder in folders for file in ([folder] if folder.is_file() else folder.rglob("*.py"))}
    return sorted(file for file in found if not {".venv", "__pycache__"} & set(file.parts))


@cache  # two tests read all sources
def texts(source: str) -> list[Text]:
    """Everything in a module's source that a person reads.

    Messages are the strings in `raise` statements, in calls such as `print` and `error`, and in the help of
    command lines.
    """
    tree = ast.parse(source)
    found = list(_docstrings(tree))
    found += [
        Text("comment", token.start[0], token.string.lstrip("# "))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    spoken = {id(part): part for node in ast.walk(tree) for part in _spoken(node)}
    found += [Text("message", part.lineno, str(part.value)) for part in spoken.values()]
    return found


def _docstrings(tree: ast.Module) -> Iterator[Text]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield Text("docstring", node.body[0].lineno, text)


def _spoken(node: ast.AST) -> Iterator[ast.Constant]:
    roots: list[ast.AST] = []
    if isinstance(node, ast.Raise) and node.exc:
        roots.append(node.exc)
    elif isinstance(node, ast.Call):
        roots += [keyword.value for keyword in node.keywords if keyword.arg in _SPEAKING]
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        roots += node.args if name in _CALLS else []
    for root in roots:
        for part in ast.walk(root):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield part


def sentences(docstring: str) -> list[str]:
    """The sentences of a docstring without code, which is indented outside of sections or in backticks."""
    blocks: list[list[str]] = [[]]
    section = False
    for line in inspect.cleandoc(docstring).splitlines():
        if _SECTION.match(line):
            section = True
            blocks.append([])
            continue
        if line and not line.startswith(" "):
            section = False
        if not line or _BULLET.match(line) or (section and _ENTRY.match(line)):
            blocks.append([])
        if line and (section or not line.startswith("    ")):
            blocks[-1].append(line.strip())
    found = []
    for block in blocks:
        text = re.sub(r"`+[^`]*`+", "x", " ".join(block))
        found += [part for part in re.split(r"(?<=[.!?])\s+", text) if re.search(r"\w", part)]
    return found


def hits(source: str) -> list[tuple[int, str]]:
    """Line and reason of each forbidden phrase, and of each docstring with a forbidden first word."""
    found = []
    for text in texts(source):
        phrases = [" ".join(phrase[0].split()) for phrase in _PHRASES.finditer(text.text)]
        found += [(text.line, f"{text.kind}: {phrase!r}") for phrase in phrases]
        if text.kind == "docstring" and (first := _FIRST.match(text.text)):
            found.append((text.line, f"docstring begins with {first[0]!r}"))
    return sorted(found)


def figures(sources: Iterable[str]) -> tuple[float, float]:
    """Semicolons per 100 sentences of all docstrings, and the share of sentences over `LONGEST` words."""
    all_of_them = [
        sentence
        for source in sources
        for text in texts(source)
        if text.kind == "docstring"
        for sentence in sentences(text.text)
    ]
    count = max(len(all_of_them), 1)
    semicolons = sum(sentence.count(";") for sentence in all_of_them)
    return 100 * semicolons / count, sum(map(_is_long, all_of_them)) / count


def _is_long(sentence: str) -> bool:
    return len(re.findall(r"[^\W\d_][\w'-]*", sentence)) > LONGEST


def main(arguments: Sequence[str]) -> None:
    """List the hits of the folders, their long sentences and semicolons, and the two figures."""
    sources = {file: file.read_text(encoding="utf-8") for file in python_files(map(Path, arguments))}
    for file, source in sources.items():
        for line, reason in hits(source):
            print(f"{file}:{line}: {reason}")
        for text in texts(source):
            for sentence in sentences(text.text) if text.kind == "docstring" else ():
                if ";" in sentence or _is_long(sentence):
                    print(f"{file}:{text.line}: {'long' if _is_long(sentence) else 'semicolon'}: {sentence}")
    semicolons, long = figures(sources.values())
    print(f"{semicolons:.1f} semicolons per 100 sentences, {long:.1%} of sentences over {LONGEST} words")


if __name__ == "__main__":
    main(sys.argv[1:])
