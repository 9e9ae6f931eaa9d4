"""Heatmaps against their definition: sums against transformers, maps against a naive decomposition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from paths import ROOT
from random_checkpoints import random_clip, random_model, save_checkpoint
from torch import Tensor
from transformers import CLIPModel, SiglipModel

from benchmarks.saliency import clip_maps_by_head, trace_tower
from siglip_serve.heatmaps.attribution import ClipExplainer, Explanation, SiglipExplainer
from siglip_serve.towers.clip import ClipVisionTower
from siglip_serve.towers.load import load_vision
from siglip_serve.towers.siglip import VisionTower

TINY = ROOT / "checkpoints" / "siglip-tiny"


def draw(size: int, width: int, images: int = 2, vectors: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand(images, 3, size, size, generator=generator) * 2 - 1
    return pixels, F.normalize(torch.randn(vectors, width, generator=generator), dim=1)


def assert_complete(found: Explanation[Tensor], embedding: Tensor, vectors: Tensor) -> None:
    expected = F.normalize(embedding, dim=1) @ vectors.T
    total = found.maps.sum(-1) + found.unattributed
    assert float((total - expected).abs().max()) <= 1e-5
    # Without this, a map with everything in one place would pass.
    assert float(found.maps.std(-1).min()) > 1e-6


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> tuple[SiglipModel, VisionTower]:
    model = random_model({"image_size": 50, "patch_size": 16})
    tower = load_vision(save_checkpoint(model, tmp_path_factory.mktemp("siglip")))
    assert isinstance(tower, VisionTower)
    return model, tower


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIPModel, ClipVisionTower]:
    model = random_clip({"image_size": 48, "patch_size": 16})
    path = tmp_path_factory.mktemp("clip")
    model.save_pretrained(path)
    tower = load_vision(path)
    assert isinstance(tower, ClipVisionTower)
    return model, tower


@pytest.mark.parametrize("blocks", [0, 1, 2, 3])
def test_siglip_maps_sum_to_the_cosine(siglip: tuple[SiglipModel, VisionTower], blocks: int) -> None:
    model, tower = siglip
    pixels, vectors = draw(50, tower.config.hidden_size)
    with torch.inference_mode():
        embedding = model.vision_model(pixels).pooler_output
    assert_complete(SiglipExplainer(tower, blocks).explain(tower, pixels, vectors), embedding, vectors)


def test_maps_of_the_exact_gelu_sum_to_the_cosine(tmp_path: Path) -> None:
    """open_clip computes some towers of SigLIP so."""
    model = random_model({"image_size": 50, "patch_size": 16, "hidden_act": "gelu"})
    tower = load_vision(save_checkpoint(model, tmp_path))
    assert isinstance(tower, VisionTower)
    tower.head.mlp.fc1.weight.normal_(std=0.3)  # the two forms of GELU differ most for values of 2 to 3
    pixels, vectors = draw(50, tower.config.hidden_size)
    with torch.inference_mode():
        embedding = tower.head(tower(pixels))
    assert_complete(SiglipExplainer(tower, 2).explain(tower, pixels, vectors), embedding, vectors)


@pytest.mark.parametrize("blocks", [0, 2, 9])
def test_bundled_maps_sum_to_the_cosine(blocks: int) -> None:
    tower = load_vision(TINY)
    assert isinstance(tower, VisionTower)
    pixels, vectors = draw(tower.config.image_size, tower.config.hidden_size)
    with torch.inference_mode():
        embedding = SiglipModel.from_pretrained(TINY).eval().vision_model(pixels).pooler_output
    assert_complete(SiglipExplainer(tower, blocks).explain(tower, pixels, vectors), embedding, vectors)


def test_clip_maps_sum_to_the_cosine(clip: tuple[CLIPModel, ClipVisionTower]) -> None:
    model, tower = clip
    pixels, vectors = draw(48, model.config.projection_dim)
    with torch.inference_mode():
        embedding = model.visual_projection(model.vision_model(pixels).pooler_output)
    assert_complete(ClipExplainer(tower).explain(tower, pixels, vectors), embedding, vectors)


def test_clip_maps_of_more_layers_than_are_taken_together_sum_to_the_cosine(tmp_path: Path) -> None:
    model = random_clip({"image_size": 48, "patch_size": 16, "num_hidden_layers": 9})
    model.save_pretrained(tmp_path)
    tower = load_vision(tmp_path)
    assert isinstance(tower, ClipVisionTower)
    pixels, vectors = draw(48, model.config.projection_dim)
    with torch.inference_mode():
        embedding = model.visual_projection(model.vision_model(pixels).pooler_output)
    assert_complete(ClipExplainer(tower).explain(tower, pixels, vectors), embedding, vectors)


def test_clip_maps_equal_the_naive_store(clip: tuple[CLIPModel, ClipVisionTower]) -> None:
    """The paper's way: the part that each head of each layer added to the class token, [L, H, T, D]."""
    model, tower = clip
    pixels, vectors = draw(48, model.config.projection_dim, images=1)
    heads = model.config.vision_config.num_attention_heads
    with torch.inference_mode():
        x, store = tower.embed(pixels), []
        for layer in tower.encoder.blocks:
            q, k, v = layer.self_attn.project(layer.layer_norm1(x))
            weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)[0, :, 0]  # [H, T]
            matrix = layer.self_attn.out_proj.weight.unflatten(1, (heads, -1))  # [D, H, D/H]
            store.append(torch.einsum("ht,hte,dhe->htd", weights, v[0], matrix))
            x = layer(x)
        scale = (x[0, 0].var(correction=0) + tower.post_layernorm.eps).sqrt()
        stored = torch.stack(store)  # [L, H, T, D]
        stored = (stored - stored.mean(-1, keepdim=True)) / scale * tower.post_layernorm.weight
        embedding = model.visual_projection(model.vision_model(pixels).pooler_output)
        naive = (
            stored @ tower.get_parameter("projection.weight").T @ vectors.T / embedding.norm()
        )  # [L, H, T, P]
    found = ClipExplainer(tower).explain(tower, pixels, vectors)
    torch.testing.assert_close(found.maps[0].T, naive.sum((0, 1))[1:], rtol=0, atol=1e-6)
    by_head = clip_maps_by_head(tower, trace_tower(tower, pixels, len(store)), vectors)
    torch.testing.assert_close(by_head[0].permute(1, 2, 3, 0), naive[:, :, 1:], rtol=0, atol=1e-6)


