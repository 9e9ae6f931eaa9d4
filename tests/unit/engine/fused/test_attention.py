"""The attention kernel without a GPU: how its work is cut, and that its source compiles.

The latter where CUDA's compiler is installed. That its numbers are right is checked on a GPU by
`python -m benchmarks.attention`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from siglip_serve.engine.fused.attention import Layout, Shape, attend, find, is_supported, kernel_source

# Of published towers: base and so400m at their sizes, and the text towers.
PUBLISHED = [(t, h, 64) for t, h in ((196, 12), (256, 12), (257, 16), (576, 16), (1024, 16))]
PUBLISHED += [(t, 16, 72) for t in (64, 256, 729)]


@pytest.mark.parametrize("depth", [64, 72])
def test_every_number_of_tokens_is_cut_into_what_fits(depth: int) -> None:
    for tokens in range(1, 1300):
        layout = Layout.of(tokens, depth)
        assert layout.shared_bytes <= 232_448
        assert layout.block % 16 == layout.half % 16 == 0
        assert 64 * layout.share * layout.items(tokens) >= tokens
        # What the kernel's static_asserts demand, so that no barrier's phases are confused.
        assert layout.slots % 3 == 0
        assert layout.slots >= layout.share
        single = layout.block >= tokens
        assert layout.share == 3 if not single else layout.share >= 3 or layout.stages % 3 == 0
        widths = layout.widths(tokens)
        assert all(0 < width <= 144 and width % 16 == 0 for width in widths)
        # The copy engine takes 256 rows, and swizzled memory begins at multiples of 8 rows.
        assert layout.box <= 256
        assert layout.box % 8 == layout.block % layout.box == 0
        if single:
            assert tokens <= sum(widths) * (1 if len(widths) == 2 or not layout.half else 2) < tokens + 16


@pytest.mark.parametrize(("tokens", "heads", "depth"), PUBLISHED)
def test_the_source_has_the_products_that_it_uses(tokens: int, heads: int, depth: int) -> None:
    source = kernel_source(Shape(tokens, heads, depth, torch.float16))
    assert "\nPRODUCTS\n" not in source
    written = {int(width) for width in re.findall(r"void scores<(\d+)>", source)}
    assert written == set(Layout.of(tokens, depth).widths(tokens))
    assert f"m64n{depth}k16.f32.f16.f16" in source


@pytest.mark.skipif(not shutil.which("nvcc"), reason="CUDA's compiler is not installed")
@pytest.mark.parametrize(("tokens", "heads", "depth"), [*PUBLISHED, (1, 1, 72), (144, 3, 64), (209, 12, 72)])
def test_the_source_compiles_without_spilling(tokens: int, heads: int, depth: int, tmp_path: Path) -> None:
    source = tmp_path / "attention.cu"
    source.write_text(kernel_source(Shape(tokens, heads, depth, torch.bfloat16)))
    target = ["-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-Xptxas", "-v", "-cubin"]
    command = ["nvcc", *target, "-o", str(tmp_path / "attention.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    spilled = re.search(r"(\d+) bytes spill stores", done.stderr)
    assert spilled, done.stderr
    assert int(spilled[1]) <= 64, done.stderr  # a few registers, of addresses


def test_what_is_not_on_a_gpu_is_left_to_torch() -> None:
    qkv = torch.zeros(4, 3 * 64, dtype=torch.bfloat16)
    assert not is_supported(qkv, 1, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, for which the kernel is compiled")
def test_a_kernel_that_cannot_be_had_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    shape = Shape(21, 1, 64, torch.bfloat16)
    assert find(shape, 0) is None
    assert find(shape, 0) is None
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    assert "cuDNN's attention instead of ours" in told
    with pytest.raises(RuntimeError, match="no attention kernel"):
        attend(torch.zeros(21, 3 * 64, dtype=torch.bfloat16), 1, 1)
