"""Maps of prompts that the server's heatmaps are compared with, without autograd.

These only rank the places of an image. They do not sum to the score, nor say how much of it a place accounts
for:

- `dense`: the cosine of the prompt with every patch token sent alone to the joint space. Source: MaskCLIP,
  "Extract Free Dense Labels from CLIP" (Zhou, Loy and Dai, 2022, arXiv 2112.01071).
- `legrad`: the positive gradients of a score by the weights of an attention map. Source: "LeGrad"
  (Bousselham et al., 2024, arXiv 2404.03214).
- `pool_attention`: the attention of the pooling, whatever the prompt.

One takes the server's maps of CLIP apart:

- `clip_maps_by_head`: the same maps by layer and head.

All are computed from the intermediate values that the towers return (`BlockTrace`, `TowerTrace`).

Shapes: B images, P vectors of width E (of the embeddings), T patches, N tokens (T, or 1 + T with a class
token), D hidden size, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siglip_serve.towers.clip import ClipVisionTower
from siglip_serve.towers.load import AnyVisionTower
from siglip_serve.towers.siglip import (
    MLP,
    AttentionPooling,
    Block,
    BlockTrace,
    TowerTrace,
    VisionTower,
    trace_blocks,
)

__all__ = [
    "clip_maps_by_head",
    "dense",
    "last_blocks",
    "legrad",
    "pool_attention",
    "streams",
    "trace_tower",
]


def trace_tower(tower: AnyVisionTower, pixels: Tensor, blocks: int) -> TowerTrace:
    """Trace the last `blocks` blocks of either tower on pixels [B, 3, S, S]."""
    if isinstance(tower, VisionTower):
        return tower.trace(pixels, blocks)
    x, split = tower.embed(pixels), len(tower.encoder.blocks) - blocks
    for block in tower.encoder.blocks[:split]:
        x = block(x)
    return trace_blocks(x, tower.encoder.blocks[split:])


def streams(tower: AnyVisionTower, trace: TowerTrace) -> list[Tensor]:
    """Return the residual stream [B, N, D] before each traced block, and behind the last."""
    found = [trace.before]
    for layer, block in zip(_layers(tower, trace), trace.blocks, strict=True):
        found.append(found[-1] + _mixed(layer, block) + block.mlp)
    return found


def last_blocks(trace: TowerTrace, before: list[Tensor], blocks: int) -> TowerTrace:
    """Cut the trace of the last `blocks` blocks from one of more; `before` is from `streams`."""
    split = len(trace.blocks) - blocks
    return TowerTrace(before[split], trace.blocks[split:], trace.after)


@torch.inference_mode()
def dense(tower: AnyVisionTower, trace: TowerTrace, vectors: Tensor) -> Tensor:
    """Compute the cosine of every patch with vectors, as if the patch were the whole image.

    The token attends to nothing but itself in the pooling head, or in CLIP's last block.

    Args:
        tower: the tower that was traced.
        trace: of any number of blocks; of CLIP at least one.
        vectors: [P, E].

    Returns:
        [B, P, T], -1 to 1.
    """
    if isinstance(tower, VisionTower):
        head = tower.head
        tokens = tower.post_layernorm(trace.after)
        _, _, w_v = head.attention.in_proj_weight.chunk(3)
        _, _, b_v = head.attention.in_proj_bias.chunk(3)
        pooled = head.attention.out_proj(F.linear(tokens, w_v, b_v))
        places = pooled + head.mlp(head.layernorm(pooled))
    else:
        block, layer = trace.blocks[-1], _layers(tower, trace)[-1]
        x = streams(tower, trace)[-2] + layer.self_attn.out_proj(block.values.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.layer_norm2(x))
        places = tower.projection(tower.post_layernorm(x[:, 1:]))
    return (F.normalize(places, dim=-1) @ F.normalize(vectors, dim=-1).T).transpose(1, 2)


@torch.inference_mode()
def pool_attention(tower: AnyVisionTower, trace: TowerTrace) -> Tensor:
    """Average the attention of the pooling head, or of the class token in CLIP's last block, over heads.

    Args:
        tower: the tower that was traced.
        trace: of any number of blocks; of CLIP at least one.

    Returns:
        [B, T], not negative. The sum over the places is 1, for CLIP without the class token's own share.
    """
    if isinstance(tower, VisionTower):
        weights, _ = _probe_attention(tower.head, tower.post_layernorm(trace.after))
        return weights.mean(1)
    return trace.blocks[-1].attention()[:, :, 0, 1:].mean(1)


@torch.inference_mode()
def legrad(
    tower: AnyVisionTower, trace: TowerTrace, vectors: Tensor, of: Literal["pooler", "blocks"] = "pooler"
) -> Tensor:
    """Average the positive gradients of scores by attention weights.

    Every traced block has its own score: the cosine that the tower would return if that block were its last
    one. For CLIP, as in the authors' code, the mean of all tokens stands in place of the class token. The map
    of a block is the gradient of its score by an attention map, as if each weight could change independently.
    Negative gradients count as 0. The mean is taken over heads, queries and blocks.

    Two things differ from the authors' code for SigLIP: the pooling head gets its tokens through the last
    LayerNorm, as in the tower, and places that an empty prompt finds are not masked out.

    Args:
        tower: the tower that was traced.
        trace: of the last blocks, at least one.
        vectors: [P, E].
        of: `pooler`: the attention of SigLIP's pooling head, as the authors do where there is one.
            `blocks`: the self-attention of each block, the only one that CLIP has.

    Returns:
        [B, P, T], not negative.
    """
    stream, maps = trace.before, []
    for layer, block in zip(_layers(tower, trace), trace.blocks, strict=True):
        between = stream + _mixed(layer, block)
        stream = between + block.mlp
        if isinstance(tower, VisionTower):
            by_weight, by_stream = _score_gradients(tower, stream, vectors)
            if of == "pooler":
                maps.append(by_weight.relu().mean(2))
                continue
        else:
            by_stream = _mean_token_gradient(tower, stream, vectors)
        by_between = by_stream + _mlp_gradient(layer.mlp, layer.layer_norm2, between, by_stream)
        maps.append(_by_attention(layer, block, by_between)[..., _first_patch(tower) :])
    return torch.stack(maps).mean(0)


@torch.inference_mode()
def clip_maps_by_head(tower: ClipVisionTower, trace: TowerTrace, vectors: Tensor) -> Tensor:
    """Compute the parts of `ClipExplainer`'s maps by layer and head.

    Their sum over layers and heads are the maps.

    Args:
        tower: the tower that was traced, float32.
        trace: of the last L blocks.
        vectors: [P, E].

    Returns:
        [B, P, L, H, T].
    """
    form = (vectors @ tower.get_parameter("projection.weight")) * tower.post_layernorm.weight
    form = form - form.mean(-1, keepdim=True)  # [P, D], as the last LayerNorm takes off the mean
    last = trace.after[:, 0]  # [B, D]
    deviation = (last.var(-1, correction=0) + tower.post_layernorm.eps).sqrt()
    length = tower.head(trace.after).norm(dim=-1)
    maps = []
    for layer, block in zip(_layers(tower, trace), trace.blocks, strict=True):
        heads = block.values.shape[1]
        seen = (form @ layer.self_attn.out_proj.weight).unflatten(-1, (heads, -1))  # [P, H, D/H]
        weights = block.attention()[:, :, 0]  # [B, H, 1 + T]
        maps.append(torch.einsum("bht,bhte,phe->bpht", weights, block.values, seen))
    return torch.stack(maps, 2)[..., 1:] / (deviation * length)[:, None, None, None, None]


def _by_attention(layer: Block, block: BlockTrace, gradient: Tensor) -> Tensor:
    """Gradient [B, P, Q, D] by the sum that attention added -> mean positive one by weight, [B, P, N]"""
    heads = block.values.shape[1]
    per_head = (gradient @ layer.self_attn.out_proj.weight).unflatten(-1, (heads, -1)).transpose(2, 3)
    by_weight = per_head @ block.values[:, None].transpose(-1, -2)  # [B, P, H, Q, N]
    return by_weight.relu().mean((2, 3))


def _score_gradients(tower: VisionTower, stream: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of cosines with vectors by the probe's attention [B, P, H, T], by the stream [B, P, T, D]"""
    head, norm = tower.head, tower.post_layernorm
    heads = head.attention.num_heads
    tokens = norm(stream)
    weights, folded = _probe_attention(head, tokens)  # [B, H, T], [H, D]
    _, _, w_v = head.attention.in_proj_weight.chunk(3)
    _, _, b_v = head.attention.in_proj_bias.chunk(3)
    values = F.linear(tokens, w_v, b_v).unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, H, T, D/H]
    pooled = head.attention.out_proj((weights[:, :, None] @ values).flatten(1))  # [B, D]
    by_embedding = _cosine_gradient(pooled + head.mlp(head.layernorm(pooled)), vectors)[:, :, None]
    by_pooled = by_embedding + _mlp_gradient(head.mlp, head.layernorm, pooled[:, None], by_embedding)
    per_head = (by_pooled[:, :, 0] @ head.attention.out_proj.weight).unflatten(-1, (heads, -1))
    by_weight = torch.einsum("bhte,bphe->bpht", values, per_head)
    through_values = torch.einsum(
        "bht,bphd->bptd",
        weights,
        torch.einsum("bphe,hed->bphd", per_head, w_v.unflatten(0, (heads, -1))),
    )
    # The other weights of a head lose what one weight gains.
    shared = (weights[:, None] * by_weight).sum(-1, keepdim=True)
    by_score = weights[:, None] * (by_weight - shared)
    by_tokens = through_values + torch.einsum("bpht,hd->bptd", by_score, folded)
    return by_weight, _norm_gradient(norm, stream, by_tokens)


