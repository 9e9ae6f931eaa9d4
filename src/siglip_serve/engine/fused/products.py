"""Matrix products of towers on NVIDIA GPUs, each by the fastest algorithm that cuBLASLt has for its shape.

torch takes the algorithm that the library guesses to be the best. At towers' shapes another one is up to a
third faster (benchmarks/results/products.csv), so the start tries them all where a pass is recorded.
Shapes that come later, small products, and machines without the library are left to torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import Tensor

from siglip_serve.engine.fused.cublaslt import Algorithm, CublasLtError, Kind, Product

__all__ = ["add_product", "choose", "linear", "scaled_product", "tried"]

# A product of fewer operations takes less than the host's call, so that no trial tells algorithms apart.
_LEAST_OPERATIONS = 15e9
_ROUNDS = 5
_CLEARLY = 0.98  # of the time of the best guess; less is noise
_ALIGNED = 16  # bytes

_Found = tuple[Product, Algorithm] | None
_chosen: dict[tuple[int, Kind], _Found] = {}
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


def linear(x: Tensor, w: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    """Compute x w + bias, and its GELU in the tanh form if asked for.

    Args:
        x: [M, K], 16 bits.
        w: [K, N] of the same dtype, column by column.
        bias: [N] of the same dtype.
        gelu: compute it before the result is written.

    Returns:
        [M, N] of the same dtype.
    """
    kind = Kind(len(x), w.shape[1], w.shape[0], x.dtype, x.dtype, bias=True, gelu=gelu)
    found = _find(kind, x, w, bias)
    if found is None:
        return torch._addmm_activation(bias, x, w, use_gelu=True) if gelu else torch.addmm(bias, x, w)
    product, algorithm = found
    out = torch.empty(kind.m, kind.n, dtype=x.dtype, device=x.device)
    product(algorithm, x, w, out, bias)
    return out


def add_product(out: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """Add x w to `out` [M, N] in place, and return it. Arguments as for `linear`."""
    found = _find(Kind(len(x), w.shape[1], w.shape[0], x.dtype, out.dtype, adds=True), x, w, out)
    if found is None:
        return out.addmm_(x, w)
    product, algorithm = found
    product(algorithm, x, w, out)
    return out


def scaled_product(
    x: Tensor, w: Tensor, scales: tuple[Tensor, Tensor], bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
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
    kind = Kind(len(x), w.shape[1], w.shape[0], x.dtype, dtype, bias=bias is not None)
    found = _find(kind, x, w, bias, scales)
    if found is None:
        return torch._scaled_mm(x, w, *scales, bias, out_dtype=dtype, use_fast_accum=True)
    product, algorithm = found
    out = torch.empty(kind.m, kind.n, dtype=dtype, device=x.device)
    product(algorithm, x, w, out, bias, scales)
    return out


def _find(
    kind: Kind, x: Tensor, w: Tensor, other: Tensor | None, scales: tuple[Tensor, Tensor] | None = None
) -> _Found:
    """Return the algorithm for a product, or None if torch computes it. `other` is the bias or the output."""
    if not x.is_cuda:
        return None
    key = x.device.index, kind
    if key not in _chosen:
        if not _trying:
            return None
        _chosen[key] = _try(kind, x, w, other if kind.bias else None, scales)
    tensors = [tensor for tensor in (x, w, other) if tensor is not None]
    straight = x.is_contiguous() and w.t().is_contiguous() and (other is None or other.is_contiguous())
    aligned = all(tensor.data_ptr() % _ALIGNED == 0 for tensor in tensors)
    return _chosen[key] if straight and aligned else None


def _try(
    kind: Kind, x: Tensor, w: Tensor, bias: Tensor | None, scales: tuple[Tensor, Tensor] | None
) -> _Found:
    """Time the library's algorithms, and return the fastest, or None for torch's choice."""
    if 2.0 * kind.m * kind.n * kind.k < _LEAST_OPERATIONS:
        return None
    try:
        product = Product(kind, torch.bfloat16 if bias is None else bias.dtype)
        proposed = product.algorithms()
    except CublasLtError as error:
        print(f"siglip-serve: torch's choice of matrix products, which may be slower: {error}", flush=True)
        return None
    out = torch.zeros(kind.m, kind.n, dtype=kind.output, device=x.device)
    runs = [partial(product, algorithm, x, w, out, bias, scales) for algorithm in proposed]
    fastest = choose(runs, _milliseconds)
    return None if fastest is None else (product, proposed[fastest])


def choose(runs: Sequence[Callable[[], None]], measure: Callable[[Callable[[], None]], float]) -> int | None:
    """Return the place of the fastest of several ways to compute the same, or None if none works.

    The first that works is the best guess. Another one has to be clearly faster.

    Args:
        runs: compute, or raise `CublasLtError`.
        measure: calls one of them, and returns its time.
    """
    working: list[int] = []
    for place, run in enumerate(runs):
        with suppress(CublasLtError):
            run()
            working.append(place)
    if not working:
        return None
    times = dict.fromkeys(working, math.inf)
    # One after the other, and the shortest times: the GPU may have other work, and its clock changes.
    for _ in range(_ROUNDS):
        for place in working:
            times[place] = min(times[place], measure(runs[place]))
    fastest = min(working, key=times.__getitem__)
    return fastest if times[fastest] < times[working[0]] * _CLEARLY else working[0]


def _milliseconds(run: Callable[[], None]) -> float:
    """Time two calls on the GPU."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
