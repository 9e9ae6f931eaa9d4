"""Matrix products of towers on a GPU: cuBLASLt's first guess, as torch takes it, and the algorithm chosen.

Random matrices at the shapes of full passes. Both ways alternate, and each comes first as often as the other,
because the GPU's clock falls as it gets warm. `difference` is the largest between both results, divided by
the largest result.

    python -m benchmarks.products --output benchmarks/results/products.csv
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.records import about, publish
from siglip_serve.engine.fused import kernels, products
from siglip_serve.engine.fused.kernels import FLOAT8

PACKAGES = ["torch", "numpy"]
# rows of a full pass x tokens, width, width within the MLP, activation there
TOWERS = {
    "so400m/14@384": (56 * 729, 1152, 4304, "gelu_pytorch_tanh"),
    "base/16@224": (192 * 196, 768, 3072, "gelu_pytorch_tanh"),
    "base, texts of 64 tokens": (256 * 64, 768, 3072, "gelu_pytorch_tanh"),
    "CLIP ViT-L/14@224": (160 * 257, 1024, 4096, "quick_gelu"),
    "CLIP ViT-L/14@224, 16 images": (16 * 257, 1024, 4096, "quick_gelu"),
}
_BATCH = 20  # products between two looks at the clock
_ROUNDS = 4

Compute = Callable[[], Tensor]
Ways = tuple[str, int, int, Compute, Compute]


def ways_16_bits(m: int, width: int, hidden: int, activation: str) -> Iterator[Ways]:
    """The four products of a block in bfloat16: name, n, k, torch's way and the chosen one."""
    for name, k, n in (
        ("queries, keys and values", width, 3 * width),
        ("activation", width, hidden),
        ("attention's output", width, width),
        ("MLP's output", hidden, width),
    ):
        x, w, bias, out = _draw(m, k), _draw(n, k).t(), _draw(n), torch.zeros_like(_draw(m, n))
        if name.endswith("output"):
            yield name, n, k, partial(out.addmm_, x, w, beta=1), partial(products.add_product, out, x, w)
        elif name == "activation":
            yield (
                activation, n, k, partial(in_torch, x, w, bias, activation),
                partial(products.linear, x, w, bias, activation),
            )  # fmt: skip
        else:
            yield name, n, k, partial(torch.addmm, bias, x, w), partial(products.linear, x, w, bias)


def in_torch(x: Tensor, w: Tensor, bias: Tensor, activation: str) -> Tensor:
    """The product and the activation as torch has them: in one only for the tanh form of the GELU."""
    if activation == "gelu_pytorch_tanh":
        return torch._addmm_activation(bias, x, w, use_gelu=True)
    return kernels.activate(torch.addmm(bias, x, w), activation)


def ways_8_bits(m: int, width: int, hidden: int) -> Iterator[Ways]:
    """The three products of a block that float8 has. See `ways_16_bits`."""
    one = torch.ones((), device="cuda")
    for name, k, n, dtype, has_bias in (
        ("queries, keys and values", width, 3 * width, torch.bfloat16, True),
        ("before the GELU", width, hidden, FLOAT8, True),
        ("MLP's output", hidden, width, torch.bfloat16, False),
    ):
        x, w = _draw(m, k).to(FLOAT8), _draw(n, k).to(FLOAT8).t()
        bias = _draw(n) if has_bias else None
        torch_way = partial(torch._scaled_mm, x, w, one, one, bias, out_dtype=dtype, use_fast_accum=True)
        yield name, n, k, torch_way, partial(products.scaled_product, x, w, (one, one), bias, dtype)


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def seconds(compute: Callable[[], Any]) -> float:
    """Median time of a product on the GPU."""
    times = []
    for _ in range(3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(_BATCH):
            compute()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / _BATCH)
    return median(times)


def measure(tower: str) -> Iterator[dict[str, str]]:
    """One row for each product of a tower."""
    m, width, hidden, activation = TOWERS[tower]
    for dtype, ways in (
        ("bfloat16", ways_16_bits(m, width, hidden, activation)),
        ("float8", ways_8_bits(m, width, hidden)),
    ):
        for name, n, k, usual, chosen in ways:
            with products.tried():
                found = chosen().clone().float()
            expected = usual().float()
            if name.endswith("output") and dtype == "bfloat16":
                expected -= found  # which was there when the same was added again
            difference = (found - expected).abs().max() / expected.abs().max()
            times: dict[str, list[float]] = {"usual": [], "chosen": []}
            for turn in range(_ROUNDS):
                both = [("usual", usual), ("chosen", chosen)]
                for way, compute in both if turn % 2 else reversed(both):
                    times[way].append(seconds(compute))
            best = {way: median(values) for way, values in times.items()}
            operations = 2.0 * m * n * k
            yield {
                **about(PACKAGES, torch.cuda.get_device_name()),
                "tower": tower,
                "dtype": dtype,
                "product": name,
                "m": str(m),
                "n": str(n),
                "k": str(k),
                "torch_tflops": f"{operations / best['usual'] / 1e12:.0f}",
                "chosen_tflops": f"{operations / best['chosen'] / 1e12:.0f}",
                "ratio": f"{best['usual'] / best['chosen']:.3f}",
                "difference": f"{difference.item():.5f}",
            }


def main() -> None:
    """Measure, print, and add to the CSV if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tower", choices=TOWERS, nargs="+", default=list(TOWERS), help="default all")
    parser.add_argument("--output", type=Path, help="CSV file to add to")
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        table = [row for tower in options.tower for row in measure(tower)]
    publish(table, PACKAGES, options.output)


if __name__ == "__main__":
    main()
