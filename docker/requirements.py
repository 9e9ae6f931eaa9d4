"""Prints what a pyproject.toml depends on, one requirement a line: requirements.py FILE [EXTRA ...]."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def main() -> None:
    """Print the dependencies of the project and of the named extras, which must not name other extras."""
    project = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"]]
    for extra in sys.argv[2:]:
        wanted += project["optional-dependencies"][extra]
    print("\n".join(wanted))


if __name__ == "__main__":
    main()
