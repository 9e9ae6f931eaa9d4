"""Torch in place of what the kernels of a GPU compute otherwise than on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_serve.engine.fused import kernels


@pytest.fixture
def gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fuse the tanh form of the GELU behind a product, as on a GPU; on a CPU torch takes the exact form."""

    def product(bias: Tensor, x: Tensor, weight: Tensor, *, use_gelu: bool) -> Tensor:
        assert use_gelu
        return F.gelu(torch.addmm(bias, x, weight), approximate="tanh")

    monkeypatch.setattr(torch, "_addmm_activation", product)


@pytest.fixture
def float8_kernels(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Replace the float8 kernels, which the interpreter rounds wrongly."""

    def normalize_quantize(
        x: Tensor, offset: Tensor, eps: float, branch: kernels.Branch | None = None
    ) -> Tensor:
        if branch is not None:
            x += (branch[0].float() * branch[1][:, None]).to(x.dtype)
        width = x.shape[1]
        normalized = F.layer_norm(x.float() + offset, (width,), eps=eps)
        return (normalized * kernels.largest_norm_scale(width)).to(kernels.FLOAT8)

    def gelu_quantize(x: Tensor, scale: Tensor) -> kernels.Branch:
        y = F.gelu(x.float() * scale, approximate="tanh")
        largest = y.abs().amax(1, keepdim=True) / 448
        return (y / largest).to(kernels.FLOAT8), largest[:, 0]

    monkeypatch.setattr(kernels, "normalize_quantize", normalize_quantize)
    monkeypatch.setattr(kernels, "gelu_quantize", gelu_quantize)
    return monkeypatch
