"""Measure self-attention on a GPU: our kernel, cuDNN and flash attention, alternately, on random tokens.

Before it is timed, our kernel is checked at many shapes in bfloat16 and float16, on fresh tokens each time.
It has to be right to half a rounding step of the type, and to write every value. The error is the norm of the
difference over the norm of the float32 result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from benchmarks.records import about, write_csv
from siglip_serve.engine.fused.attention import Shape, attend, is_supported

_TOKENS = (1, 16, 49, 64, 65, 100, 128, 129, 144, 196, 208, 209, 256, 257, 272, 273, 576, 729, 784, 1024)
_FEW_ROWS = 5
_CHECKED_TOKENS = 20_000  # so that each multiprocessor computes several heads
_SMALL = Shape(64, 1, 64, torch.bfloat16)
_SETS = 3  # of tokens, used alternately, so that none stays in a cache
_MOST_ERROR = 0.5  # in rounding steps of the type; cuDNN's error is 0.25, as ours
# Tokens, heads, depth of a head; rows.
_MEASURED = {
    "base/16@224": ((196, 12, 64), (192, 1)),
    "so400m/14@384": ((729, 16, 72), (48, 1)),
    "CLIP ViT-L/14@224": ((257, 16, 64), (160, 1)),
}

Attention = Callable[[Tensor, int, int], Tensor]


def _by(backend: SDPBackend) -> Attention:
    def run(qkv: Tensor, rows: int, heads: int) -> Tensor:
        q, k, v = qkv.view(rows, -1, 3, heads, qkv.shape[1] // 3 // heads).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(qkv), -1)

    return run


_WAYS: dict[str, Attention] = {
    "flash": _by(SDPBackend.FLASH_ATTENTION),
    "cuDNN": _by(SDPBackend.CUDNN_ATTENTION),
    "ours": attend,
}


def make_tokens(shape: Shape, rows: int) -> Tensor:
    """Draw qkv [rows * T, 3 * W], with columns of different sizes."""
    columns = 3 * shape.heads * shape.depth
    scale = torch.empty(columns, device="cuda").uniform_(0.2, 2.2)
    return (torch.randn(rows * shape.tokens, columns, device="cuda") * scale).to(shape.dtype)


def error(way: Attention, qkv: Tensor, rows: int, heads: int) -> float:
    """Return the error of a way's result against float32."""
    exact = _by(SDPBackend.MATH)(qkv.float(), rows, heads)
    return float((way(qkv, rows, heads).float() - exact).norm() / exact.norm())


def check(lengths: Sequence[int]) -> bool:
    """Check our kernel at many shapes; print the wrong ones, and return True if there are none."""
    wrong = []
    shapes = [
        Shape(tokens, heads, depth, dtype)
        for tokens in lengths
        for heads, depth in ((16, 72), (12, 64), (1, 64))
        for dtype in (torch.bfloat16, torch.float16)
    ]
    for shape in tqdm(shapes, desc="checked", unit="shape", disable=None):
        for rows in (1, _FEW_ROWS, max(_FEW_ROWS, _CHECKED_TOKENS // shape.tokens)):
            qkv = make_tokens(shape, rows)
            # Fill the memory that the result will get with NaN, so that values that are not written show.
            torch.full((len(qkv), shape.heads * shape.depth), torch.nan, dtype=shape.dtype, device="cuda")
            ours = error(attend, qkv, rows, shape.heads)
            if not ours <= _MOST_ERROR * torch.finfo(shape.dtype).eps:
                wrong.append(f"{shape}, {rows} rows: error {ours:.1e}")
    print(f"{len(shapes)} shapes checked, {len(wrong)} wrong", *wrong, sep="\n")
    return not wrong


def measure(geometry: str, rows: int, seconds: float) -> list[dict[str, str]]:
    """Measure a geometry; one row of the table per way."""
    shape = Shape(*_MEASURED[geometry][0], torch.bfloat16)
    heads = shape.heads
    sets = [make_tokens(shape, rows) for _ in range(_SETS)]
    graphs = {name: _record(way, sets, rows, heads) for name, way in _WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in _WAYS}
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    while sum(times["ours"]) * _SETS < 1000 * seconds:
        for name, graph in graphs.items():
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / _SETS)
    few = min(rows, _FEW_ROWS)
    work = 4 * rows * heads * shape.tokens**2 * shape.depth
    baseline = median(times["cuDNN"])
    return [
        {
            **about(["torch"], torch.cuda.get_device_name()),
            "geometry": geometry,
            "rows": str(rows),
            "way": name,
            "microseconds": f"{1000 * median(times[name]):.1f}",
            "tflops": f"{work / median(times[name]) / 1e9:.0f}",
            "ratio_to_cudnn": f"{baseline / median(times[name]):.2f}",
            "error": f"{error(way, sets[0][: few * shape.tokens], few, heads):.2e}",
        }
        for name, way in _WAYS.items()
    ]


def _record(way: Attention, sets: list[Tensor], rows: int, heads: int) -> torch.cuda.CUDAGraph:
    """Record all sets, one after the other, so that launches cost nothing."""
    for qkv in sets:
        way(qkv, rows, heads)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for qkv in sets:
            way(qkv, rows, heads)
    return graph


def main() -> None:
    """Check, measure, print, and append to a CSV if asked to; the status is 1 if something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1, help="time of our kernel, default %(default)s")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=_TOKENS, help="lengths to check, default many"
    )
    parser.add_argument("--output", type=Path, help="CSV file to append to")
    options = parser.parse_args()
    torch.manual_seed(0)
    if not torch.cuda.is_available() or not is_supported(
        torch.zeros(64, 192, device="cuda").bfloat16(), 1, 1
    ):
        sys.exit("needs a GPU of compute capability 9.0 and the package cuda-bindings")
    right = check(options.tokens)
    for geometry, (_, sizes) in _MEASURED.items():
        for rows in sizes:
            table = measure(geometry, rows, options.seconds)
            for row in table:
                print(" ".join(f"{value:>14}" for value in list(row.values())[-7:]))
            if options.output:
                write_csv(options.output, table, append=True)
    sys.exit(not right)


if __name__ == "__main__":
    main()
