"""Matrix products of towers on NVIDIA GPUs, each by the fastest algorithm that there is for its shape.

torch lets cuBLASLt guess. At towers' shapes another of the library's algorithms is faster (products.csv of
benchmarks/results), or our own kernel where an activation follows (clip_gpu.csv). So the start tries them
beside torch's where a pass is recorded. Shapes that come later, and small products, are left to torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import cast

import torch
from torch import Tensor

from siglip_serve.engine.fused import activated, kernels
from siglip_serve.engine.fused.cublaslt import TANH_GELU, TYPES, CublasLtError, Kind, Product

__all__ = ["add_product", "choose", "linear", "scaled_product", "tried"]

# A product of fewer operations takes less than the host's call, so that no trial tells algorithms apart.
_LEAST_OPERATIONS = 15e9
_ROUNDS = 5
_CLEARLY = 0.98  # of torch's time; less is noise
_ALIGNED = 16  # bytes

Scales = tuple[Tensor, Tensor]
# Computes x w into a matrix: x, w, out, bias, scales.
_Way = Callable[[Tensor, Tensor, Tensor, Tensor | None, Scales | None], object]
_chosen: dict[tuple[int, Kind], _Way | None] = {}
_trying = False


@contextmanager
def tried() -> Iterator[None]:
    """Try algorithms for the shapes of products that the body of the `with` statement computes first."""
    global _trying  # noqa: PLW0603 - products are functions, and a process has one tower
    before, _trying = _trying, True
    try:
        yield
    finally:
        _trying = before


def linear(x: Tensor, w: Tensor, bias: Tensor, activation: str = "", out: Tensor | None = None) -> Tensor:
    """Compute activation(x w + bias).

    Args:
        x: [M, K], 16 bits.
        w: [K, N] of the same dtype, column by column.
        bias: [N] of the same dtype.
        activation: its name in `towers.siglip.ACTIVATIONS`, or empty for none.
        out: where the result is written, contiguous, only without an activation. None: in new memory.

    Returns:
        [M, N] of the same dtype.
    """
    kind = Kind(*_sizes(x, w), x.dtype, x.dtype, bias=True, activation=activation)
    return _compute(kind, x, w, out, bias)


def add_product(out: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """Add x w to `out` [M, N] in place, and return it. Arguments as for `linear`."""
    return _compute(Kind(*_sizes(x, w), x.dtype, out.dtype, adds=True), x, w, out)


def scaled_product(x: Tensor, w: Tensor, scales: Scales, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Compute (x s) (w t) + bias of matrices in float8.

    Args:
        x: [M, K] float8.
        w: [K, N] float8, column by column.
        scales: s and t, float32 scalars on the GPU.
        bias: [N] bfloat16.
        dtype: bfloat16 or float8.

    Returns:
        [M, N] of `dtype`.
    """
    kind = Kind(*_sizes(x, w), x.dtype, dtype, bias=bias is not None)
    return _compute(kind, x, w, bias=bias, scales=scales)


def _sizes(x: Tensor, w: Tensor) -> tuple[int, int, int]:
    """M, N and K of x w"""
    return len(x), w.shape[1], w.shape[0]


def _compute(
    kind: Kind,
    x: Tensor,
    w: Tensor,
    out: Tensor | None = None,
    bias: Tensor | None = None,
    scales: Scales | None = None,
) -> Tensor:
    """Compute a product by the way chosen for it, or by torch. `out` is written, or added to."""
    way = _find(kind, x, w, out, bias, scales)
    if way is None:
        return _by_torch(kind, x, w, out, bias, scales)
    if out is None:
        out = torch.empty(kind.m, kind.n, dtype=kind.output, device=x.device)
    way(x, w, out, bias, scales)
    return out


