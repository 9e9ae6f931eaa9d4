"""CLIP in the fused runners on a CPU, with kernels in Triton's interpreter, against the runners of torch.

CUDA graphs and the kernels that torch has for a GPU are not run here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from random_checkpoints import random_clip, random_model, save_checkpoint, save_clip
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.model_config import ModelConfig
from siglip_serve.engine.engines import TextEngine
from siglip_serve.engine.fused import activated, heatmaps, kernels
from siglip_serve.engine.fused.blocks import attend
from siglip_serve.engine.fused.class_token import taken
from siglip_serve.engine.fused.runners import FusedText, FusedVision
from siglip_serve.engine.passes import OUTPUTS, Arrays, Finish
from siglip_serve.engine.plan import Plan
from siglip_serve.engine.torch.runners import TorchText, TorchVision
from siglip_serve.heatmaps.attribution import ClipExplainer, Explanation
from siglip_serve.towers import siglip
from siglip_serve.towers.clip import ClipTextTower, ClipVisionTower, load_text, load_vision

CPU = torch.device("cpu")
ACTIVATIONS = ["quick_gelu", "gelu", "gelu_pytorch_tanh"]
SIDE, CONTEXT, END = 50, 48, 299


@pytest.fixture(scope="module", params=ACTIVATIONS)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    # Patches do not divide the image, and no width is a power of two. Tokens and layers are few, as the
    # interpreter takes milliseconds for each row of each kernel.
    shared = {
        "hidden_size": 72,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "hidden_act": request.param,
    }
    vision = {"image_size": SIDE, "patch_size": 16}
    model = random_clip(vision | shared, {"max_position_embeddings": CONTEXT} | shared)
    return load_config(save_clip(model, tmp_path_factory.mktemp("clip")))


def pixels(rows: int) -> NDArray[np.uint8]:
    return np.random.default_rng(rows).integers(0, 256, (rows, SIDE, SIDE, 3), dtype=np.uint8)


def vision(config: ModelConfig, projected: bool = True) -> ClipVisionTower:
    tower = load_vision(config.path)
    if not projected:
        tower.projection = nn.Identity()
    return tower


def plain(config: ModelConfig, rows: NDArray[np.uint8], projected: bool = True) -> Arrays:
    return TorchVision(vision(config, projected), config.image, CPU, torch.float32)(rows, OUTPUTS)()


def fused(config: ModelConfig, dtype: torch.dtype = torch.float32, projected: bool = True) -> FusedVision:
    return FusedVision(vision(config, projected), config.image, CPU, dtype, max_rows=2)


def assert_near(got: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def least_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return float(cosine.min())


@pytest.mark.parametrize("shape", [(3, 4304), (1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_those_of_torch(shape: tuple[int, int], dtype: torch.dtype, name: str) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * 2).to(dtype)
    expected = siglip.ACTIVATIONS[name](x.float()).to(dtype)
    torch.testing.assert_close(kernels.activate(x.clone(), name), expected)


@pytest.mark.parametrize(("m", "n", "k"), [(70, 88, 72), (300, 264, 136), (128, 256, 64)])
@pytest.mark.parametrize("name", ["", *ACTIVATIONS])
def test_products_with_an_activation_equal_those_of_torch(m: int, n: int, k: int, name: str) -> None:
    """Sizes that fill no tile, or one exactly, and more tiles than run at once."""
    torch.manual_seed(0)
    x, w, bias = torch.randn(m, k), torch.randn(n, k).t() / k**0.5, torch.randn(n)
    out = torch.full((m, n), torch.nan)
    activated.product(x, w, out, bias, name)
    expected = torch.addmm(bias, x, w)
    torch.testing.assert_close(out, siglip.ACTIVATIONS[name](expected) if name else expected)


@pytest.mark.parametrize(("tokens", "vectors"), [(5, 2), (32, 2), (70, 2), (5, 32), (5, 33)])
@pytest.mark.parametrize(("heads", "depth"), [(2, 64), (3, 12)])
def test_the_class_token_takes_what_torch_says(tokens: int, vectors: int, heads: int, depth: int) -> None:
    torch.manual_seed(0)
    layers, width = 3, heads * depth
    qkv = torch.randn(layers, tokens, 3 * width) * 2
    seen = torch.randn(layers, vectors, width)
    q, k, v = qkv.view(layers, tokens, 3, heads, depth).permute(2, 0, 3, 1, 4)
    weights = (q[:, :, :1] @ k.mT * depth**-0.5).softmax(-1)  # [L, H, 1, T]
    mixed = weights.mT * v  # [L, H, T, depth]
    expected = torch.einsum("lhtd,lphd->pt", mixed, seen.view(layers, vectors, heads, depth))
    torch.testing.assert_close(taken(qkv, seen, heads), expected[None], rtol=0, atol=1e-4)


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that operations return."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.elements = max(self.elements, found.numel())
        return found


def test_many_vectors_take_memory_for_few_at_once() -> None:
    qkv, seen = torch.randn(3, 5, 3 * 24), torch.randn(3, 250, 24)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        taken(qkv, seen, 3)
    assert largest.elements < 9 * 250 * 5  # what all would take


def test_cut_patches_leaves_a_row_of_zeros_before_each_image() -> None:
    images, centre = torch.from_numpy(pixels(2)), torch.tensor([100.0, 110, 120])
    with_row, without = torch.full((2 * 10, 776), torch.nan), torch.empty(2 * 9, 776)
    kernels.cut_patches(images, 16, centre, with_row)
    kernels.cut_patches(images, 16, centre, without)
    found = with_row.view(2, 10, -1)
    assert not found[:, 0].any()
    assert torch.equal(found[:, 1:], without.view(2, 9, -1))


@pytest.mark.usefixtures("gelu")
@pytest.mark.parametrize(("rows", "projected"), [(1, False), (2, True)])
def test_outputs_equal_those_of_the_tower(config: ModelConfig, rows: int, projected: bool) -> None:
    expected, runner = plain(config, pixels(rows), projected), fused(config, projected=projected)
    for wanted in (OUTPUTS, ["EMBEDDING"]):
        got = runner(pixels(rows), wanted)()
        assert sorted(got) == sorted(wanted)
        for name, array in got.items():
            assert array.flags.c_contiguous
            assert_near(array, expected[name])


def test_bfloat16_is_close(config: ModelConfig) -> None:
    expected, got = plain(config, pixels(1)), fused(config, torch.bfloat16)(pixels(1), OUTPUTS)()
    for name, array in got.items():
        assert 0.999 < least_cosine(array, expected[name]) < 1, name


@pytest.mark.usefixtures("gelu")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_maps_equal_those_of_torch_and_sum_to_the_cosine(
    config: ModelConfig, dtype: torch.dtype, tolerance: float
) -> None:
    vectors = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    vectors /= vectors.norm(dim=1, keepdim=True)
    exact, rounded = vision(config), vision(config)
    explainer = ClipExplainer(exact)
    expected = TorchVision(exact, config.image, CPU, torch.float32).explain(explainer, pixels(1), vectors)
    explainer = ClipExplainer(rounded)
    runner = FusedVision(rounded, config.image, CPU, dtype, max_rows=1)
    embedding = torch.from_numpy(runner(pixels(1), ["EMBEDDING"])()["EMBEDDING"])
    cosine = F.normalize(embedding) @ vectors.T
    for _ in range(2):  # the second time with products of vectors that were kept
        got = runner.explain(explainer, pixels(1), vectors)
        torch.testing.assert_close(got.maps, expected.maps, rtol=0, atol=tolerance / 4)
        torch.testing.assert_close(got.embedding, expected.embedding, rtol=0, atol=tolerance)
        torch.testing.assert_close(got.maps.sum(-1) + got.unattributed, cosine, rtol=0, atol=tolerance)


def test_maps_without_a_projection_sum_to_the_cosine(config: ModelConfig) -> None:
    tower, vectors = vision(config, projected=False), torch.eye(72)[:2]
    explainer = ClipExplainer(tower)
    got = FusedVision(tower, config.image, CPU, torch.float32).explain(explainer, pixels(1), vectors)
    cosine = F.normalize(got.embedding) @ vectors.T
    torch.testing.assert_close(got.maps.sum(-1) + got.unattributed, cosine, rtol=0, atol=1e-5)


def test_causal_attention_sees_no_later_token() -> None:
    qkv = torch.randn(2 * 5, 3 * 24, generator=torch.Generator().manual_seed(0))
    later = qkv.clone().view(2, 5, -1)
    later[:, 3:] += 1
    first, second = (attend(one.reshape(10, -1), 2, 4, causal=True).view(2, 5, -1) for one in (qkv, later))
    torch.testing.assert_close(first[:, :3], second[:, :3])
    assert not torch.allclose(first[:, 3:], second[:, 3:])


def text(config: ModelConfig, pools_largest_id: bool = False) -> ClipTextTower:
    tower = load_text(config.path)
    tower.config = replace(tower.config, pools_largest_id=pools_largest_id)
    return tower


def ids_ending_at(*places: int) -> NDArray[np.int64]:
    """Ids with an end token at each place, none for -1, and behind it ids that must not count."""
    ids = np.random.default_rng(0).integers(0, END - 1, (len(places), CONTEXT))
    for row, place in enumerate(places):
        if place >= 0:
            ids[row, place] = END
            ids[row, place + 1 :: 3] = END
    return ids


@pytest.mark.usefixtures("gelu")
@pytest.mark.parametrize("config", ["quick_gelu"], indirect=True)
@pytest.mark.parametrize("pools_largest_id", [False, True])
def test_texts_run_at_the_least_recorded_length(
    config: ModelConfig, pools_largest_id: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of 4, 6 and 15 tokens share a pass. A text without an end token is embedded too."""
    tower = text(config, pools_largest_id)
    plain = TorchText(tower, CPU, torch.float32)
    runner = FusedText(text(config, pools_largest_id), CPU, torch.float32, 4)
    assert runner.lengths == [16, 32, CONTEXT]
    monkeypatch.setattr("siglip_serve.engine.engines._text_runner", lambda *_: runner)
    engine = TextEngine(tower, Plan("cpu", "float32"))
    shapes: list[tuple[int, ...]] = []

    def recorded(part: NDArray[np.int64], wanted: Sequence[str]) -> Finish:
        shapes.append(part.shape)
        return runner(part, wanted)

    recorded.max_rows = runner.max_rows  # type: ignore[attr-defined]
    monkeypatch.setattr(engine, "runner", recorded)
    for ids in (ids_ending_at(14, 47, 5, 3), ids_ending_at(20), ids_ending_at(-1)):
        expected = plain(ids, ["EMBEDDING"])()["EMBEDDING"]
        assert_near(engine(ids).outputs["EMBEDDING"], expected)
    assert shapes[:3] == [(1, CONTEXT), (3, 16), (1, 32)]


