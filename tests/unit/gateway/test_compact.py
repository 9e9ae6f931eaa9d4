"""Small vectors, compared with their definitions computed in another way."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from numpy.typing import NDArray

from siglip_gateway.compact import as_base64, compact, unit, value_range


@pytest.fixture(params=[8, 64, 100, 768])
def vectors(request: pytest.FixtureRequest) -> NDArray[np.float32]:
    random = np.random.default_rng(request.param)
    return random.normal(size=(5, request.param)).astype(np.float32) * 3


def test_bits_are_the_signs(vectors: NDArray[np.float32]) -> None:
    bits = compact(vectors, "ubinary")
    width = vectors.shape[1]
    assert bits.dtype == np.uint8
    assert bits.shape == (5, -(-width // 8))
    for row, packed in zip(vectors, bits, strict=True):
        text = "".join(f"{byte:08b}" for byte in packed)
        assert text[:width] == "".join("1" if value > 0 else "0" for value in row)
    signed = compact(vectors, "binary")
    assert signed.dtype == np.int8
    np.testing.assert_array_equal(signed.astype(int) + 128, bits.astype(int))


def test_bytes_are_levels_of_a_fixed_range(vectors: NDArray[np.float32]) -> None:
    most = value_range(vectors.shape[1])
    levels = compact(vectors, "uint8")
    assert levels.dtype == np.uint8
    for row, found in zip(unit(vectors), levels, strict=True):
        step = 2 * most / 255
        expected = [min(255, max(0, int((float(value) + most) / step))) for value in row]
        np.testing.assert_array_equal(found, expected)


def test_signed_bytes_are_those_of_sentence_transformers(vectors: NDArray[np.float32]) -> None:
    """The formula of `quantize_embeddings`, for one value at a time, with a range of -r to r."""
    most = value_range(vectors.shape[1])
    found = compact(vectors, "int8")
    assert found.dtype == np.int8
    step = (most - -most) / 255
    for row, levels in zip(unit(vectors), found, strict=True):
        inside = [min(most, max(-most, float(value))) for value in row]
        np.testing.assert_array_equal(levels, [int((value - -most) / step - 128) for value in inside])


def test_bytes_do_not_depend_on_the_length_or_on_the_neighbours(vectors: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(compact(vectors * np.float32(4), "int8"), compact(vectors, "int8"))
    np.testing.assert_array_equal(compact(vectors[:1], "int8"), compact(vectors, "int8")[:1])


def test_bytes_keep_the_angles() -> None:
    random = np.random.default_rng(0)
    vectors = unit(random.normal(size=(50, 768)).astype(np.float32))
    small = unit(compact(vectors, "uint8").astype(np.float32) - 127)  # the middle of each level
    assert np.abs(small @ small.T - vectors @ vectors.T).max() < 0.005


def test_zero_stays_zero() -> None:
    np.testing.assert_array_equal(unit(np.zeros((1, 4), np.float32)), np.zeros((1, 4)))


def test_values_outside_the_range_are_clipped() -> None:
    vectors = np.zeros((2, 768), np.float32)
    vectors[0, 0], vectors[1, 0] = 1, -1
    assert compact(vectors, "uint8")[:, 0].tolist() == [255, 0]


def test_base64_holds_the_values() -> None:
    vectors = np.array([[1.5, -2], [0, 3e-9]], np.float32)
    found = [np.frombuffer(base64.b64decode(text), "<f4") for text in as_base64(vectors)]
    np.testing.assert_array_equal(found, vectors)


def test_other_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="int4"):
        compact(np.ones((1, 8), np.float32), "int4")
