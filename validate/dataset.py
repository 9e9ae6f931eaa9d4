"""ImageNet-shaped folders: `train/{synset}/*`, `valid/{synset}/*` and `LOC_synset_mapping.txt`.

A row of the mapping is a synset id, a space, and the class's names: `n01440764 tench, Tinca tinca`. Without a
mapping the folders themselves name the classes, see `validate.folders`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from validate.errors import DatasetError
from validate.folders import named_classes, part_folder

__all__ = [
    "MAPPING",
    "ClassInfo",
    "Dataset",
    "OnError",
    "Sample",
    "drawn",
    "few_shot",
    "load_dataset",
    "read_class_list",
    "read_mapping",
]

MAPPING = "LOC_synset_mapping.txt"
OnError = Literal["skip", "stop"]
_ROW = re.compile(r"(n\d{8})\s+(\S.*)")


@dataclass(frozen=True)
class ClassInfo:
    """One row of the mapping, or one folder; then `synset` is its name."""

    synset: str
    text: str

    @property
    def first_name(self) -> str:
        """The name before the first comma."""
        return self.text.split(",")[0].strip()


@dataclass(frozen=True)
class Sample:
    """One image file and the index of its class in the mapping."""

    path: Path
    label: int

    @property
    def style(self) -> str:
        """Start of the file name, before its first underscore: `twemoji_p0.png` -> `twemoji`."""
        stem, _, rest = self.path.stem.partition("_")
        return stem if rest else "none"


@dataclass
class Dataset:
    """An ImageNet-shaped folder, and its problems."""

    root: Path
    classes: list[ClassInfo]
    train: list[Sample] = field(default_factory=list)
    valid: list[Sample] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class _Problems:
    """Collector of problems, which stops at the first if asked to."""

    def __init__(self, on_error: OnError) -> None:
        self.found: list[str] = []
        self._stop = on_error == "stop"

    def add(self, problem: str) -> None:
        if self._stop:
            raise DatasetError(f"{problem} (--on-error skip continues without it)")
        self.found.append(problem)


def load_dataset(root: Path, on_error: OnError, valid_per_class: int = 0) -> Dataset:
    """Scan `root`.

    Args:
        root: the folder with the mapping, `train` and `valid` (or `val` or `test`); see `validate.folders`.
        on_error: `stop` raises at the first bad row, missing class or empty folder. `skip` names it
            in `problems` and continues.
        valid_per_class: most validation images per class, by file name. 0 is all.

    Raises:
        DatasetError: the classes are not told, there is nothing to validate on, or `on_error` is `stop`.
    """
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder")
    problems = _Problems(on_error)
    mapped = (root / MAPPING).is_file()
    classes = (
        _read_mapping(root / MAPPING, problems)
        if mapped
        else [ClassInfo(name, text) for name, text in named_classes(root)]
    )
    dataset = Dataset(root, classes)
    valid, train = part_folder(root, "valid"), part_folder(root, "train")
    if train.is_dir() or mapped:
        dataset.train = _scan(train, dataset.classes, problems, 0)
    dataset.valid = _scan(valid, dataset.classes, problems, valid_per_class)
    dataset.problems = problems.found
    if not dataset.valid:
        raise DatasetError(f"{valid}: no images of any class" + (f" in {MAPPING}" if mapped else ""))
    return dataset


def read_mapping(file: Path) -> list[ClassInfo]:
    """The classes of a `LOC_synset_mapping.txt`, by synset id.

    Raises:
        DatasetError: it cannot be read, or a row is bad.
    """
    return _read_mapping(file, _Problems("stop"))


def _read_mapping(file: Path, problems: _Problems) -> list[ClassInfo]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file}: cannot be read ({error})") from error
    classes: dict[str, ClassInfo] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = _ROW.fullmatch(line.strip())
        if not match:
            problems.add(f"{file.name} line {number}: expected 'n01440764 tench, Tinca tinca', got {line!r}")
        elif match[1] in classes:
            problems.add(f"{file.name} line {number}: {match[1]} was given before")
        else:
            classes[match[1]] = ClassInfo(match[1], match[2])
    if not classes:
        raise DatasetError(f"{file}: no usable row")
    return sorted(classes.values(), key=lambda row: row.synset)


def _scan(folder: Path, classes: Sequence[ClassInfo], problems: _Problems, limit: int) -> list[Sample]:
    samples: list[Sample] = []
    name = folder.name
    if not folder.is_dir():
        problems.add(f"{name}: no such folder")
        return samples
    known = {row.synset for row in classes}
    for extra in sorted(child.name for child in folder.iterdir() if child.is_dir()):
        if extra not in known:
            problems.add(f"{name}/{extra}: not in {MAPPING}")
    for label, row in enumerate(classes):
        directory = folder / row.synset
        if not directory.is_dir():
            problems.add(f"{name}/{row.synset}: no such folder ({row.first_name})")
            continue
        files = sorted(file for file in directory.iterdir() if file.is_file() and file.name[0] != ".")
        if not files:
            problems.add(f"{name}/{row.synset}: empty folder ({row.first_name})")
        found = [Sample(file, label) for file in files]
        # Not the first by name: these would all be of one style.
        samples += [found[position] for position in few_shot(found, limit, seed=0)] if limit else found
    return samples


def few_shot(samples: Sequence[Sample], shots: int, seed: int) -> list[int]:
    """Positions in `samples` of `shots` images of each class, chosen by `seed`, or all where there are fewer.

    The choice hangs on the file names alone, and fewer shots are the first of more: it stays the same
    when images that no draw takes are left out.
    """
    positions: dict[int, list[int]] = {}
    for position, sample in enumerate(samples):
        positions.setdefault(sample.label, []).append(position)

    def rank(position: int) -> bytes:
        return hashlib.sha256(f"{seed}/{samples[position].path.name}".encode()).digest()

    chosen = [sorted(group, key=rank)[:shots] for group in positions.values()]
    return sorted(position for group in chosen for position in group)


def drawn(samples: Sequence[Sample], shots: int, seeds: Iterable[int]) -> list[Sample]:
    """The samples that `few_shot` takes with any of the seeds: no others need to be embedded."""
    positions = {position for seed in seeds for position in few_shot(samples, shots, seed)}
    return [samples[position] for position in sorted(positions)]


def read_class_list(file: Path) -> set[str]:
    """Synset ids, the first word of each line.

    Raises:
        DatasetError: the file cannot be read, or holds none.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DatasetError(f"{file}: {error.strerror or error}") from error
    found = {line.split()[0] for line in lines if line.strip()}
    if not found:
        raise DatasetError(f"{file}: no class in it")
    return found
