"""A fitted team model as bytes that a caller keeps: an `npz` file of a few arrays, never a pickle.

What comes back may be anybody's bytes. It is read without running or allocating anything that it declares:
members by name, stored uncompressed, of a known type, and as large as their shape says.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siglip_serve.errors import StateError

__all__ = ["MOST_STATE_BYTES", "TeamState"]

MOST_STATE_BYTES = 2**20
_MOST_STAMP_BYTES = 4096
# Without a date, the same state is the same bytes.
_DATE = (1980, 1, 1, 0, 0, 0)
# Errors of zipfile and json over broken or hostile bytes.
_UNREADABLE = (
    zipfile.BadZipFile,
    struct.error,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
)

# A fit works on unit vectors in orthonormal coordinates, so its numbers are of the size of 1, and its scales
# are at least 1e-6. Within these limits no sum or square of a prediction exceeds a float32.
_LARGEST_NUMBER, _SMALLEST_SCALE = 100.0, 1e-7

Array = NDArray[np.float32]


@dataclass(frozen=True)
class TeamState:
    """A fitted model. Embeddings are at unit length before anything else is done to them.

    Attributes:
        stamp: names the maker of the embeddings. A state fits no others.
        origin: [D], subtracted.
        nuisances: [m, D] orthonormal directions that are removed; m may be 0.
        components: [p, D] orthonormal directions in which teams are told apart; p of 0 stands for all of D.
        centroids: [k, p] (or [k, D]), one per team.
        axes: [q, p] (or [q, D]) orthonormal directions in which the spread within the teams is known.
        spreads: [q + 1], standard deviation along each axis within the teams, and of all that lies outside.
        scales: [k], median distance of a team's rows from its centroid, in units of these spreads.
        view: [2, p] (or [2, D]), directions to plot.
    """

    stamp: Mapping[str, str]
    origin: Array
    nuisances: Array
    components: Array
    centroids: Array
    axes: Array
    spreads: Array
    scales: Array
    view: Array

    def to_bytes(self) -> bytes:
        """An `npz` file that `numpy.load` reads as well. Equal states are equal bytes."""
        stamp = np.frombuffer(json.dumps(dict(self.stamp), sort_keys=True).encode(), dtype=np.uint8)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            for name in _MEMBERS:
                member = io.BytesIO()
                array = stamp if name == "stamp" else np.ascontiguousarray(getattr(self, name), dtype="<f4")
                np.save(member, array, allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy", _DATE), member.getvalue())
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: bytes, stamp: Mapping[str, str]) -> TeamState:
        """Read a state that `to_bytes` wrote.

        Args:
            data: untrusted bytes.
            stamp: of the embeddings that it is to be used for.

        Raises:
            StateError: empty, too large, not such a file, or made for other embeddings.
        """
        if not data:
            raise StateError("empty: the fit found no teams (DEGENERATE), or nothing was sent")
        if len(data) > MOST_STATE_BYTES:
            raise StateError(f"{len(data)} bytes, at most {MOST_STATE_BYTES} are allowed")
        try:
            arrays = _read_members(data)
            found = json.loads(arrays.pop("stamp").tobytes())
        except _UNREADABLE as error:
            reason = " ".join(str(error).split())[:100] or type(error).__name__
            raise StateError(f"{len(data)} bytes that are no state of fit_teams ({reason})") from error
        _check_stamp(found, stamp)
        state = TeamState(stamp=found, **arrays)
        _check_shapes(state)
        return state


# Only what `numpy.save` writes for these types: numpy's own reader would evaluate the header.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..{'descr': '([<|][fu]\d)', 'fortran_order': False, "
    rb"'shape': \(([\d, ]{0,40})\), } *\n",
    re.DOTALL,
)
_TYPES = {"stamp": b"|u1"}
_MEMBERS = tuple(field.name for field in fields(TeamState))
_RANKS = {
    "origin": 1,
    "nuisances": 2,
    "components": 2,
    "centroids": 2,
    "axes": 2,
    "spreads": 1,
    "scales": 1,
    "view": 2,
}


def _read_members(data: bytes) -> dict[str, NDArray[Any]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        if sorted(names) != sorted(f"{name}.npy" for name in _MEMBERS):
            raise ValueError(f"its members are {', '.join(names[:8]) or 'none'}")
        arrays = {}
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > len(data):
                raise ValueError(f"{member.filename} is compressed, or larger than the file")
            name = member.filename.removesuffix(".npy")
            arrays[name] = _read_array(name, archive.read(member))
        return arrays


def _read_array(name: str, content: bytes) -> NDArray[Any]:
    """The array of a `.npy` member, as a view of its bytes: nothing is allocated on the header's word."""
    header = _HEADER.match(content)
    if header is None or header[1] != _TYPES.get(name, b"<f4"):
        raise ValueError(f"{name} is no array of the type that it should have")
    shape = [int(side) for side in header[2].split(b",") if side.strip()]
    dtype, size = np.dtype(header[1].decode()), len(content) - header.end()
    if math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{name} has the shape {shape[:4]} and {size} bytes")
    if name == "stamp" and size > _MOST_STAMP_BYTES:
        raise ValueError(f"the stamp has {size} bytes")
    return np.frombuffer(content, dtype=dtype, offset=header.end()).reshape(shape)


def _check_stamp(found: object, expected: Mapping[str, str]) -> None:
    if not isinstance(found, dict):
        raise StateError("its stamp is no JSON object: no state of fit_teams")
    for name in sorted({*found, *expected}, key=str):
        if found.get(name) != expected.get(name):
            raise StateError(
                f"made with {name} {str(found.get(name))[:100]!r}, this server has {expected.get(name)!r}: "
                "fit the teams again"
            )


def _check_shapes(state: TeamState) -> None:
    for name, rank in _RANKS.items():
        array = getattr(state, name)
        if array.ndim != rank or not np.isfinite(array).all():
            raise StateError(f"{name} has the shape {list(array.shape)}, or numbers that are not finite")
        _check_size(name, array)
    width, teams = len(state.origin), len(state.scales)
    inner = len(state.components) or width
    shapes = {
        "nuisances": (len(state.nuisances), width),
        "components": (len(state.components), width),
        "centroids": (teams, inner),
        "axes": (len(state.axes), inner),
        "spreads": (len(state.axes) + 1,),
        "view": (2, inner),
    }
    for name, shape in shapes.items():
        got = getattr(state, name).shape
        if got != shape:
            raise StateError(f"{name} has the shape {list(got)}, expected {list(shape)}")
    if not teams or (state.scales <= 0).any():
        raise StateError(f"{teams} teams, or a scale that is not positive")
    for name in ("spreads", "scales"):
        values = getattr(state, name)
        small = np.flatnonzero(values < _SMALLEST_SCALE)
        if len(small):
            raise StateError(
                f"{name}[{small[0]}] is {values[small[0]]:g}, expected at least {_SMALLEST_SCALE:g}"
            )


def _check_size(name: str, array: Array) -> None:
    """Refuse a number that no fit gives, and that a prediction could turn into infinities."""
    large = np.argwhere(np.abs(array) > _LARGEST_NUMBER)
    if len(large):
        place = tuple(map(int, large[0]))
        raise StateError(
            f"{name}[{', '.join(map(str, place))}] is {array[place]:g}, "
            f"expected {-_LARGEST_NUMBER:g} to {_LARGEST_NUMBER:g}"
        )
