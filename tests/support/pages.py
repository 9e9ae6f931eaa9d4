"""The pages of the project: which there are, their blocks of code, their headings and their links."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from wire import ROOT

__all__ = ["PAGES", "PROSE", "anchors", "blocks", "links", "name"]

# Lists of authors and of licences, and a report that a program wrote.
_DATA = {"ATTRIBUTION.md", "SAMPLES.md", "LICENCES.md", "validation.md"}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def _tracked_pages() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    names = listed.stdout.split() if listed.returncode == 0 else []
    if not names:  # not a repository: an archive of the sources
        hidden = (".venv", ".tools", "build", "data")
        found = (path.relative_to(ROOT) for path in ROOT.rglob("*.md"))
        names = [str(path) for path in found if path.parts[0] not in hidden]
    return sorted(ROOT / name for name in names if (ROOT / name).is_file())


PAGES = _tracked_pages()
PROSE = [page for page in PAGES if page.name not in _DATA]


def name(page: Path) -> str:
    """The page's path from the top of the repository."""
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of every fenced block."""
    return _FENCE.findall(page.read_text(encoding="utf-8"))


def _prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", _prose(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        number = 1
        unique = anchor
        while unique in found:
            unique, number = f"{anchor}-{number}", number + 1
        found.add(unique)
    return found


def links(page: Path) -> list[str]:
    """Targets of all links and pictures, as they are written."""
    return _LINK.findall(re.sub(r"`[^`\n]+`", "", _prose(page)))
