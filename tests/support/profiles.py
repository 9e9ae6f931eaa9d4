"""ICC profiles, built by hand from the numbers of their standards, and their colours in sRGB."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "ADOBE_RGB",
    "DISPLAY_P3",
    "PRESS",
    "PRESS_LAB",
    "adobe_rgb",
    "display_p3",
    "grey_profile",
    "lab_in_srgb",
]

Floats = NDArray[np.float64]

_D50 = (0.9642, 1.0, 0.8249)
# Columns: red, green and blue in XYZ, adapted to D50, as the profiles of Apple, Adobe and HP have them.
_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
_ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
_SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
_ADOBE_GAMMA = 563 / 256


def _linear(encoded: ArrayLike) -> Floats:
    values = np.asarray(encoded, dtype=np.float64)
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _encoded(linear: ArrayLike) -> Floats:
    values = np.clip(np.asarray(linear, dtype=np.float64), 0, 1)
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


def _in_srgb(xyz: Floats) -> Floats:
    return 255 * _encoded(xyz @ np.linalg.inv(_SRGB).T)


def display_p3(samples: ArrayLike) -> Floats:
    """Samples [..., 3], 0 to 255, of Display P3 in sRGB, 0 to 255."""
    return _in_srgb(_linear(np.asarray(samples) / 255) @ _P3.T)


def adobe_rgb(samples: ArrayLike) -> Floats:
    """Samples [..., 3], 0 to 255, of Adobe RGB in sRGB, 0 to 255."""
    return _in_srgb((np.asarray(samples) / 255) ** _ADOBE_GAMMA @ _ADOBE.T)


def lab_in_srgb(lab: ArrayLike) -> Floats:
    """A colour L, a, b (D50) in sRGB, 0 to 255."""
    lightness, a, b = np.asarray(lab, dtype=np.float64)
    middle = (lightness + 16) / 116
    parts = np.array([middle + a / 500, middle, middle - b / 200])
    return _in_srgb(np.where(parts > 6 / 29, parts**3, 3 * (6 / 29) ** 2 * (parts - 4 / 29)) * np.array(_D50))


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A profile of version 2 with these tags."""
    everything = {
        b"desc": b"desc" + struct.pack(">II", 0, 5) + b"test\0" + bytes(4 + 4 + 2 + 1 + 67),
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": _xyz(_D50),
        **tags,
    }
    position = 128 + 4 + 12 * len(everything)
    table, data = struct.pack(">I", len(everything)), b""
    for name, tag in everything.items():
        padded = tag + bytes(-len(tag) % 4)
        table += struct.pack(">4sII", name, position + len(data), len(tag))
        data += padded
    head = struct.pack(
        ">I4sI4s4s4s6H4s4sI4s4sQI3i4s",
        position + len(data), b"none", 0x02400000, kind, space, connection, 2026, 1, 1, 0, 0, 0, b"acsp",
        b"APPL", 0, b"none", b"none", 0, 0, *(round(value * 65536) for value in _D50), b"none",
    )  # fmt: skip
    return head + bytes(128 - len(head)) + table + data


def _xyz(values: Sequence[float]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(float(value) * 65536) for value in values))


def _curve(function: Callable[[Floats], Floats]) -> bytes:
    values = np.round(65535 * function(np.linspace(0, 1, 1024))).astype(">u2")
    return b"curv" + bytes(4) + struct.pack(">I", len(values)) + values.tobytes()


def _of_primaries(primaries: Floats, curve: bytes) -> bytes:
    tags = {name + b"XYZ": _xyz(column) for name, column in zip((b"r", b"g", b"b"), primaries.T, strict=True)}
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags | {name + b"TRC": curve for name in (b"r", b"g", b"b")})


def grey_profile(gamma: float) -> bytes:
    """Grey whose samples are the light to the power of 1 / gamma."""
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": _curve(lambda values: values**gamma)})


def _of_press(corners: dict[int, tuple[float, float, float]]) -> bytes:
    """CMYK, by the colours L, a, b of full inks: bits 8, 4, 2, 1 of a corner are C, M, Y, K."""
    straight = bytes(range(256))
    grid = b""
    for corner in range(16):
        lightness, a, b = corners.get(corner, (0.0, 0.0, 0.0))
        grid += bytes([round(lightness * 2.55), round(a + 128), round(b + 128)])
    head = (
        b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * np.eye(3, dtype=int).ravel()))
    )
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": head + 4 * straight + grid + 3 * straight})


DISPLAY_P3 = _of_primaries(_P3, _curve(_linear))
ADOBE_RGB = _of_primaries(_ADOBE, _curve(lambda values: values**_ADOBE_GAMMA))
PRESS_LAB = {0: (100.0, 0.0, 0.0), 8: (60.0, -20.0, -30.0), 4: (50.0, 40.0, 0.0), 2: (90.0, 0.0, 60.0)}
PRESS = _of_press(PRESS_LAB)
