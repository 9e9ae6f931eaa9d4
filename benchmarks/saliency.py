"""Maps of prompts that do not add up: what the additive ones of `heatmap` are compared with.

None of these sums to the score, nor says how much of it a place accounts for. They only rank the places of
an image. All are computed from what the towers return (`BlockTrace`, `TowerTrace`), without autograd.

- `dense`: every patch token sent alone to the joint space, and its cosine with the prompt. Source: MaskCLIP,
  "Extract Free Dense Labels from CLIP" (Zhou, Loy and Dai, 2022, arXiv 2112.01071).
- `legrad`: how a score grows with each weight of an attention map, where it grows. Source: "LeGrad"
  (Bousselham et al., 2024, arXiv 2404.03214).
- `pool_attention`: where the tower looks, whatever the prompt.

Shapes: B images, P vectors of width E (of the embeddings), T patches, N tokens (T, or 1 + T with a class
token), D hidden size, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, cast

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

__all__ = ["dense", "last_blocks", "legrad", "pool_attention", "streams", "trace_tower"]


def trace_tower(tower: AnyVisionTower, pixels: Tensor, blocks: int) -> TowerTrace:
    """Trace of the last `blocks` blocks of either tower on pixels [B, 3, S, S]."""
    if isinstance(tower, VisionTower):
        return tower.trace(pixels, blocks)
    x, split = tower.embed(pixels), len(tower.encoder.layers) - blocks
    for layer in tower.encoder.layers[:split]:
        x = layer(x)
    return trace_blocks(x, tower.encoder.layers[split:])


def streams(tower: AnyVisionTower, trace: TowerTrace) -> list[Tensor]:
    """The residual stream [B, N, D] before each traced block, and behind the last."""
    found = [trace.before]
    for layer, block in zip(_layers(tower, trace), trace.blocks, strict=True):
        found.append(found[-1] + _mixed(layer, block) + block.mlp)
    return found


def last_blocks(trace: TowerTrace, before: list[Tensor], blocks: int) -> TowerTrace:
    """The trace of fewer blocks; `before` as `streams` returned it."""
    split = len(trace.blocks) - blocks
    return TowerTrace(before[split], trace.blocks[split:], trace.after)


@torch.inference_mode()
def dense(tower: AnyVisionTower, trace: TowerTrace, vectors: Tensor) -> Tensor:
    """Cosine of every patch, as if it were the whole image, with vectors.

    The token attends to nothing but itself: in the pooling head, or in CLIP's last block.

    Args:
        tower: which was traced.
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
    """Attention of the pooling head, or of the class token in CLIP's last block: the mean over the heads.

    Args:
        tower: which was traced.
        trace: of any number of blocks; of CLIP at least one.

    Returns:
        [B, T], not negative; sums to 1, of CLIP to what is not on the class token itself.
    """
    if isinstance(tower, VisionTower):
        weights, _ = _probe_attention(tower.head, tower.post_layernorm(trace.after))
        return weights.mean(1)
    return trace.blocks[-1].attention()[:, :, 0, 1:].mean(1)


@torch.inference_mode()
def legrad(
    tower: AnyVisionTower, trace: TowerTrace, vectors: Tensor, of: Literal["pooler", "blocks"] = "pooler"
) -> Tensor:
    """Gradients of scores by attention weights: the mean over them, where negative ones count as 0.

    Every traced block gives its own score: the cosine that the tower would return if that block were its
    last one. CLIP's is taken with the mean of all tokens in place of the class token, as in the authors'
    code. The map is the gradient of this score by an attention map, as if each weight could change alone,
    averaged over the heads and queries. The maps of the blocks are averaged too.

    Two things differ from the authors' code for SigLIP. The pooling head gets its tokens through the last
    LayerNorm, as in the tower. The map of an empty prompt is not masked out.

    Args:
        tower: which was traced.
        trace: of the last blocks, at least one.
        vectors: [P, E].
        of: whose attention. `pooler`: that of SigLIP's pooling head, as the authors do where there is one.
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


def _by_attention(layer: Block, block: BlockTrace, gradient: Tensor) -> Tensor:
    """Gradient [B, P, Q, D] by what attention added to Q tokens -> mean positive one by weight, [B, P, N]."""
    heads = block.values.shape[1]
    per_head = (gradient @ layer.self_attn.out_proj.weight).unflatten(-1, (heads, -1)).transpose(2, 3)
    by_weight = per_head @ block.values[:, None].transpose(-1, -2)  # [B, P, H, Q, N]
    return by_weight.relu().mean((2, 3))


def _score_gradients(tower: VisionTower, stream: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of cosines with vectors by the probe's attention [B, P, H, T] and the stream [B, P, T, D]."""
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
    # What a weight gains the others of its head lose.
    shared = (weights[:, None] * by_weight).sum(-1, keepdim=True)
    by_score = weights[:, None] * (by_weight - shared)
    by_tokens = through_values + torch.einsum("bpht,hd->bptd", by_score, folded)
    return by_weight, _norm_gradient(norm, stream, by_tokens)


def _mean_token_gradient(tower: ClipVisionTower, stream: Tensor, vectors: Tensor) -> Tensor:
    """Gradients of cosines of the mean token with vectors, by the stream: [B, N, D] -> [B, P, N, D]."""
    token = stream.mean(1, keepdim=True)
    embedding = tower.projection(tower.post_layernorm(token))[:, 0]
    by_normalised = _cosine_gradient(embedding, vectors) @ tower.projection.weight
    by_token = _norm_gradient(tower.post_layernorm, token, by_normalised[:, :, None])
    return by_token.expand(-1, -1, stream.shape[1], -1) / stream.shape[1]


def _cosine_gradient(embedding: Tensor, vectors: Tensor) -> Tensor:
    """Gradient of the cosine with each vector, by embedding [B, E] -> [B, P, E]."""
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
    """The probe's attention [B, H, T] to tokens [B, T, D], and what makes a score of a token, [H, D]."""
    heads = (head.attention.num_heads, -1)
    w_q, w_k, _ = head.attention.in_proj_weight.chunk(3)
    b_q, b_k, _ = head.attention.in_proj_bias.chunk(3)
    query = F.linear(head.probe[0, 0], w_q, b_q).unflatten(0, heads)  # [H, D/H]
    query = query * query.shape[-1] ** -0.5
    folded = torch.einsum("he,hed->hd", query, w_k.unflatten(0, heads))
    shift = (query * b_k.unflatten(0, heads)).sum(-1)[:, None]
    return (torch.einsum("btd,hd->bht", tokens, folded) + shift).softmax(-1), folded


def _first_patch(tower: AnyVisionTower) -> int:
    """Index of the first token of a patch. CLIP's class token comes before."""
    return 0 if isinstance(tower, VisionTower) else 1


def _layers(tower: AnyVisionTower, trace: TowerTrace) -> list[Block]:
    """The blocks that were traced."""
    layers = cast("list[Block]", list(tower.encoder.layers))
    return layers[len(layers) - len(trace.blocks) :]


def _mixed(layer: Block, block: BlockTrace) -> Tensor:
    """Output of a block's attention, [B, N, D]."""
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
