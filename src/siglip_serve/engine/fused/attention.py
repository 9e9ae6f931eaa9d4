"""Self-attention on Hopper GPUs by a kernel of this project, 1.5 times as fast as cuDNN's at SigLIP's shapes.

cuDNN pads heads of depth 72 to 128 and loses time on sequences as short as 196 tokens. `attention.cu` does
neither. NVRTC, which GPU builds of torch bring, compiles it for a tower's shape when the tower is loaded.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Layout", "Shape", "attend", "find", "is_supported", "kernel_source"]

_SOURCE = Path(__file__).with_name("attention.cu")
_CAPABILITY = (9, 0)  # no other generation has its matrix instructions
_DEPTHS = (64, 72)
_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
_TILE = 64  # queries
_READERS = 3
_THREADS = 128 * (_READERS + 1)
_MOST_SHARED_BYTES = 232_448
_BARRIER_BYTES = 1024
_MOST_AT_ONCE = 272  # tokens of a short sequence, whose keys all fit into shared memory
_MOST_COPIED = 256  # rows of one copy
_BLOCK = 128
_OPTIONS = (b"--gpu-architecture=sm_90a", b"--std=c++17")


class Shape(NamedTuple):
    """Constants that a kernel is compiled for: qkv is [images * tokens, 3 * heads * depth] of `dtype`."""

    tokens: int
    heads: int
    depth: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Layout:
    """Division of the work, and contents of shared memory, by the names of `attention.cu`.

    Attributes:
        block: keys that are copied at once.
        half: keys of a single block that are multiplied first, or 0 for all.
        share: tiles of queries that use the same keys.
        stages: blocks of keys and values in shared memory.
        slots: tiles of queries in shared memory.
        shared_bytes: size of the shared memory.
    """

    block: int
    half: int
    share: int
    stages: int
    slots: int
    shared_bytes: int

    @classmethod
    def of(cls, tokens: int, depth: int) -> Layout:
        """Choose the fastest layout that fits."""
        share = -(-tokens // _TILE)
        # If there are more readers than tiles of an item, they skip items, but always the same number.
        stages = 2 if share >= _READERS else _READERS
        layout = cls._with(_up(tokens, 16), share, stages, depth)
        if tokens <= _MOST_AT_ONCE and layout.shared_bytes <= _MOST_SHARED_BYTES:
            return layout
        return cls._with(_BLOCK, _READERS, 3, depth)

    @classmethod
    def _with(cls, block: int, share: int, stages: int, depth: int) -> Layout:
        """Make a layout with as many slots as fit."""
        half = _up(block // 2, 16) if block > _BLOCK else 0
        for slots in (4 * _READERS, 3 * _READERS, 2 * _READERS):
            shared = _shared_bytes(block, stages, slots, depth)
            if shared <= _MOST_SHARED_BYTES:
                break
        return cls(block, half, share, stages, slots, shared)

    def widths(self, tokens: int) -> list[int]:
        """Return the numbers of keys that one product takes."""
        last = _up((tokens - 1) % self.block + 1, 16)
        if self.half:
            return sorted({self.half, last - self.half})
        return sorted({self.block, last} if tokens > self.block else {last})

    @property
    def box(self) -> int:
        """The keys of one copy: a whole block, or half of one that is too long."""
        return self.block if self.block <= _MOST_COPIED else self.block // 2

    def items(self, tokens: int) -> int:
        """Return the number of items of a head."""
        return -(-tokens // (_TILE * self.share))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _shared_bytes(block: int, stages: int, slots: int, depth: int) -> int:
    narrow = 16 if depth % 64 else 0
    row = depth // 64 * 128 + narrow  # bytes of a query or a key
    keys, values = _up(block * row, 1024), block * 128 * -(-depth // 64)
    return _BARRIER_BYTES + slots * _TILE * row + stages * (keys + values) + max(block, _TILE) * narrow


def kernel_source(shape: Shape) -> str:
    """Return the CUDA source for a shape."""
    layout, kind = Layout.of(shape.tokens, shape.depth), _TYPES[shape.dtype]
    constants = {
        "TOKENS": shape.tokens,
        "HEADS": shape.heads,
        "DEPTH": shape.depth,
        "TYPE": f'"{kind}"',
        "SCALE": f"{math.log2(math.e) * shape.depth**-0.5:.9f}f",  # exponentials are powers of two
        "READERS": _READERS,
        "BLOCK": layout.block,
        "HALF": layout.half,
        "SHARE": layout.share,
        "STAGES": layout.stages,
        "SLOTS": layout.slots,
        "SHARED_BYTES": layout.shared_bytes,
    }
    products = "\n".join(_products(layout.widths(shape.tokens), shape.depth, kind))
    body = _SOURCE.read_text().replace("\nPRODUCTS\n", f"\n{products}\n")
    return "".join(f"#define {name} {value}\n" for name, value in constants.items()) + body


def _products(widths: Sequence[int], depth: int, kind: str) -> Iterator[str]:
    """`scores<N>`: sums [64, N] (+)= queries, keys; `mix`: sums [64, depth] (+)= p, values."""
    yield "template <int N> __device__ void scores(float (&d)[N / 2], u64 a, u64 b, int add);"
    for width in widths:
        yield (
            f"template <> __device__ __forceinline__ void scores<{width}>"
            f"(float (&d)[{width // 2}], u64 a, u64 b, int add) {{"
            + _product(width, kind, ["l(a)"], "0, 0")
            + "}"
        )
    operands = [f"r(a{i})" for i in range(4)]
    arguments = ", ".join(f"u32 a{i}" for i in range(4))
    yield (
        f"__device__ __forceinline__ void mix(float (&d)[{depth // 2}], {arguments}, u64 b, int add) {{"
        + _product(depth, kind, operands, "1")
        + "}"
    )


def _product(width: int, kind: str, left: Sequence[str], transposed: str) -> str:
    """One asynchronous product of a warpgroup: d (+)= left, b. d has 64 rows and `width` columns."""
    sums = [f"%{i}" for i in range(width // 2)]
    first = [f"%{len(sums) + i}" for i in range(len(left))]
    second, add = (f"%{len(sums) + len(left) + i}" for i in range(2))
    a = first[0] if len(left) == 1 else f"{{{', '.join(first)}}}"
    text = (
        f"{{\\n.reg .pred p;\\nsetp.ne.b32 p, {add}, 0;\\nwgmma.mma_async.sync.aligned.m64n{width}k16.f32"
        f".{kind}.{kind} {{{', '.join(sums)}}}, {a}, {second}, p, 1, 1, {transposed};\\n}}"
    )
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(len(sums)))
    inputs = ", ".join(f'"{operand[0]}"{operand[1:]}' for operand in chain(left, ["l(b)", "r(add)"]))
    return f'asm volatile("{text}" : {outputs} : {inputs});'


def is_supported(qkv: Tensor, rows: int, heads: int) -> bool:
    """Return True if `attend` can compute this. Arguments as for `attend`."""
    return (
        qkv.is_cuda
        and qkv.dtype in _TYPES
        and qkv.shape[1] // 3 // heads in _DEPTHS
        and torch.cuda.get_device_capability(qkv.device) == _CAPABILITY
        and find(_shape(qkv, rows, heads), qkv.device.index) is not None
    )


def attend(qkv: Tensor, rows: int, heads: int) -> Tensor:
    """Self-attention.

    Args:
        qkv: [rows * T, 3 * W], contiguous, 16 bits, on a GPU; queries, keys and values, head by head.
        rows: images or texts.
        heads: of depth W / heads.

    Returns:
        [rows * T, W] of the same dtype.

    Raises:
        RuntimeError: `is_supported` is False for this.
    """
    kernel = find(_shape(qkv, rows, heads), qkv.device.index)
    if kernel is None:
        raise RuntimeError("no attention kernel for this shape, type and GPU")
    out = torch.empty(len(qkv), qkv.shape[1] // 3, dtype=qkv.dtype, device=qkv.device)
    kernel(qkv, out, rows)
    return out


def _shape(qkv: Tensor, rows: int, heads: int) -> Shape:
    return Shape(len(qkv) // rows, heads, qkv.shape[1] // 3 // heads, qkv.dtype)


@lru_cache
def find(shape: Shape, device: int) -> _Kernel | None:
    """Compile the kernel for a shape and a GPU. If that fails, print the reason and return None."""
    try:
        return _Kernel(shape, device)
    except (ImportError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        print(f"siglip-serve: cuDNN's attention instead of ours, which is faster: {error}", flush=True)
        return None


class _Kernel:
    """The compiled kernel on one GPU, whose context is the current one."""

    def __init__(self, shape: Shape, device: int) -> None:
        from cuda.bindings import driver

        self._shape, self._layout = shape, Layout.of(shape.tokens, shape.depth)
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._driver = driver
        # The module is kept as long as the function is used.
        self._module = _check(driver.cuModuleLoadData(_compile(shape)))
        self._function = _check(driver.cuModuleGetFunction(self._module, b"attention"))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(self._function, limit, self._layout.shared_bytes))

    def __call__(self, qkv: Tensor, out: Tensor, rows: int) -> None:
        """Launch the kernel on the current stream."""
        box = self._layout.box
        # Boxes of columns x tokens: 64 columns in rows of 128 bytes, or the 8 columns behind them.
        boxes = ((64, _TILE), (8, _TILE), (64, box), (8, box))
        maps = [self._map(qkv, rows, columns, tokens) for columns, tokens in boxes]
        pointer, count = ctypes.c_void_p(out.data_ptr()), ctypes.c_int(rows)
        addresses = [*(tensor_map.getPtr() for tensor_map in maps), *map(ctypes.addressof, (pointer, count))]
        parameters = (ctypes.c_void_p * len(addresses))(*addresses)
        items = rows * self._shape.heads * self._layout.items(self._shape.tokens)
        stream = torch.cuda.current_stream(qkv.device).cuda_stream
        grid, threads = (min(self._processors, items), 1, 1), (_THREADS, 1, 1)
        _check(
            self._driver.cuLaunchKernel(
                self._function, *grid, *threads, self._layout.shared_bytes, stream,
                ctypes.addressof(parameters), 0,
            )
        )  # fmt: skip

    def _map(self, qkv: Tensor, rows: int, columns: int, tokens: int) -> Any:
        """Describe a box of columns x tokens of one head of one image to the copy engine."""
        driver, shape = self._driver, self._shape
        types = driver.CUtensorMapDataType
        kind = (
            types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
            if shape.dtype is torch.bfloat16
            else types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
        )
        swizzles = driver.CUtensorMapSwizzle
        swizzle = (
            swizzles.CU_TENSOR_MAP_SWIZZLE_128B if columns == 64 else swizzles.CU_TENSOR_MAP_SWIZZLE_NONE
        )
        size, line = qkv.element_size(), qkv.stride(0) * qkv.element_size()
        number, short = driver.cuuint64_t, driver.cuuint32_t
        return _check(
            driver.cuTensorMapEncodeTiled(
                kind, 4, qkv.data_ptr(),
                [number(n) for n in (shape.depth, shape.tokens, 3 * shape.heads, rows)],
                [number(n) for n in (line, shape.depth * size, shape.tokens * line)],
                [short(n) for n in (columns, tokens, 1, 1)],
                [short(1)] * 4,
                driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        )  # fmt: skip


def _compile(shape: Shape) -> bytes:
    from cuda.bindings import nvrtc

    program = _check(nvrtc.nvrtcCreateProgram(kernel_source(shape).encode(), b"attention.cu", 0, [], []))
    (status,) = nvrtc.nvrtcCompileProgram(program, len(_OPTIONS), list(_OPTIONS))
    if status:
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"attention.cu for {shape}: {log.decode(errors='replace')}")
    binary = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
    _check(nvrtc.nvrtcGetCUBIN(program, binary))
    _check(nvrtc.nvrtcDestroyProgram(program))
    return binary


def _check(answer: tuple[Any, ...]) -> Any:
    """Return the result of a call of CUDA, without its status.

    Raises:
        RuntimeError: the call failed.
    """
    status, *rest = answer
    if status:
        raise RuntimeError(f"CUDA: {status!r}")
    return rest[0] if rest else None
