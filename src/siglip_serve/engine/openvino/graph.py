"""Both towers as OpenVINO graphs, node by node over the tensors of the torch towers.

The graphs are built by hand instead of traced. Torch's tracer is deprecated, fixes the batch size in the
attention pooling and takes seconds, and OpenVINO's converter reports its use over the network. Built by hand,
a graph takes a few milliseconds, accepts any batch size and shares the weights' memory. Tests compare it with
the torch towers.

Shapes as in `siglip_serve.towers.siglip`: B rows, T tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from openvino import Model, PartialShape, Type
from openvino import opset13 as op
from torch import Tensor, nn

from siglip_serve.checkpoint.model_config import ImageConfig, NaflexImageConfig
from siglip_serve.towers.naflex import NaflexVisionTower
from siglip_serve.towers.siglip import (
    MLP,
    Attention,
    AttentionPooling,
    Block,
    TextTower,
    VisionTower,
)

__all__ = ["PADDING", "build_head", "build_naflex", "build_naflex_head", "build_text", "build_vision"]

# Added to the scores of padding. Minus infinity would need care where a whole block of keys is padding.
PADDING = np.float32(-1e30)
_SAME = 0  # of a new shape: the length that the tensor has

Node = Any


def build_vision(tower: VisionTower, image: ImageConfig) -> Model:
    """Build the vision tower: uint8 pixels [B, S, S, 3] -> float32 patch tokens [B, T, D]."""
    size, patch = tower.config.image_size, tower.config.patch_size
    grid, tokens = tower.config.grid_size, tower.context
    pixels = op.parameter(PartialShape([-1, size, size, 3]), Type.u8, "pixels")
    x: Node = pixels
    if size % patch:  # pixels beyond the last whole patch are not seen
        x = op.slice(x, _ints(0, 0), _ints(grid * patch, grid * patch), _ints(1, 1), _ints(1, 2))
    # The patch convolution is one matrix product. Bytes are moved before they become floats.
    x = op.reshape(x, _ints(-1, grid, patch, grid, patch * 3), False)
    x = op.reshape(op.transpose(x, _ints(0, 1, 3, 2, 4)), _ints(-1, tokens, patch * patch * 3), False)
    x = _normalize(x, image, patch)
    projection = tower.embeddings.patch_embedding
    x = _linear(x, projection.weight.permute(0, 2, 3, 1).flatten(1), cast(Tensor, projection.bias))
    x = op.add(x, _constant(tower.embeddings.position_embedding.weight))
    x = _blocks(x, tower.encoder.blocks, tokens)
    return Model([_layer_norm(x, tower.post_layernorm)], [pixels], "vision")


def build_head(tower: VisionTower) -> Model:
    """Build the pooling head: patch tokens [B, T, D] -> the embedding [B, D], both float32."""
    tokens = op.parameter(PartialShape([-1, tower.context, tower.config.hidden_size]), Type.f32, "tokens")
    return Model([_head(tokens, tower.head)], [tokens], "head")


def build_naflex(tower: NaflexVisionTower, image: NaflexImageConfig) -> Model:
    """Build a NaFlex vision tower for any number of patches.

    Inputs: uint8 patches [B, T, 3 P P], the positions of their grids [B, T, D] float32, and what attention
    adds to the scores of each token, [B, T] float32: 0, or `PADDING`. Output: float32 tokens [B, T, D].
    """
    patch, width = tower.config.patch_size, tower.config.hidden_size
    patches = op.parameter(PartialShape([-1, -1, 3 * patch**2]), Type.u8, "patches")
    positions = op.parameter(PartialShape([-1, -1, width]), Type.f32, "positions")
    padding = op.parameter(PartialShape([-1, -1]), Type.f32, "padding")
    projection = tower.embeddings.patch_embedding
    x = _linear(_normalize(patches, image, patch), projection.weight, projection.bias)
    x = op.add(x, positions)
    x = _blocks(x, tower.encoder.blocks, _SAME, op.unsqueeze(padding, _ints(1, 2)))
    return Model([_layer_norm(x, tower.post_layernorm)], [patches, positions, padding], "naflex")


def build_naflex_head(tower: NaflexVisionTower) -> Model:
    """Build the pooling head of a NaFlex tower.

    Inputs: tokens [B, T, D] and the padding [B, T] of `build_naflex`. Output: the embedding [B, D].
    """
    tokens = op.parameter(PartialShape([-1, -1, tower.config.hidden_size]), Type.f32, "tokens")
    padding = op.parameter(PartialShape([-1, -1]), Type.f32, "padding")
    return Model([_head(tokens, tower.head, op.unsqueeze(padding, _ints(2)))], [tokens, padding], "head")


def build_text(tower: TextTower) -> Model:
    """Build the text tower: int64 ids [B, T] -> the embedding [B, P], float32."""
    ids = op.parameter(PartialShape([-1, tower.context]), Type.i64, "ids")
    x = op.gather(_constant(tower.embeddings.token_embedding.weight), ids, _ints(0))
    x = op.reshape(x, _ints(-1, tower.context, tower.config.hidden_size), False)
    x = op.add(x, _constant(tower.embeddings.position_embedding.weight))
    *blocks, last = tower.encoder.blocks
    x = _blocks(x, blocks, tower.context)
    # Only the last position is projected. The last block computes no other, but for their keys and values.
    x = op.squeeze(_last_position(x, last, tower.context), _ints(1))
    x = _linear(_layer_norm(x, tower.final_layer_norm), tower.head.weight, tower.head.bias)
    return Model([x], [ids], "text")


def _normalize(x: Node, image: ImageConfig, patch: int) -> Node:
    """Bytes of patches [..., 3 P P] -> float32, in the reference's order, so that it rounds alike"""
    x = op.multiply(op.convert(x, Type.f32), np.float32(image.rescale))
    mean, std = (np.tile(np.array(value, np.float32), patch**2) for value in (image.mean, image.std))
    return op.divide(op.subtract(x, mean), std)


