"""The fused NaFlex runner on a CPU, with its kernels in Triton's interpreter, against the runner of torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_checkpoints import random_naflex, save_naflex
from torch import Tensor

from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.model_config import ModelConfig, NaflexImageConfig
from siglip_serve.engine.engines import NaflexEngine
from siglip_serve.engine.fused import ragged
from siglip_serve.engine.fused import runners as fused_module
from siglip_serve.engine.fused.naflex import FusedNaflex
from siglip_serve.engine.passes import OUTPUTS
from siglip_serve.engine.patches import PatchRows
from siglip_serve.engine.plan import Plan
from siglip_serve.engine.torch.naflex import TorchNaflex
from siglip_serve.heatmaps.attribution import SiglipExplainer
from siglip_serve.towers.naflex import load_vision

CPU = torch.device("cpu")
MOST = 9
# No width is a power of two. All are small, as the interpreter takes 20 ms for each row of each kernel.
VISION = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "patch_size": 6,
    "num_patches": 25,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path = tmp_path_factory.mktemp("naflex")
    return load_config(save_naflex(random_naflex(VISION, {"projection_size": 48}), path, MOST))


def image(config: ModelConfig) -> NaflexImageConfig:
    assert isinstance(config.image, NaflexImageConfig)
    return config.image


def rows() -> PatchRows:
    """Images on grids that shrink and widen the learned one. Their padding is noise, which must not count."""
    grids = np.array([[2, 4], [9, 1], [1, 3]])
    return PatchRows(np.random.default_rng(0).integers(0, 256, (3, MOST, 108), dtype=np.uint8), grids)


def plain(config: ModelConfig) -> TorchNaflex:
    return TorchNaflex(load_vision(config.path), image(config), CPU, torch.float32)


def fused(config: ModelConfig, float8: bool = False) -> FusedNaflex:
    dtype = torch.bfloat16 if float8 else torch.float32
    return FusedNaflex(load_vision(config.path), image(config), CPU, dtype, float8, max_rows=2, blocks=1)


def attend_by_torch(qkv: Tensor, lengths: Tensor, heads: int) -> Tensor:
    """Compute `ragged.attend`, except for tokens that are not real."""
    count = len(lengths)
    q, k, v = qkv.view(count, len(qkv) // count, 3, heads, -1).permute(2, 0, 3, 1, 4)
    hidden = torch.arange(k.shape[2]) >= lengths[:, None]
    mask = torch.zeros(hidden.shape, dtype=qkv.dtype).masked_fill(hidden, -torch.inf)
    y = F.scaled_dot_product_attention(q, k, v, mask[:, None, None])
    return y.transpose(1, 2).reshape(len(qkv), -1)


@pytest.mark.parametrize(("tokens", "heads", "depth"), [(9, 2, 12), (140, 1, 72)])
def test_attention_reads_only_real_keys(tokens: int, heads: int, depth: int) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([tokens, tokens // 2, 1], dtype=torch.int32)
    real = (torch.arange(tokens) < lengths[:, None]).flatten()
    qkv = torch.randn(3 * tokens, 3 * heads * depth)
    qkv[~real] *= 1000
    got = ragged.attend(qkv, lengths, heads)
    torch.testing.assert_close(got[real], attend_by_torch(qkv, lengths, heads)[real], rtol=1e-5, atol=1e-5)
    assert got.isfinite().all()  # they are multiplied by zero


@pytest.mark.usefixtures("gelu")
def test_outputs_equal_those_of_torch(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three images in passes of two, the last of which is shorter than the longest image may be."""
    monkeypatch.setattr("siglip_serve.engine.engines._naflex_runner", lambda *_: fused(config))
    engine = NaflexEngine(load_vision(config.path), image(config), Plan("cpu", "float32"))
    expected = plain(config)(rows(), OUTPUTS)()
    for part in (slice(0, 3), slice(2, 3)):
        got = engine(rows()[part], OUTPUTS).outputs
        assert got.keys() == expected.keys()
        for name, array in got.items():
            scale = np.abs(expected[name]).max()
            np.testing.assert_allclose(array, expected[name][part], rtol=0, atol=1e-5 * scale, err_msg=name)


@pytest.mark.usefixtures("gelu")
@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_maps_equal_those_of_torch(config: ModelConfig) -> None:
    alone, vectors = (
        rows().take(np.array([0])),
        torch.randn(2, 48, generator=torch.Generator().manual_seed(0)),
    )
    explainer = SiglipExplainer(load_vision(config.path), blocks=1)
    expected, got = (run.explain(explainer, alone, vectors) for run in (plain(config), fused(config)))
    torch.testing.assert_close(got.maps, expected.maps, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.embedding, expected.embedding, rtol=0, atol=1e-5)


def test_float8_is_close(float8_kernels: pytest.MonkeyPatch, config: ModelConfig) -> None:
    """Torch attends, since the interpreter multiplies no bfloat16."""
    float8_kernels.setattr(ragged, "attend", attend_by_torch)
    float8_kernels.setattr(fused_module, "_CALIBRATION_TOKENS", 90)
    got = fused(config, float8=True)(rows()[:2], ["EMBEDDING"])()["EMBEDDING"]
    expected = plain(config)(rows()[:2], ["EMBEDDING"])()["EMBEDDING"]
    cosine = (got * expected).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(expected, axis=1)
    assert 0.99 < cosine.min() < 0.9999999
