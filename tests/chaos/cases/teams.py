"""Cases of teams: crops, frames, boxes, facts about the players, and the states that callers bring back."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from typing import Any

import numpy as np
from images import mutations
from numpy.typing import NDArray
from players import BOXES, FRAME

from tests.chaos.cases.base import World, chance, edge, picture
from tests.chaos.cases.files import operate
from tests.chaos.messages import Infer, Tensor, of_array, of_rows

__all__ = ["changed_state", "fits", "states"]

_MEMBERS = ("stamp", "origin", "nuisances", "components", "centroids", "axes", "spreads", "scales", "view")
_NUMBERS = (
    0.0,
    -1.0,
    1e-45,
    1e-7,
    1e-8,
    100.0,
    101.0,
    1e20,
    3.4e38,
    float("nan"),
    float("inf"),
    -float("inf"),
)


def fits(rng: random.Random, world: World) -> tuple[str, Infer]:
    """Make a request to fit_teams."""
    tensors, count = _players(rng, world)
    if chance(rng, 0.4):
        tensors.append(of_array("TRACK_ID", _whole(rng, count, np.int64)))
    if chance(rng, 0.4):
        roles = (b"player", b"goalkeeper", b"referee", b"", b"Player", b"\xff\xfe")
        rows = [rng.choice(roles) for _ in range(_near(rng, count))]
        tensors.append(of_rows("ROLE", rows, [len(rows)]))
    if chance(rng, 0.4):
        tensors.append(of_array("ANCHOR", _whole(rng, count, np.int32)))
    if chance(rng, 0.4):
        tensors.append(of_array("K", np.array([rng.choice((0, 1, 2, 2, 3, 8, 9, -1, 2**31 - 1))], np.int32)))
    if chance(rng, 0.3):
        tensors.append(of_rows("PREV_STATE", [changed_state(world.state, rng)[1]], [1]))
    return f"{count} players, {', '.join(tensor.name for tensor in tensors)}", Infer("fit_teams", tensors)


def states(rng: random.Random, world: World) -> tuple[str, Infer]:
    """Make a request to classify_teams with a changed state, or with odd pictures."""
    tensors, count = _players(rng, world, most=4)
    how, state = changed_state(world.state, rng)
    request = Infer("classify_teams", [*tensors, of_rows("STATE", [state], [1])])
    return f"{count} players, state {how}, {len(state)} bytes", request


def changed_state(state: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Change a state; return the name of the change and the state."""
    if not state or chance(rng, 0.03):
        return "random", rng.randbytes(rng.choice((0, 1, 22, 1000)))
    match rng.randrange(6):
        case 0:
            return "bytes", mutations(state, rng)
        case 1:
            return "members", _with_members(state, rng)
        case 2:
            return "numbers", _with_numbers(state, rng)
        case 3:
            return "archive", _with_archive(state, rng)
        case 4:
            return "large", state + bytes(rng.choice((1, 2**20, 2**21)))
        case _:
            return "whole", state


