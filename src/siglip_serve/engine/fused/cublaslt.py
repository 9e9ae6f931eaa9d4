"""NVIDIA's library cuBLASLt: matrix products by an algorithm of choice.

Status codes, types and attributes have the numbers of `cublasLt.h`.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["TANH_GELU", "TYPES", "Algorithm", "CublasLtError", "Kind", "Product"]

TANH_GELU = "gelu_pytorch_tanh"
TYPES = {torch.bfloat16: 14, torch.float16: 2, torch.float8_e4m3fn: 28}
_FLOAT32, _COMPUTE_FLOAT32 = 0, 68
_TRANSPOSED_A, _EPILOGUE, _BIAS, _SCALE_A, _SCALE_B, _FAST_SUMS, _BIAS_TYPE = 3, 7, 8, 17, 18, 25, 26
_PLAIN, _WITH_BIAS, _WITH_GELU = 1, 4, 36
_WORKSPACE, _REDUCTIONS, _ALIGNMENTS = 1, 3, (5, 6, 7, 8)
_IN_FLOAT32 = 2  # parts of a product are added up in the type of the computation
_ALIGNED = 16  # bytes
_WORKSPACE_BYTES = 32 * 2**20
_PROPOSALS = 16


class CublasLtError(RuntimeError):
    """The library is not there, or refuses a product."""


class Kind(NamedTuple):
    """A product x [m, k] w [k, n], where w is stored column by column.

    Attributes:
        inputs, output: types of x and w, and of the result.
        bias: [n], in 16 bits, is added.
        activation: its name in `towers.siglip.ACTIVATIONS`, of what is computed at the end, only with a bias.
            The library knows `TANH_GELU`.
        adds: the result is added to what the output holds.
    """

    m: int
    n: int
    k: int
    inputs: torch.dtype
    output: torch.dtype
    bias: bool = False
    activation: str = ""
    adds: bool = False


class Algorithm(ctypes.Structure):
    """One way to compute a product, as the library describes it."""

    _fields_ = (
        ("words", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("status", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class Product:
    """A kind of product on a GPU.

    Args:
        kind: of the product.
        bias: type of the bias.
        device: index of the GPU.

    Raises:
        CublasLtError: there is no library, or it knows no such product.
    """

    def __init__(self, kind: Kind, bias: torch.dtype, device: int) -> None:
        self._library, self._handle = _open(device)
        self._device = device
        self._alpha, self._beta = ctypes.c_float(1), ctypes.c_float(kind.adds)
        # The library's matrices are stored column by column, so this is the transposed product: w.T x.T.
        inputs, output = TYPES[kind.inputs], TYPES[kind.output]
        self._w = self._layout(inputs, kind.k, kind.n)
        self._x = self._layout(inputs, kind.k, kind.m)
        self._out = self._layout(output, kind.n, kind.m)
        # What is added has 16 bits, also where the result has 8.
        self._added = self._layout(TYPES[bias], kind.n, kind.m) if output == 28 else self._out
        self._description = ctypes.c_void_p()
        self._call("MatmulDescCreate", ctypes.byref(self._description), _COMPUTE_FLOAT32, _FLOAT32)
        self._set(_TRANSPOSED_A, ctypes.c_int(1))
        epilogue = _WITH_GELU if kind.activation == TANH_GELU else _WITH_BIAS if kind.bias else _PLAIN
        self._set(_EPILOGUE, ctypes.c_uint32(epilogue))
        if kind.bias:
            self._set(_BIAS_TYPE, ctypes.c_int(TYPES[bias]))
        if inputs == 28:
            self._set(_FAST_SUMS, ctypes.c_int8(1))
        self._kind = kind

    def algorithms(self) -> list[Algorithm]:
        """Ask for algorithms, the best guess first."""
        preference = ctypes.c_void_p()
        self._call("MatmulPreferenceCreate", ctypes.byref(preference))
        wishes: list[tuple[int, Any]] = [(_WORKSPACE, ctypes.c_size_t(_WORKSPACE_BYTES))]
        wishes += [(_REDUCTIONS, ctypes.c_uint32(_IN_FLOAT32))]
        wishes += [(side, ctypes.c_uint32(_ALIGNED)) for side in _ALIGNMENTS]
        for name, value in wishes:
            size = ctypes.c_size_t(ctypes.sizeof(value))
            self._call("MatmulPreferenceSetAttribute", preference, name, ctypes.byref(value), size)
        found, count = (Algorithm * _PROPOSALS)(), ctypes.c_int()
        matrices = (self._w, self._x, self._added, self._out)
        try:
            self._call(
                "MatmulAlgoGetHeuristic", self._handle, self._description, *matrices, preference,
                _PROPOSALS, found, ctypes.byref(count),
            )  # fmt: skip
        finally:
            self._call("MatmulPreferenceDestroy", preference)
        return [one for one in found[: count.value] if not one.status]

    def __call__(
        self,
        algorithm: Algorithm,
        x: Tensor,
        w: Tensor,
        out: Tensor,
        bias: Tensor | None = None,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Launch the product on the current stream.

        Args:
            algorithm: one of `algorithms`.
            x: [m, k], contiguous.
            w: [k, n], whose transpose is contiguous.
            out: [m, n], contiguous. It is written, or added to.
            bias: [n].
            scales: float32 scalars on the GPU that x and w are multiplied by.

        Raises:
            CublasLtError: the algorithm does not take this product.
        """
        if bias is not None:
            self._set(_BIAS, ctypes.c_void_p(bias.data_ptr()))
        for name, scale in zip((_SCALE_B, _SCALE_A), scales or (), strict=False):
            self._set(name, ctypes.c_void_p(scale.data_ptr()))
        workspace = _workspace(self._device)
        stream = torch.cuda.current_stream(self._device).cuda_stream
        added = ctypes.c_void_p(out.data_ptr()) if self._kind.adds else None
        self._call(
            "Matmul", self._handle, self._description,
            ctypes.byref(self._alpha), ctypes.c_void_p(w.data_ptr()), self._w,
            ctypes.c_void_p(x.data_ptr()), self._x,
            ctypes.byref(self._beta), added, self._added,
            ctypes.c_void_p(out.data_ptr()), self._out,
            ctypes.byref(algorithm), ctypes.c_void_p(workspace.data_ptr()),
            ctypes.c_size_t(_WORKSPACE_BYTES), ctypes.c_void_p(stream),
        )  # fmt: skip

    def _layout(self, kind: int, rows: int, columns: int) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        sizes = ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows)
        self._call("MatrixLayoutCreate", ctypes.byref(layout), kind, *sizes)
        return layout

    def _set(self, name: int, value: Any) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        self._call("MatmulDescSetAttribute", self._description, name, ctypes.byref(value), size)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, f"cublasLt{name}")(*arguments)
        if status:
            raise CublasLtError(f"cublasLt{name}: status {status}")


@lru_cache
def _open(device: int) -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    """Open the library that torch has loaded, for a GPU."""
    torch.zeros(1, device=f"cuda:{device}")  # torch makes the context
    release = (torch.version.cuda or "").partition(".")[0]
    try:
        library = ctypes.CDLL(f"libcublasLt.so.{release}")
    except OSError as error:
        raise CublasLtError(str(error)) from error
    handle = ctypes.c_void_p()
    with torch.cuda.device(device):
        status = library.cublasLtCreate(ctypes.byref(handle))
    if status:
        raise CublasLtError(f"cublasLtCreate: status {status}")
    return library, handle


@lru_cache
def _workspace(device: int) -> Tensor:
    """Give the memory that algorithms write to. One is enough, since products follow each other."""
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=f"cuda:{device}")