def _mean_token_gradient(tower: ClipVisionTower, stream: Tensor, vectors: Tensor) -> Tensor:
    """Gradients of cosines of the mean token with vectors by the stream: [B, N, D] -> [B, P, N, D]"""
    token = stream.mean(1, keepdim=True)
    embedding = tower.projection(tower.post_layernorm(token))[:, 0]
    by_normalised = _cosine_gradient(embedding, vectors) @ tower.get_parameter("projection.weight")
    by_token = _norm_gradient(tower.post_layernorm, token, by_normalised[:, :, None])
    return by_token.expand(-1, -1, stream.shape[1], -1) / stream.shape[1]


def _cosine_gradient(embedding: Tensor, vectors: Tensor) -> Tensor:
    """Gradient of the cosine with each vector by embedding [B, E] -> [B, P, E]"""
    length = embedding.norm(dim=-1, keepdim=True)
    unit, wanted = embedding / length, F.normalize(vectors, dim=-1)
    cosine = unit @ wanted.T  # [B, P]
    return (wanted - cosine[..., None] * unit[:, None]) / length[..., None]


def _mlp_gradient(mlp: MLP, norm: nn.LayerNorm, x: Tensor, gradient: Tensor) -> Tensor:
    """Back through `mlp(norm(x))`: x [B, N, D], gradient [B, P, N, D] -> [B, P, N, D]."""
    slope = SLOPES[mlp.activation](mlp.fc1(norm(x)))[:, None]
    return _norm_gradient(norm, x, ((gradient @ mlp.fc2.weight) * slope) @ mlp.fc1.weight)


