"""States go out and come back; anything else is refused, and nothing in it is run or allocated."""

from __future__ import annotations

import io
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from siglip_serve.errors import StateError
from siglip_serve.teams.state import MOST_STATE_BYTES, TeamState

STAMP = {"version": "1", "encoder": "tiny:0123"}


def state() -> TeamState:
    rng = np.random.default_rng(0)

    def rows(*shape: int) -> Any:
        return rng.normal(size=shape).astype(np.float32)

    scales = np.ones(2, dtype=np.float32)
    scales, spreads = np.ones(2, dtype=np.float32), np.ones(4, dtype=np.float32)
    directions = (rows(16), rows(3, 16), rows(4, 16), rows(2, 4), rows(3, 4))
    return TeamState(STAMP, *directions, spreads, scales, view=rows(2, 4))


def with_member(name: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """The state with one member exchanged."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(state().to_bytes())) as old, zipfile.ZipFile(buffer, "w") as new:
        for member in old.namelist():
            if member == name:
                new.writestr(member, content, compression)
            else:
                new.writestr(member, old.read(member))
    return buffer.getvalue()


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


class Bomb:
    """Unpickling this is seen."""

    exploded = False

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _explode, ()


def _explode() -> None:
    Bomb.exploded = True


HEADER = b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f4', 'fortran_order': False, 'shape': (%s), }"
PLAIN = state().to_bytes()
HOSTILE = {
    "nothing": b"",
    "text": b"teams",
    "truncated": PLAIN[:-40],
    "first half": PLAIN[: len(PLAIN) // 2],
    "second half": PLAIN[len(PLAIN) // 2 :],
    "a flipped bit": PLAIN[:900] + bytes([PLAIN[900] ^ 1]) + PLAIN[901:],
    "a pickle": pickle.dumps(Bomb()),
    "a pickled array": with_member("origin.npy", npy(np.array([Bomb()], dtype=object))),
    "a huge shape": with_member("origin.npy", (HEADER % b"1000000000000,").ljust(127) + b"\n" + bytes(64)),
    "a negative shape": with_member("origin.npy", (HEADER % b"-1,").ljust(127) + b"\n" + bytes(64)),
    "code as a shape": with_member("origin.npy", (HEADER % b"__import__('os'),").ljust(127) + b"\n"),
    "compressed": with_member("origin.npy", npy(np.zeros(16, np.float32)), zipfile.ZIP_DEFLATED),
    "64 compressed megabytes": with_member("origin.npy", bytes(2**26), zipfile.ZIP_DEFLATED),
    "doubles": with_member("origin.npy", npy(np.zeros(16))),
    "not finite": with_member("origin.npy", npy(np.full(16, np.nan, np.float32))),
    "another width": with_member("origin.npy", npy(np.zeros(15, np.float32))),
    "another rank": with_member("origin.npy", npy(np.zeros((4, 4), np.float32))),
    "no teams": with_member("scales.npy", npy(np.zeros(0, np.float32))),
    "a scale of zero": with_member("scales.npy", npy(np.zeros(2, np.float32))),
    "a stamp that is no JSON": with_member("stamp.npy", npy(np.frombuffer(b"{", np.uint8))),
    "a stamp that is a list": with_member("stamp.npy", npy(np.frombuffer(b"[]", np.uint8))),
    "a deep stamp": with_member("stamp.npy", npy(np.frombuffer(b"[" * 4000, np.uint8))),
    "too large": PLAIN + bytes(MOST_STATE_BYTES),
}
MESSAGES = {
    "nothing": "empty: the fit found no teams",
    "text": "no state of fit_teams",
    "truncated": "no state of fit_teams",
    "first half": "no state of fit_teams",
    "second half": "no state of fit_teams",
    "a flipped bit": "no state of fit_teams",
    "a pickle": "no state of fit_teams",
    "a pickled array": "origin is no array of the type",
    "a huge shape": r"origin has the shape \[1000000000000\] and 64 bytes",
    "a negative shape": "origin is no array of the type",
    "code as a shape": "origin is no array of the type",
    "compressed": "origin.npy is compressed",
    "64 compressed megabytes": "origin.npy is compressed, or larger than the file",
    "doubles": "origin is no array of the type",
    "not finite": "origin has the shape .* numbers that are not finite",
    "another width": "nuisances has the shape",
    "another rank": r"origin has the shape \[4, 4\]",
    "no teams": r"centroids has the shape \[2, 4\], expected \[0, 4\]",
    "a scale of zero": "a scale that is not positive",
    "a stamp that is no JSON": "no state of fit_teams",
    "a stamp that is a list": "its stamp is no JSON object",
    "a deep stamp": "no state of fit_teams",
    "too large": "bytes, at most 1048576 are allowed",
}


def test_a_state_comes_back_as_it_was() -> None:
    again = TeamState.from_bytes(state().to_bytes(), STAMP)
    assert again.stamp == STAMP
    for name in ("origin", "nuisances", "components", "centroids", "axes", "spreads", "scales", "view"):
        assert np.array_equal(getattr(again, name), getattr(state(), name))
    assert again.to_bytes() == PLAIN


def test_empty_directions_come_back_too() -> None:
    whole = replace(
        state(), nuisances=np.zeros((0, 16), np.float32), components=np.zeros((0, 16), np.float32)
    )
    wide = np.zeros((2, 16), np.float32)
    whole = replace(whole, centroids=wide, axes=wide, spreads=np.ones(3, np.float32), view=wide)
    assert TeamState.from_bytes(whole.to_bytes(), STAMP).components.shape == (0, 16)


def test_numpy_reads_a_state() -> None:
    with np.load(io.BytesIO(PLAIN), allow_pickle=False) as arrays:
        assert arrays["centroids"].shape == (2, 4)


@pytest.mark.parametrize("name", HOSTILE)
def test_anything_else_is_refused(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(StateError, match=MESSAGES[name]) as refused:
            TeamState.from_bytes(HOSTILE[name], STAMP)
        assert tracemalloc.get_traced_memory()[1] < 4 * MOST_STATE_BYTES
    finally:
        tracemalloc.stop()
    assert len(str(refused.value)) < 400
    assert not Bomb.exploded


@pytest.mark.parametrize(
    ("stamp", "message"),
    [
        ({**STAMP, "encoder": "base:4567"}, "made with encoder 'tiny:0123', this server has 'base:4567'"),
        ({**STAMP, "region": "0,0,1,1"}, "made with region 'None', this server has '0,0,1,1'"),
        ({"version": "1"}, "made with encoder 'tiny:0123', this server has None"),
    ],
)
def test_a_state_of_other_embeddings_is_refused(stamp: dict[str, str], message: str) -> None:
    with pytest.raises(StateError, match=message):
        TeamState.from_bytes(PLAIN, stamp)