def _by_torch(
    kind: Kind, x: Tensor, w: Tensor, out: Tensor | None, bias: Tensor | None, scales: Scales | None
) -> Tensor:
    if kind.adds:
        return cast("Tensor", out).addmm_(x, w)
    if scales is not None:
        return torch._scaled_mm(x, w, *scales, bias, out_dtype=kind.output, use_fast_accum=True)
    if kind.activation == TANH_GELU:
        return torch._addmm_activation(cast("Tensor", bias), x, w, use_gelu=True)
    if kind.activation:  # another pass over a product that may have a way of its own
        return kernels.activate(_compute(kind._replace(activation=""), x, w, bias=bias), kind.activation)
    return torch.addmm(cast("Tensor", bias), x, w, out=out)


def _find(
    kind: Kind, x: Tensor, w: Tensor, out: Tensor | None, bias: Tensor | None, scales: Scales | None
) -> _Way | None:
    """Return the way to compute a product, or None if it is torch's."""
    if not x.is_cuda or kind.inputs not in TYPES:
        return None
    key = x.device.index, kind
    if key not in _chosen:
        if not _trying:
            return None
        _chosen[key] = _try(kind, x, w, bias, scales)
    others = [tensor for tensor in (out, bias) if tensor is not None]
    straight = all(tensor.is_contiguous() for tensor in (x, w.t(), *others))
    aligned = all(tensor.data_ptr() % _ALIGNED == 0 for tensor in (x, w, *others))
    return _chosen[key] if straight and aligned else None


def _try(kind: Kind, x: Tensor, w: Tensor, bias: Tensor | None, scales: Scales | None) -> _Way | None:
    """Time torch and the other ways, and return the fastest, or None for torch."""
    if 2.0 * kind.m * kind.n * kind.k < _LEAST_OPERATIONS:
        return None
    try:
        ways = list(_other_ways(kind, bias, x.device.index))
        if not ways:
            return None
        out = torch.zeros(kind.m, kind.n, dtype=kind.output, device=x.device)
        runs: list[Callable[[], object]] = [partial(_by_torch, kind, x, w, out, bias, scales)]
        runs += [partial(way, x, w, out, bias, scales) for way in ways]
        fastest = choose(runs, _milliseconds)
    except torch.OutOfMemoryError:  # a trial needs more of it than the pass
        return None
    return ways[fastest - 1] if fastest else None


def _other_ways(kind: Kind, bias: Tensor | None, device: int) -> Iterator[_Way]:
    """Yield what could compute a product besides torch."""
    if activated.is_supported(kind, device):
        yield partial(_by_kernel, kind.activation)
    if kind.activation in ("", TANH_GELU):
        try:
            product = Product(kind, torch.bfloat16 if bias is None else bias.dtype, device)
            yield from (partial(product, algorithm) for algorithm in product.algorithms())
        except CublasLtError as error:
            _tell(str(error))


def _by_kernel(
    activation: str, x: Tensor, w: Tensor, out: Tensor, bias: Tensor | None, _: Scales | None
) -> None:
    activated.product(x, w, out, cast("Tensor", bias), activation)


@lru_cache
def _tell(reason: str) -> None:
    """Print once why a way is left out."""
    print(f"siglip-serve: some matrix products may be slower: {reason}", flush=True)


def choose(runs: Sequence[Callable[[], object]], measure: Callable[[Callable[[], object]], float]) -> int:
    """Return the place of the fastest of several ways to compute the same.

    Args:
        runs: the usual way, than which another has to be clearly faster. One that raises is left out.
        measure: calls one of them, and returns its time.
    """
    runs[0]()
    working = [0]
    for place, run in enumerate(runs[1:], 1):
        try:
            run()
        except torch.OutOfMemoryError:
            raise
        except CublasLtError:
            continue
        except Exception as error:  # noqa: BLE001 - Triton's compiler has many, and there is the usual way
            _tell(f"{type(error).__name__}: {error}")
            continue
        working.append(place)
    times = dict.fromkeys(working, math.inf)
    # One after the other, and the shortest times: the GPU may have other work, and its clock changes.
    for _ in range(_ROUNDS):
        for place in working:
            times[place] = min(times[place], measure(runs[place]))
    fastest = min(working, key=times.__getitem__)
    return fastest if times[fastest] < times[0] * _CLEARLY else 0


def _milliseconds(run: Callable[[], object]) -> float:
    """Time two calls on the GPU."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