def _norm_gradient(norm: nn.LayerNorm, x: Tensor, gradient: Tensor) -> Tensor:
    """Back through a LayerNorm of x [B, N, D]: gradient [B, P, N, D] -> [B, P, N, D]."""
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    standard = (centred / deviation)[:, None]
    gradient = gradient * norm.weight
    along = (gradient * standard).mean(-1, keepdim=True)
    return (gradient - gradient.mean(-1, keepdim=True) - standard * along) / deviation[:, None]


def _probe_attention(head: AttentionPooling, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, T, D] -> the probe's attention [B, H, T], and the vectors [H, D] that score a token"""
    heads = (head.attention.num_heads, -1)
    w_q, w_k, _ = head.attention.in_proj_weight.chunk(3)
    b_q, b_k, _ = head.attention.in_proj_bias.chunk(3)
    query = F.linear(head.probe[0, 0], w_q, b_q).unflatten(0, heads)  # [H, D/H]
    query = query * query.shape[-1] ** -0.5
    folded = torch.einsum("he,hed->hd", query, w_k.unflatten(0, heads))
    shift = (query * b_k.unflatten(0, heads)).sum(-1)[:, None]
    return (torch.einsum("btd,hd->bht", tokens, folded) + shift).softmax(-1), folded


def _first_patch(tower: AnyVisionTower) -> int:
    """Index of the first patch's token; CLIP's class token comes before it."""
    return 0 if isinstance(tower, VisionTower) else 1


def _layers(tower: AnyVisionTower, trace: TowerTrace) -> list[Block]:
    """Return the blocks that were traced."""
    blocks = tower.encoder.blocks
    return blocks[len(blocks) - len(trace.blocks) :]


def _mixed(layer: Block, block: BlockTrace) -> Tensor:
    """Compute the sum that a block's attention added, [B, N, D]."""
    added: Tensor = layer.self_attn.mix(block.queries, block.keys, block.values)
    return added


def _gelu_slope(x: Tensor) -> Tensor:
    """Derivative of the exact GELU."""
    return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x * x) * (2 * torch.pi) ** -0.5


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    scale, cubic = (2 / torch.pi) ** 0.5, 0.044715
    tanh = torch.tanh(scale * (x + cubic * x**3))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * scale * (1 + 3 * cubic * x * x)


def _quick_gelu_slope(x: Tensor) -> Tensor:
    gate = torch.sigmoid(1.702 * x)
    return gate * (1 + 1.702 * x * (1 - gate))


# The derivatives of `siglip.ACTIVATIONS`.
SLOPES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu_pytorch_tanh": _gelu_tanh_slope,
    "gelu": _gelu_slope,
    "quick_gelu": _quick_gelu_slope,
}