def _members(state: bytes) -> dict[str, NDArray[Any]]:
    with np.load(io.BytesIO(state), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _with_members(state: bytes, rng: random.Random) -> bytes:
    """Drop, rename, reshape or retype a member."""
    arrays = _members(state)
    name = rng.choice(_MEMBERS)
    array = arrays.pop(name)
    match rng.randrange(6):
        case 0:
            arrays[rng.choice(("origins", "", "../../etc/passwd", "a" * 300))] = array
        case 1:
            arrays[name] = array[..., : array.shape[-1] // 2]
        case 2:
            arrays[name] = array.astype(rng.choice(("f8", "f2", "i4", "u1", ">f4", "c8", "S4")))
        case 3:
            arrays[name] = np.repeat(array, rng.choice((0, 2, 100)), axis=0)
        case 4:
            arrays[name] = array.T[None]
        case _:
            arrays["stamp"] = np.frombuffer(_stamp(rng), np.uint8)
            arrays.setdefault(name, array)
    return _archive(arrays)


def _stamp(rng: random.Random) -> bytes:
    values: tuple[Any, ...] = (
        {},
        [],
        None,
        1,
        "x",
        {"encoder": None},
        {"encoder": "x" * 3000},
        {"a": {"b": []}},
    )
    return rng.choice((json.dumps(rng.choice(values)).encode(), b"[" * 4000, b"\xff", b"{", b'{"a":1e999}'))


def _with_numbers(state: bytes, rng: random.Random) -> bytes:
    """Put extreme numbers into one member."""
    arrays = _members(state)
    name = rng.choice(_MEMBERS[1:])
    array = arrays[name].copy()
    if array.size:
        places = np.array([rng.randrange(array.size) for _ in range(rng.choice((1, 3, array.size)))])
        array.reshape(-1)[places] = np.float32(rng.choice(_NUMBERS))
    arrays[name] = array
    return _archive(arrays)


def _with_archive(state: bytes, rng: random.Random) -> bytes:
    """Lie about sizes in the archive or in the header of an array, or write it in another way."""
    arrays = _members(state)
    if chance(rng, 0.3):
        return _archive(arrays, rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))
    if chance(rng, 0.3):
        name = rng.choice(_MEMBERS)
        return _archive({**arrays, name: arrays[name].astype(object)})
    changed = bytearray(state)
    marks = [
        at for at in range(len(state) - 4) if state[at : at + 2] == b"PK" or state[at : at + 5] == b"shape"
    ]
    at = rng.choice(marks) + rng.randrange(4, 30)
    if at + 4 <= len(changed):
        struct.pack_into("<I", changed, at, edge(rng) & 0xFFFFFFFF)
    return bytes(changed)


def _archive(arrays: dict[str, NDArray[Any]], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array, allow_pickle=array.dtype.hasobject)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), member.getvalue(), method)
    return file.getvalue()


def _players(rng: random.Random, world: World, most: int = 24) -> tuple[list[Tensor], int]:
    """Make crops, or a frame and boxes, some of them wrong."""
    count = rng.choice((0, 1, 2, most // 2, most, most))
    if chance(rng, 0.5):
        rows = [rng.choice(world.crops) for _ in range(count)]
        for at in range(count):
            if chance(rng, 0.05):
                rows[at] = operate(rows[at], rng)[1]
        return [of_rows("CROPS", rows, [count])], count
    tensors = [of_array("BOXES", _boxes(rng, count))]
    if chance(rng, 0.6):
        tensors.append(of_rows("FRAME", [picture(rng, world)[1]], [1]))
    if chance(rng, 0.5):
        shape = (rng.randint(0, 90), rng.randint(0, 400), rng.choice((3, 3, 3, 1, 4)))
        tensors.append(of_array("RAW_FRAME", np.resize(FRAME.astype(np.uint8), shape)))
    return tensors, count


def _boxes(rng: random.Random, count: int) -> NDArray[np.float32]:
    boxes = BOXES[[rng.randrange(len(BOXES)) for _ in range(count)]].copy()
    for row in range(count):
        if chance(rng, 0.15):
            values = (*_NUMBERS, float(edge(rng)), rng.uniform(-50, 2000))
            boxes[row, rng.randrange(4)] = np.float32(rng.choice(values))
    return boxes


def _whole(rng: random.Random, count: int, dtype: type[np.integer[Any]]) -> NDArray[Any]:
    limits = np.iinfo(dtype)
    values = [rng.randrange(-1, 6) if chance(rng, 0.95) else edge(rng) for _ in range(_near(rng, count))]
    return np.array([min(max(value, int(limits.min)), int(limits.max)) for value in values], dtype)


def _near(rng: random.Random, count: int) -> int:
    return count if chance(rng, 0.9) else max(count + rng.choice((-1, 1)), 0)
