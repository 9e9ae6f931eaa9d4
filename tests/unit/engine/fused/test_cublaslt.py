"""Calls of cuBLASLt, with a library that only takes notes. The numbers are those of `cublasLt.h`."""

# ruff: noqa: N802 - the names are the library's

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from siglip_serve.engine.fused import cublaslt
from siglip_serve.engine.fused.cublaslt import Algorithm, CublasLtError, Kind, Product

TRANSPOSED_A, EPILOGUE, BIAS, SCALE_A, SCALE_B, FAST_SUMS, BIAS_TYPE = 3, 7, 8, 17, 18, 25, 26
BF16, FLOAT8 = 14, 28


class Notes:
    """Stands in for the library."""

    def __init__(self) -> None:
        self.attributes: dict[int, int] = {}
        self.wishes: dict[int, int] = {}
        self.layouts: list[tuple[int, int, int, int]] = []
        self.product: tuple[Any, ...] = ()
        self.proposals = [0, 7, 0]  # their status
        self.status = 0

    def cublasLtMatmulDescCreate(self, description: Any, compute: int, scale: int) -> int:
        """Take the types of the computation."""
        assert (compute, scale) == (68, 0)  # in float32
        description._obj.value = 77
        return 0

    def cublasLtMatmulDescSetAttribute(self, _: Any, name: int, value: Any, size: Any) -> int:
        """Note an attribute."""
        assert size.value == ctypes.sizeof(value._obj)
        self.attributes[name] = value._obj.value
        return 0

    def cublasLtMatrixLayoutCreate(self, layout: Any, kind: int, rows: Any, columns: Any, step: Any) -> int:
        """Note a layout, and number it."""
        self.layouts.append((kind, rows.value, columns.value, step.value))
        layout._obj.value = len(self.layouts)
        return 0

    def cublasLtMatmulPreferenceCreate(self, _: Any) -> int:
        """Do nothing."""
        return 0

    def cublasLtMatmulPreferenceDestroy(self, _: Any) -> int:
        """Do nothing."""
        return 0

    def cublasLtMatmulPreferenceSetAttribute(self, _: Any, name: int, value: Any, size: Any) -> int:
        """Note a wish."""
        assert size.value == ctypes.sizeof(value._obj)
        self.wishes[name] = value._obj.value
        return 0

    def cublasLtMatmulAlgoGetHeuristic(self, *arguments: Any) -> int:
        """Propose algorithms."""
        found, count = arguments[-2], arguments[-1]._obj
        for place, status in enumerate(self.proposals):
            found[place].status, found[place].words[0] = status, 100 + place
        count.value = len(self.proposals)
        return self.status

    def cublasLtMatmul(self, *arguments: Any) -> int:
        """Note a product."""
        self.product = arguments
        return self.status


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Notes:
    """A library that is open."""
    library = Notes()
    monkeypatch.setattr(cublaslt, "_open", lambda _: (library, ctypes.c_void_p(5)))
    monkeypatch.setattr(cublaslt, "_workspace", lambda _: torch.zeros(1))

    class Stream:
        cuda_stream = 9

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream)
    return library


def shape_of(notes: Notes, place: int) -> tuple[int, int, int, int]:
    """The layout that an argument of the product names."""
    return notes.layouts[notes.product[place].value - 1]


def test_asks_for_the_transposed_product(notes: Notes) -> None:
    product = Product(
        Kind(3, 5, 16, torch.bfloat16, torch.bfloat16, bias=True, activation="gelu_pytorch_tanh"),
        torch.bfloat16,
        0,
    )
    x, w, out, bias = torch.zeros(3, 16), torch.zeros(5, 16).t(), torch.zeros(3, 5), torch.zeros(5)
    product(Algorithm(), x, w, out, bias)
    assert notes.attributes == {TRANSPOSED_A: 1, EPILOGUE: 36, BIAS_TYPE: BF16, BIAS: bias.data_ptr()}
    addresses = [notes.product[place].value for place in (3, 5, 10)]
    assert addresses == [w.data_ptr(), x.data_ptr(), out.data_ptr()]
    assert [shape_of(notes, place)[1:3] for place in (4, 6, 11)] == [(16, 5), (16, 3), (5, 3)]
    assert notes.product[7]._obj.value == 0
    assert notes.product[8] is None
    assert notes.product[-1].value == 9


def test_adds_where_asked(notes: Notes) -> None:
    product = Product(Kind(3, 5, 16, torch.float16, torch.float16, adds=True), torch.bfloat16, 0)
    out = torch.zeros(3, 5)
    product(Algorithm(), torch.zeros(3, 16), torch.zeros(5, 16).t(), out)
    assert notes.attributes == {TRANSPOSED_A: 1, EPILOGUE: 1}
    assert notes.product[7]._obj.value == 1
    assert notes.product[8].value == out.data_ptr()
    assert shape_of(notes, 9) == shape_of(notes, 11) == (2, 5, 3, 5)


def test_each_matrix_of_float8_has_its_own_scale(notes: Notes) -> None:
    eight = torch.float8_e4m3fn
    product = Product(Kind(16, 32, 48, eight, eight, bias=True), torch.bfloat16, 0)
    scales = torch.ones(()), torch.ones(())
    product(Algorithm(), torch.zeros(16, 48), torch.zeros(32, 48).t(), torch.zeros(16, 32), None, scales)
    assert notes.attributes[FAST_SUMS] == 1
    assert notes.attributes[EPILOGUE] == 4
    # The first matrix of the library is w.
    assert (notes.attributes[SCALE_B], notes.attributes[SCALE_A]) == tuple(s.data_ptr() for s in scales)
    assert [shape_of(notes, place)[0] for place in (4, 6, 9, 11)] == [FLOAT8, FLOAT8, BF16, FLOAT8]


def test_parts_are_added_in_float32_and_bad_proposals_are_left_out(notes: Notes) -> None:
    product = Product(Kind(3, 5, 16, torch.bfloat16, torch.bfloat16, adds=True), torch.bfloat16, 0)
    assert [algorithm.words[0] for algorithm in product.algorithms()] == [100, 102]
    assert notes.wishes == {1: 32 * 2**20, 3: 2, 5: 16, 6: 16, 7: 16, 8: 16}


def test_names_what_failed(notes: Notes) -> None:
    product = Product(Kind(3, 5, 16, torch.bfloat16, torch.bfloat16, adds=True), torch.bfloat16, 0)
    notes.status = 15
    with pytest.raises(CublasLtError, match="cublasLtMatmulAlgoGetHeuristic: status 15"):
        product.algorithms()
    with pytest.raises(CublasLtError, match="cublasLtMatmul: status 15"):
        product(Algorithm(), torch.zeros(3, 16), torch.zeros(5, 16).t(), torch.zeros(3, 5))
