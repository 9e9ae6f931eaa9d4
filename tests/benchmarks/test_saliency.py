"""Maps in closed form, compared with autograd and with single patches."""

from __future__ import annotations

from typing import Literal, cast

import pytest
import torch
import torch.nn.functional as F
from random_checkpoints import random_clip, random_model, save_checkpoint
from torch import Tensor

from benchmarks.saliency import (
    SLOPES,
    dense,
    last_blocks,
    legrad,
    pool_attention,
    streams,
    trace_tower,
)
from siglip_serve.towers.clip import ClipVisionTower
from siglip_serve.towers.load import AnyVisionTower, load_vision
from siglip_serve.towers.siglip import ACTIVATIONS, Block, VisionTower

SIDE, PATCH = 48, 16


@pytest.fixture(scope="module", params=["siglip", "clip"])
def tower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AnyVisionTower:
    path, vision = tmp_path_factory.mktemp("random"), {"image_size": SIDE, "patch_size": PATCH}
    if request.param == "clip":
        random_clip(vision).save_pretrained(path)
    else:
        save_checkpoint(random_model(vision), path)
    return load_vision(path)


def draw(tower: AnyVisionTower) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        pixels = torch.rand(2, 3, SIDE, SIDE, generator=generator) * 2 - 1
        width = tower.head(tower(pixels)).shape[1]
    return pixels.clone(), torch.randn(3, width, generator=generator)


def layers_of(tower: AnyVisionTower) -> list[Block]:
    return cast("list[Block]", list(tower.encoder.layers))


def attention_of(layer: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [H, N, N] and values [H, N, D/H] of a block of one image."""
    q, k, v = layer.self_attn.project(layer.layer_norm1(x[None]))
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)[0], v[0]


def naive_legrad(
    tower: AnyVisionTower, pixels: Tensor, vector: Tensor, blocks: int, of: Literal["pooler", "blocks"]
) -> Tensor:
    """LeGrad of one image and one vector by the formula of the paper, with autograd."""
    assert isinstance(tower, VisionTower | ClipVisionTower)
    x = tower.embeddings(pixels)[0] if isinstance(tower, VisionTower) else tower.embed(pixels)[0]
    layers, maps = layers_of(tower), []
    for number, layer in enumerate(layers):
        weights, values = attention_of(layer, x)
        weights.requires_grad_(True)
        between = x + layer.self_attn.out_proj((weights @ values).transpose(0, 1).flatten(1))
        after = between + layer.mlp(layer.layer_norm2(between))
        if number >= len(layers) - blocks:
            tokens = tower.post_layernorm(after)
            if of == "pooler" and isinstance(tower, VisionTower):
                weights, embedding = pool(tower, tokens.detach())
            elif isinstance(tower, ClipVisionTower):
                embedding = tower.projection(tower.post_layernorm(after.mean(0)))
            else:
                embedding = tower.head(tokens[None])[0]
            score = F.cosine_similarity(embedding, vector, dim=0)
            (gradient,) = torch.autograd.grad(score, weights)
            maps.append(gradient.relu().mean((0, 1)))
        x = after.detach()
    found = torch.stack(maps).mean(0)
    return found[1:] if isinstance(tower, ClipVisionTower) else found


def pool(tower: VisionTower, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The head with the probe's weights [H, 1, T] as a leaf."""
    attention = tower.head.attention
    heads = (attention.num_heads, -1)
    w_q, w_k, w_v = attention.in_proj_weight.chunk(3)
    b_q, b_k, b_v = attention.in_proj_bias.chunk(3)
    q = F.linear(tower.head.probe[0], w_q, b_q).unflatten(-1, heads).transpose(0, 1)
    k = F.linear(tokens, w_k, b_k).unflatten(-1, heads).transpose(0, 1)
    v = F.linear(tokens, w_v, b_v).unflatten(-1, heads).transpose(0, 1)
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).requires_grad_(True)
    pooled = attention.out_proj((weights @ v).transpose(0, 1).flatten())
    return weights, pooled + tower.head.mlp(tower.head.layernorm(pooled))


@pytest.mark.parametrize("of", ["pooler", "blocks"])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_legrad_equals_autograd(tower: AnyVisionTower, blocks: int, of: Literal["pooler", "blocks"]) -> None:
    pixels, vectors = draw(tower)
    found = legrad(tower, trace_tower(tower, pixels, blocks), vectors, of)
    expected = torch.stack(
        [
            torch.stack([naive_legrad(tower, pixels[i : i + 1], vector, blocks, of) for vector in vectors])
            for i in range(len(pixels))
        ]
    )
    assert float(expected.max()) > 0
    assert float((found - expected).abs().max() / expected.max()) <= 1e-5


def test_dense_pools_every_patch_alone(tower: AnyVisionTower) -> None:
    pixels, vectors = draw(tower)
    found = dense(tower, trace_tower(tower, pixels, 1), vectors)
    for image in range(len(pixels)):
        with torch.inference_mode():
            x = trace_tower(tower, pixels[image : image + 1], 1).before
            last = layers_of(tower)[-1]
            for place in range((SIDE // PATCH) ** 2):
                # A token that attends only to itself is a sequence of one.
                if isinstance(tower, VisionTower):
                    alone = tower.head(tower.post_layernorm(last(x))[:, place : place + 1])
                else:
                    alone = tower.head(last(x[:, place + 1 : place + 2]))
                expected = F.cosine_similarity(alone, vectors, dim=1)
                torch.testing.assert_close(found[image, :, place], expected, rtol=0, atol=1e-6)
    assert float(found.std(-1).min()) > 1e-3


def test_pool_attention_equals_that_of_the_head(tower: AnyVisionTower) -> None:
    pixels, _ = draw(tower)
    trace = trace_tower(tower, pixels, 1)
    found = pool_attention(tower, trace)
    with torch.inference_mode():
        if isinstance(tower, VisionTower):
            tokens = tower.post_layernorm(trace.after)
            probe = tower.head.probe.expand(len(tokens), -1, -1)
            _, expected = tower.head.attention(probe, tokens, tokens)
            expected = expected[:, 0]
        else:
            weights = [attention_of(layers_of(tower)[-1], x)[0] for x in trace.before]
            expected = torch.stack(weights)[:, :, 0, 1:].mean(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_trace_of_fewer_blocks_is_cut_from_a_longer_one(tower: AnyVisionTower) -> None:
    pixels, _ = draw(tower)
    whole = trace_tower(tower, pixels, 3)
    before = streams(tower, whole)
    torch.testing.assert_close(before[-1], whole.after, rtol=0, atol=1e-5)
    for blocks in range(4):
        expected, found = trace_tower(tower, pixels, blocks), last_blocks(whole, before, blocks)
        assert len(found.blocks) == blocks
        torch.testing.assert_close(found.before, expected.before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_slopes_equal_those_of_the_activations(name: str) -> None:
    x = torch.linspace(-6, 6, 401, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(ACTIVATIONS[name](x).sum(), x)
    torch.testing.assert_close(SLOPES[name](x.detach()), expected, rtol=0, atol=1e-12)
    assert ACTIVATIONS.keys() == SLOPES.keys()