class Frozen:
    """Pooling head and last LayerNorm as linear functions, with scales and gate held at their values."""

    def __init__(self, tower: VisionTower, stream: Tensor) -> None:
        head, norm = tower.head, tower.post_layernorm
        self.heads, self.out = head.attention.num_heads, head.attention.out_proj
        self.norm, self.head = norm, head
        self.scale = (stream.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()  # [T, 1]
        tokens = norm(stream)
        w_q, w_k, self.w_v = head.attention.in_proj_weight.chunk(3)
        b_q, b_k, _ = head.attention.in_proj_bias.chunk(3)
        q = F.linear(head.probe[0], w_q, b_q).unflatten(-1, (self.heads, -1))
        k = F.linear(tokens, w_k, b_k).unflatten(-1, (self.heads, -1))
        self.weights = torch.einsum("qhe,the->ht", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
        pooled = head.attention(head.probe, tokens[None], tokens[None])[0][0, 0]
        self.deviation = (pooled.var(correction=0) + head.layernorm.eps).sqrt()
        hidden = head.mlp.fc1(head.layernorm(pooled))
        self.gate = F.gelu(hidden, approximate="tanh") / hidden

    def of_pooled(self, part: Tensor) -> Tensor:
        """Parts of the pooled token [..., D] -> the parts that they add to the embedding [..., D]"""
        centred = (part - part.mean(-1, keepdim=True)) / self.deviation * self.head.layernorm.weight
        return part + (centred @ self.head.mlp.fc1.weight.T * self.gate) @ self.head.mlp.fc2.weight.T

    def of_stream(self, parts: Tensor) -> Tensor:
        """Parts of the stream of each token [T, ..., D] -> the parts that they add to the embedding"""
        shape = (-1, *[1] * (parts.ndim - 1))
        parts = (parts - parts.mean(-1, keepdim=True)) / self.scale.view(shape) * self.norm.weight
        values = (parts @ self.w_v.T).unflatten(-1, (self.heads, -1))
        values = values * self.weights.T.view(len(parts), *[1] * (parts.ndim - 2), self.heads, 1)
        return self.of_pooled(values.flatten(-2) @ self.out.weight.T)


@pytest.mark.parametrize("blocks", [0, 2])
def test_siglip_maps_equal_the_naive_store(siglip: tuple[SiglipModel, VisionTower], blocks: int) -> None:
    """Each part of the stream, [to, from, H, D] for attention, is sent through the frozen head alone."""
    _, tower = siglip
    pixels, vectors = draw(50, tower.config.hidden_size, images=1)
    with torch.inference_mode():
        trace = tower.trace(pixels, blocks)
        stream = trace.after[0]
        frozen = Frozen(tower, stream)
        embedding = tower.head(tower.post_layernorm(trace.after))[0]
        if blocks:
            found = frozen.of_stream(trace.before[0])  # [T, D]
            for block, layer in zip(trace.blocks, tower.encoder.blocks[-blocks:], strict=True):
                found += frozen.of_stream(block.mlp[0])
                weights = (block.queries[0] @ block.keys[0].mT / block.queries.shape[-1] ** 0.5).softmax(-1)
                matrix = layer.self_attn.out_proj.weight.unflatten(1, (len(weights), -1))  # [D, H, D/H]
                store = torch.einsum("hts,hse,dhe->tshd", weights, block.values[0], matrix)
                found += frozen.of_stream(store).sum((0, 2))
        else:  # the pooled tokens with the LayerNorm's own bias
            values = (tower.post_layernorm(stream) @ frozen.w_v.T).unflatten(-1, (frozen.heads, -1))
            values = values * frozen.weights.T[..., None]
            found = frozen.of_pooled(values.flatten(1) @ frozen.out.weight.T)
        naive = (found @ vectors.T / embedding.norm()).T
    ours = SiglipExplainer(tower, blocks).explain(tower, pixels, vectors)
    torch.testing.assert_close(ours.maps[0], naive, rtol=0, atol=1e-6)


def test_maps_are_linear_in_the_vectors(
    siglip: tuple[SiglipModel, VisionTower], clip: tuple[CLIPModel, ClipVisionTower]
) -> None:
    """So that a difference of prompts is explained by the difference of their vectors."""
    for tower, size in ((siglip[1], 50), (clip[1], 48)):
        width = tower.config.embedding_size
        pixels, vectors = draw(size, width)
        made: SiglipExplainer | ClipExplainer
        made = SiglipExplainer(tower) if isinstance(tower, VisionTower) else ClipExplainer(tower)
        both = made.explain(tower, pixels, vectors)  # type: ignore[arg-type]
        difference = made.explain(tower, pixels, vectors[:1] - vectors[1:2])  # type: ignore[arg-type]
        expected = both.maps[:, 0] - both.maps[:, 1]
        torch.testing.assert_close(difference.maps[:, 0], expected, rtol=0, atol=1e-6)


def test_many_vectors_are_explained_at_the_pooled_tokens(siglip: tuple[SiglipModel, VisionTower]) -> None:
    _, tower = siglip
    pixels, vectors = draw(50, tower.config.hidden_size)
    found = SiglipExplainer(tower, 2, most=4).explain(tower, pixels, vectors)
    expected = SiglipExplainer(tower, 0).explain(tower, pixels, vectors)
    torch.testing.assert_close(found.maps, expected.maps, rtol=0, atol=1e-6)
    few = SiglipExplainer(tower, 2, most=5).explain(tower, pixels, vectors)
    assert float((few.maps - expected.maps).abs().max()) > 1e-4
