"""Installations: the interpreters that `make` takes, and the packages that `make serve` brings."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def interpreter(folder: Path, version: str) -> Path:
    """A program that makes environments as Python `version` does."""
    major, minor, patch = version.split(".")
    file = folder / "python"
    file.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = --version ]; then echo "Python {version}"; exit; fi\n'
        'if [ "$1" = -m ]; then mkdir -p "$3/bin"; echo "made $3"; exit; fi\n'
        f'exec python3 -c "import sys; sys.version_info = ({major}, {minor}, {patch})\n$2"'
    )
    file.chmod(0o755)
    return file


def make_environment(folder: Path, version: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            "make",
            f"PYTHON={interpreter(folder, version)}",
            f"VENV={folder}/venv",
            f"{folder}/venv/bin/python",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("version", ["2.7.18", "3.10.13", "3.13.0", "3.14.1"])
def test_make_refuses_an_interpreter_and_says_why(version: str, tmp_path: Path) -> None:
    done = make_environment(tmp_path, version)
    assert done.returncode != 0
    assert f"needs Python 3.11 or 3.12, and {tmp_path}/python is Python {version}" in done.stderr
    assert "needs numpy 1.26, which has no wheel for 3.13" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("version", ["3.11.2", "3.12.1"])
def test_make_takes_an_interpreter(version: str, tmp_path: Path) -> None:
    done = make_environment(tmp_path, version)
    assert f"made {tmp_path}/venv" in done.stdout, done.stderr


def test_the_project_requires_what_make_takes() -> None:
    assert PROJECT["requires-python"] == ">=3.11,<3.13"


def test_the_server_brings_parquet() -> None:
    """The page of the clients offers it after `make serve`."""
    extras = PROJECT["optional-dependencies"]
    assert "siglip-serve[parquet]" in extras["server"]
    assert any(requirement.startswith("pyarrow") for requirement in extras["parquet"])


SOURCES = [file for room in ("src", "clients", "validate") for file in sorted((ROOT / room).rglob("*.py"))]


def test_hints_install_extras_that_exist() -> None:
    """The package is on no index, so a hint names the checkout, or lets `install_hint` find a way."""
    extras = PROJECT["optional-dependencies"]
    named = set()
    for file in SOURCES:
        # Adjacent parts of one message are joined.
        text = re.sub(r'"\s*f?"', "", file.read_text(encoding="utf-8"))
        assert "siglip-serve[" not in text, file
        found = re.findall(r"pip install ([^`]*)`", text)
        for words in found:
            match = re.fullmatch(r"-e '\.\[(\w+)\]'", words)
            assert match, f"{file}: pip install {words}"
            assert f".venv/bin/pip install {words}` in the checkout" in text
            named.add(match[1])
        named |= set(re.findall(r"install_hint\('(\w+)'\)", text))
    assert {"int8", "load", "parquet", "segmentation", "server", "umap"} <= named <= set(extras)


def test_hints_name_targets_of_make_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set()
    for file in SOURCES:
        named |= set(re.findall(r"`make ([a-z-]+)[ `]", file.read_text(encoding="utf-8")))
    assert "serve" in named
    assert named <= targets