def _blocks(x: Node, blocks: Sequence[Block], tokens: int, mask: Node | None = None) -> Node:
    for block in blocks:
        y = _layer_norm(x, block.layer_norm1)
        x = op.add(x, _attention(y, y, block.self_attn, tokens, mask))
        x = op.add(x, _mlp(_layer_norm(x, block.layer_norm2), block.mlp))
    return x


def _last_position(x: Node, block: Block, tokens: int) -> Node:
    """A block's last position alone: [B, T, D] -> [B, 1, D]"""
    y = _layer_norm(x, block.layer_norm1)
    x, query = (op.gather(node, _ints(tokens - 1), np.int64(1)) for node in (x, y))
    x = op.add(x, _attention(query, y, block.self_attn, tokens, None))
    return op.add(x, _mlp(_layer_norm(x, block.layer_norm2), block.mlp))


def _attention(queries: Node, x: Node, attention: Attention, tokens: int, mask: Node | None) -> Node:
    """Attend from [B, Q, D] to [B, T, D]: [B, Q, D], after a mask [B, 1, 1, T] was added to the scores"""
    weights, biases = attention.qkv_proj.weight.chunk(3), attention.qkv_proj.bias.chunk(3)
    width = weights[0].shape[0]
    # With three products and plain attention the CPU plugin fuses everything from the transposes of the heads
    # to the weighted sum into one kernel. One product of all three would have to be split again.
    rows = tokens if queries is x else 1
    q, k, v = (
        _heads(_linear(node, weight, bias), attention.heads, length)
        for node, length, weight, bias in zip(
            (queries, x, x), (rows, tokens, tokens), weights, biases, strict=True
        )
    )
    scores = op.multiply(op.matmul(q, k, False, True), np.float32((width // attention.heads) ** -0.5))
    scores = scores if mask is None else op.add(scores, mask)
    y = op.matmul(op.softmax(scores, -1), v, False, False)
    y = op.reshape(op.transpose(y, _ints(0, 2, 1, 3)), _ints(0, rows, width), True)
    return _linear(y, attention.out_proj.weight, attention.out_proj.bias)


def _head(tokens: Node, head: AttentionPooling, mask: Node | None = None) -> Node:
    """[B, T, D] -> [B, D]; a mask [B, T, 1] is added to the scores"""
    x = _pool(tokens, head, mask)
    return op.add(x, _mlp(_layer_norm(x, head.layernorm), head.mlp))


def _pool(tokens: Node, head: AttentionPooling, mask: Node | None) -> Node:
    """Attend to all tokens by the probe: [B, T, D] -> [B, D].

    The probe is the same for all images, so its product with the key projection is a constant. Each head's
    mean of the tokens is taken before the value projection, which then sees one row instead of every token.
    The keys' bias adds the same to all scores of a head, which softmax ignores.
    """
    attention, heads = head.attention, head.attention.num_heads
    w_q, w_k, w_v = attention.in_proj_weight.detach().double().chunk(3)
    b_q, _, b_v = attention.in_proj_bias.detach().double().chunk(3)
    width = w_q.shape[0] // heads
    q = F.linear(head.probe.detach().double(), w_q, b_q).reshape(heads, width) * width**-0.5
    keys = torch.einsum("hd,hdx->hx", q, w_k.unflatten(0, (heads, width)))  # [H, D]
    values = w_v.unflatten(0, (heads, width))  # [H, D/H, D]
    scores = op.matmul(tokens, _constant(keys.float()), False, True)  # [B, T, H]
    scores = scores if mask is None else op.add(scores, mask)
    means = op.matmul(op.softmax(scores, 1), tokens, True, False)  # [B, H, D]
    y = op.matmul(op.unsqueeze(means, _ints(2)), _constant(values.float()), False, True)  # [B, H, 1, D/H]
    y = op.add(op.reshape(y, _ints(-1, w_q.shape[0]), False), _constant(b_v.float()))
    return _linear(y, attention.out_proj.weight, attention.out_proj.bias)


def _heads(x: Node, heads: int, tokens: int) -> Node:
    """[B, T, D] -> [B, H, T, D/H]"""
    x = op.reshape(x, _ints(0, tokens, heads, -1), True)
    return op.transpose(x, _ints(0, 2, 1, 3))


def _mlp(x: Node, mlp: MLP) -> Node:
    form = "erf" if mlp.activation == "gelu" else "tanh"
    hidden = op.gelu(_linear(x, mlp.fc1.weight, mlp.fc1.bias), form)
    return _linear(hidden, mlp.fc2.weight, mlp.fc2.bias)


def _linear(x: Node, weight: Tensor, bias: Tensor) -> Node:
    return op.add(op.matmul(x, _constant(weight), False, True), _constant(bias))


def _layer_norm(x: Node, norm: nn.LayerNorm) -> Node:
    x = op.mvn(x, _ints(-1), True, float(norm.eps), "inside_sqrt")
    return op.add(op.multiply(x, _constant(norm.weight)), _constant(norm.bias))


def _constant(tensor: Tensor) -> Node:
    with torch.no_grad():
        return op.constant(tensor.detach().contiguous().numpy(), shared_memory=True)


def _ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)
