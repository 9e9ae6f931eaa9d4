"""Small vectors, compared with their definitions computed in another way."""

from __future__ import annotations

import base64
import struct

import numpy as np
import pytest
from numpy.typing import NDArray
from siglip_serve_client.compact import as_base64, compact, unit, value_range


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


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_levels_count_the_steps_that_a_value_has_passed(vectors: NDArray[np.float32], kind: str) -> None:
    """`quantize_embeddings` cuts (value - start) / step to a whole number, for int8 after subtracting 128."""
    width = vectors.shape[1]
    start, stop = np.full(width, -value_range(width)), np.full(width, value_range(width))
    step = (stop - start) / 255
    zero = 128 if kind == "int8" else 0  # the step that becomes level 0
    above, below = np.arange(1, 256 - zero), np.arange(1, zero + 1)
    for row, levels in zip(unit(vectors).astype(np.float64), compact(vectors, kind), strict=True):
        passed_up = row[:, None] >= start[:, None] + (zero + above) * step[:, None]
        passed_down = row[:, None] <= start[:, None] + (zero - below) * step[:, None]
        np.testing.assert_array_equal(levels, passed_up.sum(1) - passed_down.sum(1))


def test_bits_of_whole_bytes_are_those_of_the_flat_array(vectors: NDArray[np.float32]) -> None:
    """`quantize_embeddings` packs all rows as one. That gives rows only if the width is a multiple of 8."""
    if vectors.shape[1] % 8 == 0:
        flat = [sum(bit << (7 - at) for at, bit in enumerate(byte)) for byte in (vectors > 0).reshape(-1, 8)]
        assert compact(vectors, "ubinary").ravel().tolist() == flat
        assert compact(vectors, "binary").ravel().tolist() == [byte - 128 for byte in flat]


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


@pytest.mark.parametrize(("endianness", "order"), [("little", "<"), ("big", ">"), ("native", "=")])
@pytest.mark.parametrize(("dtype", "code"), [("float32", "f"), ("float16", "e")])
def test_base64_has_the_asked_values_and_order(dtype: str, code: str, endianness: str, order: str) -> None:
    vectors = np.array([[1.5, -2, 0.1], [0, 0.3333, 6e-5]], np.float32)
    for row, text in zip(vectors, as_base64(vectors, dtype, endianness), strict=True):
        assert base64.b64decode(text) == struct.pack(f"{order}3{code}", *row.tolist())


@pytest.mark.parametrize("wrong", [{"dtype": "bfloat16"}, {"endianness": "middle"}])
def test_other_values_and_orders_of_base64_are_refused(wrong: dict[str, str]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}: '{value}', expected one of"):
        as_base64(np.ones((1, 8), np.float32), **wrong)


def test_other_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="int4"):
        compact(np.ones((1, 8), np.float32), "int4")
