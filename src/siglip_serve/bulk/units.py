"""Units of a job: a tar archive, a row group of a Parquet file, a fragment of Lance, lines of a listing.

A unit becomes one file of the output, whose name derives from the input. So a list of the output's files
tells what is left to do. Inputs that have to be searched are searched once: the units of a folder, and a
listing of its pictures, are kept in the output.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Literal

from siglip_serve_client.commands.embed.archives import IMAGE_SUFFIXES, TAR_SUFFIXES

from siglip_serve.bulk.storage import (
    Folder,
    StorageError,
    is_remote,
    list_below,
    local_path,
    open_file,
    size_of,
)

__all__ = ["InputOptions", "Unit", "copy_plans", "plan_units"]

Kind = Literal["tar", "parquet", "lance", "listing"]

_LISTINGS = (".txt", ".lst", ".list")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LINES_READ = 2**20  # bytes of a listing that tell the length of its lines
_PLANS = "inputs"


@dataclass(frozen=True)
class Unit:
    """A part of the input that becomes one file of the output.

    Attributes:
        name: of the output, without its suffix.
        kind: how to read it.
        source: path or URI of the file that holds it.
        start: the row group, the fragment, or the first byte in a listing.
        end: of a listing, the byte after the last line's beginning.
    """

    name: str
    kind: Kind
    source: str
    start: int = 0
    end: int = 0


@dataclass(frozen=True)
class InputOptions:
    """Choices about the input.

    Attributes:
        items: pictures of a listing that become one unit, about.
        all_files: take files of folders and members of tar archives for pictures, whatever their suffix.
    """

    items: int = 4096
    all_files: bool = False

    def is_image(self, name: str) -> bool:
        """Return True if a file of this name is read as a picture."""
        return self.all_files or _suffix(name) in IMAGE_SUFFIXES


def plan_units(
    inputs: Sequence[str], options: InputOptions, output: Folder, note: Callable[[str], None]
) -> Iterator[Unit]:
    """Divide the inputs of a job into units, in a fixed order.

    Args:
        inputs: files, folders, patterns with `*` or `{000..009}`, and listings (.txt, .lst, .list). Patterns
            of local files may have `?`, `[` and `**` too.
        options: as the command was given.
        output: keeps what was found in folders and patterns, and the lengths of listings, so that a later run
            has the same units.
        note: called with a sentence about files that are left out.

    Raises:
        StorageError: an input does not exist, has no pictures, or is a listing that has changed since it was
            first divided. The message names it.
    """
    known = set(output.names(_PLANS))
    search = partial(_searched, options=options, output=output, known=known, note=note)
    pictures: list[str] = []
    for given in map(_absolute, inputs):
        if _has_magic(given):
            yield from search(given, [given])
        elif _suffix(given) in _LISTINGS:
            _check_length(given, output, known)
            yield from _slices(given, given, options.items)
        elif given.lower().endswith(TAR_SUFFIXES):
            _require(given)
            yield Unit(_label(given), "tar", given)
        elif _suffix(given) in IMAGE_SUFFIXES and not Path(given).is_dir():
            pictures.append(given)
        else:
            yield from search(given, [given])
    if pictures:
        yield from search("\n".join(pictures), pictures)


def copy_plans(output: Folder, target: Folder) -> None:
    """Copy what `plan_units` keeps in an output."""
    for name in output.names(_PLANS):
        target.write(f"{_PLANS}/{name}", output.read(f"{_PLANS}/{name}") or b"")


def _check_length(listing: str, output: Folder, known: set[str]) -> None:
    """Refuse a listing that has changed: its parts would no longer be those of the finished files."""
    name = f"{_label(listing)}.bytes"
    length = _require(listing)
    if name not in known:
        output.write(f"{_PLANS}/{name}", str(length).encode())
        return
    before = (output.read(f"{_PLANS}/{name}") or b"").decode()
    if before != str(length):
        raise StorageError(
            f"{listing}: had {before} bytes when the job began, and has {length}; list further pictures in "
            "another file, or choose another output"
        )


def _searched(
    name: str,
    given: Sequence[str],
    *,
    options: InputOptions,
    output: Folder,
    known: set[str],
    note: Callable[[str], None],
) -> Iterator[Unit]:
    """The units of arguments that have to be searched, which happens only once."""
    label = _label(name) + ("-all" if options.all_files else "")
    if f"{label}.jsonl" not in known:
        _search(given, label, options, output)
    first, *units = (output.read(f"{_PLANS}/{label}.jsonl") or b"{}").splitlines()
    if left_out := json.loads(first).get("left_out"):
        note(f"{given[0]}: {_left_out(left_out)}")
    for line in units:
        unit = Unit(**json.loads(line))
        if unit.kind == "listing":
            yield from _slices(output.join(f"{_PLANS}/{label}.list"), name, options.items)
        else:
            yield unit


def _search(given: Sequence[str], label: str, options: InputOptions, output: Folder) -> None:
    """Keep the units of arguments, and a listing of their single pictures, in the output."""
    units: list[Unit] = []
    pictures, left_out = 0, 0
    with output.writing(f"{_PLANS}/{label}.list") as listing:
        for path in chain.from_iterable(map(_files, given)):
            if _is_table(path):
                units += _tables(path)
            elif path.lower().endswith(TAR_SUFFIXES):
                units.append(Unit(_label(path), "tar", path))
            elif options.is_image(path) or path in given:
                listing.write(_line(path))
                pictures += 1
            else:
                left_out += 1
    if pictures:
        units.append(Unit(label, "listing", ""))
    if not units:
        raise StorageError(f"{given[0]}: no pictures" + (f"; {_left_out(left_out)}" if left_out else ""))
    lines = [json.dumps({"left_out": left_out}), *(json.dumps(asdict(unit)) for unit in units)]
    output.write(f"{_PLANS}/{label}.jsonl", "\n".join(lines).encode())


def _left_out(count: int) -> str:
    files = "1 file is" if count == 1 else f"{count} files are"
    return f"{files} left out for the suffix; --all-files reads them too"


def _files(given: str) -> Iterator[str]:
    """Files that an argument names, in a fixed order."""
    braces = _BRACES.search(given)
    if braces is not None:
        first, last = braces.groups()
        for number in range(int(first), int(last) + 1):
            yield from _files(f"{given[: braces.start()]}{number:0{len(first)}}{given[braces.end() :]}")
    elif _has_magic(given):
        found = _matching(given) if is_remote(given) else sorted(glob.glob(given, recursive=True))  # noqa: PTH207
        if not found:
            raise StorageError(f"{given}: no file matches")
        yield from chain.from_iterable(map(_files, found))
    elif _is_table(given) or _require(given) is not None:
        yield given
    else:
        yield from list_below(given)


def _matching(pattern: str) -> list[str]:
    """URIs that match a pattern, among all below the folder before its first `*`."""
    folder = pattern[: pattern.index("*")].rpartition("/")[0]
    wanted = re.compile(re.escape(pattern).replace(r"\*\*", ".*").replace(r"\*", "[^/]*"))
    return sorted(path for path in list_below(folder) if wanted.fullmatch(path))


def _has_magic(given: str) -> bool:
    if is_remote(given):
        return "*" in given or _BRACES.search(given) is not None
    return not Path(given).exists() and (glob.has_magic(given) or _BRACES.search(given) is not None)


def _require(path: str) -> int | None:
    """Bytes of a file, or None for a folder."""
    try:
        return size_of(path)
    except FileNotFoundError:
        raise StorageError(f"{path}: no such file or folder") from None
    except OSError as error:
        raise StorageError(f"{path}: {error}") from error


def _absolute(given: str) -> str:
    return given if is_remote(given) else os.path.abspath(local_path(given))  # noqa: PTH100 - links stay


def _is_table(path: str) -> bool:
    return _suffix(path) in (".parquet", ".lance")


def _tables(path: str) -> Iterator[Unit]:
    """The row groups of a Parquet file, or the fragments of a Lance dataset."""
    if _suffix(path) == ".lance":
        import lance

        for fragment in lance.dataset(path).get_fragments():
            number = fragment.fragment_id
            yield Unit(f"{_label(path)}-{number:06}", "lance", path, number)
        return
    import pyarrow
    from pyarrow import parquet

    try:
        with open_file(path) as file:
            groups = parquet.ParquetFile(file).metadata.num_row_groups
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise StorageError(f"{path}: not a Parquet file that can be read: {error}") from error
    for group in range(groups):
        yield Unit(f"{_label(path)}-{group:06}", "parquet", path, group)


def _slices(listing: str, given: str, items: int) -> Iterator[Unit]:
    """Parts of about as many lines. Only the first lines are read, whatever the listing's length."""
    try:
        total = size_of(listing)
        if total is None:
            raise StorageError(f"{listing}: a folder, expected a listing with one path per line")
        with open_file(listing) as file:
            head = bytes(file.read(_LINES_READ))
    except OSError as error:
        raise StorageError(f"{listing}: {error}") from error
    if not head.strip():
        raise StorageError(f"{listing}: no lines")
    step = max(1, items * len(head) // (head.count(b"\n") or 1))
    label = _label(given)
    for start in range(0, total, step):
        yield Unit(f"{label}-{start:015}", "listing", listing, start, min(start + step, total))


def _line(path: str) -> bytes:
    """A line of a listing. Names that would be read as something else are written as JSON."""
    if path.startswith('"') or path != path.strip() or not path.isprintable():
        return json.dumps(path).encode() + b"\n"
    return path.encode("utf-8", "surrogateescape") + b"\n"


def _label(given: str) -> str:
    """A name for an input: part of its own, and a part that tells inputs of the same name apart."""
    bare = given.partition("?")[0] if is_remote(given) else given
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", PurePosixPath(bare).name)[:60].strip("._") or "input"
    digest = hashlib.sha256(bare.encode("utf-8", "surrogateescape")).hexdigest()[:10]
    return f"{stem.partition('.')[0] or stem}-{digest}"


def _suffix(path: str) -> str:
    bare = path.partition("?")[0] if is_remote(path) else path
    return PurePosixPath(bare.rstrip("/")).suffix.lower()
