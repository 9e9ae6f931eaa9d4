"""The client's modules import in one direction, and the library does not know the commands."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from wire import ROOT

NAME = "siglip_serve_client"
PACKAGE = ROOT / "clients" / NAME
LAYERS = [
    {"errors", "compact"},
    {"projection"},
    {"_operations"},
    {"_transports"},
    {"_async_client", "_client", "team_tracker"},
    {"__init__"},
    {"commands"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_of(file): file for file in FILES}


def imported(file: Path) -> set[str]:
    """Modules of this package that a file imports, at any depth of the code; `__init__` is the package."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == NAME:
            base = node.module.removeprefix(NAME).removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                found.add(inner if inner in MODULES else base or "__init__")
        elif isinstance(node, ast.Import):
            assert not any(alias.name.partition(".")[0] == NAME for alias in node.names), file
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down(file: Path) -> None:
    rank = RANK[module_of(file).partition(".")[0]]
    for module in imported(file):
        assert RANK[module.partition(".")[0]] <= rank, (file, module)


def test_only_the_top_level_marks_what_is_private() -> None:
    for file in FILES:
        inner = file.relative_to(PACKAGE).parts[1:]
        assert not any(part.startswith("_") for part in inner if part != "__init__.py"), file


def test_the_library_has_one_stack_for_http() -> None:
    code = "\n".join(file.read_text(encoding="utf-8") for file in FILES)
    assert "import aiohttp" in code
    assert "tritonclient.http" not in code
    assert "urllib3" not in code
