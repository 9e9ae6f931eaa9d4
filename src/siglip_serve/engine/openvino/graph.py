"""Both towers as OpenVINO graphs, node by node over the tensors of the torch towers.

The graphs are built by hand instead of traced. Torch's tracer is deprecated, fixes the batch size in the
attention pooling and takes seconds, and OpenVINO's converter reports its use over the network. Built by hand,
a graph takes a few milliseconds, accepts any batch size and shares the weights' memory. Tests compare it with
the torch towers.

Shapes as in `siglip_serve.towers.siglip`: B rows, T tokens, D width, H heads.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from openvino import Model, PartialShape, Type
from openvino import opset13 as op
from torch import Tensor, nn

from siglip_serve.checkpoint.model_config import ImageConfig
from siglip_serve.towers.siglip import (
    MLP,
    Attention,
    AttentionPooling,
    Encoder,
    TextTower,
    VisionTower,
)

__all__ = ["build_head", "build_text", "build_vision"]

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
    # x * rescale, then (x - mean) / std, in the reference's order, so that float32 rounds alike.
    x = op.multiply(op.convert(x, Type.f32), np.float32(image.rescale))
    mean, std = (np.tile(np.array(value, np.float32), patch * patch) for value in (image.mean, image.std))
    x = op.divide(op.subtract(x, mean), std)
    projection = tower.embeddings.patch_embedding
    x = _linear(x, projection.weight.permute(0, 2, 3, 1).flatten(1), cast(Tensor, projection.bias))
    x = op.add(x, _constant(tower.embeddings.position_embedding.weight))
    x = _encoder(x, tower.encoder, tokens)
    return Model([_layer_norm(x, tower.post_layernorm)], [pixels], "vision")


def build_head(tower: VisionTower) -> Model:
    """Build the pooling head: patch tokens [B, T, D] -> the embedding [B, D], both float32."""
    head, width = tower.head, tower.config.hidden_size
    tokens = op.parameter(PartialShape([-1, tower.context, width]), Type.f32, "tokens")
    x = _pool(tokens, head)
    x = op.add(x, _mlp(_layer_norm(x, head.layernorm), head.mlp))
    return Model([x], [tokens], "head")


def build_text(tower: TextTower) -> Model:
    """Build the text tower: int64 ids [B, T] -> the embedding [B, P], float32."""
    ids = op.parameter(PartialShape([-1, tower.context]), Type.i64, "ids")
    x = op.gather(_constant(tower.embeddings.token_embedding.weight), ids, _ints(0))
    x = op.reshape(x, _ints(-1, tower.context, tower.config.hidden_size), False)
    x = op.add(x, _constant(tower.embeddings.position_embedding.weight))
    x = _encoder(x, tower.encoder, tower.context)
    # Only the last position is projected, and the norm is computed per position.
    x = op.gather(x, np.int64(tower.context - 1), np.int64(1))
    x = _linear(_layer_norm(x, tower.final_layer_norm), tower.head.weight, tower.head.bias)
    return Model([x], [ids], "text")


def _encoder(x: Node, encoder: Encoder, tokens: int) -> Node:
    for block in encoder.blocks:
        x = op.add(x, _attention(_layer_norm(x, block.layer_norm1), block.self_attn, tokens))
        x = op.add(x, _mlp(_layer_norm(x, block.layer_norm2), block.mlp))
    return x


def _attention(x: Node, attention: Attention, tokens: int) -> Node:
    """[B, T, D] -> [B, T, D]"""
    weights, biases = attention.qkv_proj.weight.chunk(3), attention.qkv_proj.bias.chunk(3)
    # With three products and plain attention the CPU plugin fuses everything from the transposes of the heads
    # to the weighted sum into one kernel. One product of all three would have to be split again.
    q, k, v = (
        _heads(_linear(x, weight, bias), attention.heads, tokens)
        for weight, bias in zip(weights, biases, strict=True)
    )
    y = _weighted_sum(q, k, v, weights[0].shape[0] // attention.heads)
    y = op.reshape(op.transpose(y, _ints(0, 2, 1, 3)), _ints(-1, tokens, weights[0].shape[0]), False)
    return _linear(y, attention.out_proj.weight, attention.out_proj.bias)


def _pool(tokens: Node, head: AttentionPooling) -> Node:
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
    means = op.matmul(op.softmax(scores, 1), tokens, True, False)  # [B, H, D]
    y = op.matmul(op.unsqueeze(means, _ints(2)), _constant(values.float()), False, True)  # [B, H, 1, D/H]
    y = op.add(op.reshape(y, _ints(-1, w_q.shape[0]), False), _constant(b_v.float()))
    return _linear(y, attention.out_proj.weight, attention.out_proj.bias)


def _weighted_sum(q: Node, k: Node, v: Node, width: int) -> Node:
    scores = op.multiply(op.matmul(q, k, False, True), np.float32(width**-0.5))
    return op.matmul(op.softmax(scores, -1), v, False, False)


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
