"""Folders of a data set and their classes, for those that have no `LOC_synset_mapping.txt`.

- ImageNet-V2: folders named 0 to 999, which are ImageNet's classes in the order of their synset ids.
- ImageNet's 1,000 synset ids.
- Anything else, such as CIFAR as a directory: the folder is named after the class, with `_` for a space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from validate.errors import DatasetError

__all__ = ["named_classes", "part_folder"]

_VALID = ("valid", "val", "test")
_NAMES = Path(__file__).parent / "data" / "imagenet_classnames.json"
_SYNSET = re.compile(r"n\d{8}")


def part_folder(root: Path, part: str) -> Path:
    """Find the folder of the part `train` or `valid`; a data set without parts is all `valid`."""
    if part == "train":
        return root / "train"
    found = [root / name for name in _VALID if (root / name).is_dir()]
    if found:
        return found[0]
    return root / _VALID[0] if (root / "train").is_dir() or not root.is_dir() else root


def named_classes(root: Path) -> list[tuple[str, str]]:
    """List the classes of a data set without a mapping: name of the folder, and the class's names.

    Raises:
        DatasetError: there are no class folders, or the folders do not tell what the classes are.
    """
    folder = part_folder(root, "valid")
    names = sorted(child.name for child in folder.iterdir() if child.is_dir() and child.name[0] != ".")
    if not names:
        raise DatasetError(f"{folder}: no folders of classes")
    if all(name.isascii() and name.isdigit() for name in names):
        return _numbered(folder, names)
    if all(_SYNSET.fullmatch(name) for name in names):
        return _synsets(folder, names)
    return [(name, name.replace("_", " ")) for name in names]


def _numbered(folder: Path, names: Sequence[str]) -> list[tuple[str, str]]:
    words = _imagenet()[0]
    wrong = [name for name in names if str(int(name)) != name or int(name) >= len(words)]
    if wrong:
        raise DatasetError(
            f"{folder / wrong[0]}: expected folders named 0 to {len(words) - 1}, as ImageNet-V2 has"
        )
    return [(str(number), name) for number, name in enumerate(words)]


def _synsets(folder: Path, names: Sequence[str]) -> list[tuple[str, str]]:
    words, first, last = _imagenet()
    if (len(names), names[0], names[-1]) != (len(words), first, last):
        raise DatasetError(
            f"{folder}: {len(names)} synset ids from {names[0]} to {names[-1]}, which are not ImageNet's "
            f"{len(words)}; LOC_synset_mapping.txt must name them"
        )
    return list(zip(names, words, strict=True))


def _imagenet() -> tuple[list[str], str, str]:
    content = json.loads(_NAMES.read_text(encoding="utf-8"))
    return content["classnames"], content["first_synset"], content["last_synset"]