def test_texts_in_bfloat16_are_close(config: ModelConfig) -> None:
    ids = ids_ending_at(7, 2)[:, :16]
    expected = TorchText(text(config), CPU, torch.float32)(ids, ["EMBEDDING"])()["EMBEDDING"]
    got = FusedText(text(config), CPU, torch.bfloat16, 2)(ids, ["EMBEDDING"])()["EMBEDDING"]
    assert 0.999 < least_cosine(got, expected) < 1


def test_siglip_with_the_exact_gelu_equals_its_tower(tmp_path: Path) -> None:
    """open_clip computes some towers of SigLIP so."""
    act = {"hidden_act": "gelu", "num_hidden_layers": 2}
    model = random_model({"image_size": 32, "patch_size": 16} | act, {"max_position_embeddings": 5} | act)
    config = load_config(save_checkpoint(model, tmp_path))
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    expected = TorchVision(siglip.load_vision(tmp_path), config.image, CPU, torch.float32)(image, OUTPUTS)()
    got = FusedVision(siglip.load_vision(tmp_path), config.image, CPU, torch.float32)(image, OUTPUTS)()
    for name, array in got.items():
        assert_near(array, expected[name])


class NoWaiting(TorchDispatchMode):
    """Refuses operations whose result the host needs, which no CUDA graph can record."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func)
        assert not name.startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select")), name
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("gelu")
def test_nothing_that_is_recorded_waits_for_the_device(config: ModelConfig) -> None:
    tower = vision(config)
    explainer = ClipExplainer(tower)
    images = FusedVision(tower, config.image, CPU, torch.float32, max_rows=1)._images
    texts = FusedText(text(config), CPU, torch.float32, 1)
    prepared = explainer.prepare(torch.eye(48)[:2])
    image, ids = torch.from_numpy(pixels(1)), torch.from_numpy(ids_ending_at(3)[:, :16])
    with torch.inference_mode(), NoWaiting():  # type: ignore[no-untyped-call]
        images.forward(image)
        images.explain(explainer, images.trace(image), prepared)
        texts._forward(ids)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():  # type: ignore[no-untyped-call]
        image.float().mean().item()


def test_prompts_are_read_anew_only_when_others_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording computes on its own memory, as a CUDA graph does."""

    class Graph:
        def __init__(self, compute: Callable[[], Explanation[Tensor]]) -> None:
            self.compute, self.found = compute, compute()

        def replay(self) -> None:
            again = self.compute()
            self.found.maps.copy_(again.maps)

    def record(compute: Callable[[], Explanation[Tensor]], _: object) -> tuple[Graph, Explanation[Tensor]]:
        graph = Graph(compute)
        return graph, graph.found

    def compute(prepared: Sequence[Tensor]) -> Explanation[Tensor]:
        return Explanation(prepared[0] * 2, prepared[0], prepared[0])

    monkeypatch.setattr(heatmaps, "record", record)
    one, other = [torch.tensor([1.0])], [torch.tensor([5.0])]
    explain = heatmaps._RecordedExplainer(compute, one, None)
    assert [explain(prepared).maps.item() for prepared in (one, one, other, other, one)] == [2, 2, 10, 10, 2]
