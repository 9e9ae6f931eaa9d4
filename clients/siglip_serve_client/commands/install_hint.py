"""Commands that install what an option of `siglip-serve` needs."""

from __future__ import annotations

import os
import re
import shlex
import sys
from importlib.metadata import requires
from pathlib import Path

__all__ = ["install_hint"]

_CHECKOUT = Path(__file__).parents[3]


def install_hint(extra: str) -> str:
    """The shell command that installs an extra of this package, as it works in the current folder.

    The package is on no index. In a checkout the command installs the checkout with the extra, and elsewhere
    it names the packages of the extra.
    """
    pip = Path(sys.executable).with_name("pip")
    program = [_from_here(pip)] if pip.exists() else [_from_here(Path(sys.executable)), "-m", "pip"]
    if (_CHECKOUT / "pyproject.toml").is_file():
        return f"{shlex.join([*program, 'install', '-e'])} '{_from_here(_CHECKOUT)}[{extra}]'"
    marked = re.compile(rf"""; extra == ['"]{extra}['"]""")
    needed = [
        line.partition(";")[0].strip() for line in requires("siglip-serve") or [] if marked.search(line)
    ]
    return shlex.join([*program, "install", *needed])


def _from_here(path: Path) -> str:
    """The path relative to the current folder if it lies in it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
