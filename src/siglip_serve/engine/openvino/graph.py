"""Both towers of every family as OpenVINO graphs, node by node over the parameters of a checkpoint.

The graphs are built by hand instead of traced. Torch's tracer is deprecated, fixes the batch size in the
attention pooling and takes seconds, and OpenVINO's converter reports its use over the network. Built by hand,
a graph takes a few milliseconds, accepts any batch size, shares the weights' memory and needs no torch. Tests
compare it with the torch towers.

Parameters have the names of the torch towers. Shapes as in `siglip_serve.towers.siglip`: B rows, T tokens, D
width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from openvino import Model, PartialShape, Type
from openvino import opset13 as op

from siglip_serve.checkpoint.model_config import (
    ClipTextConfig,
    ClipVisionConfig,
    ImageConfig,
    NaflexImageConfig,
    NaflexVisionConfig,
    TextConfig,
    VisionConfig,
)
from siglip_serve.towers.clip_rules import QUICK_GELU
from siglip_serve.towers.parameters import Parameters

__all__ = [
    "PADDING",
    "build_head",
    "build_naflex",
    "build_naflex_head",
    "build_patches",
    "build_text",
    "build_vision",
]

# Added to the scores of padding. Minus infinity would need care where a whole block of keys is padding.
PADDING = np.float32(-1e30)
_SAME = 0  # of a new shape: the length that the tensor has

Node = Any
AnyConfig = VisionConfig | TextConfig
Values = NDArray[np.float32]


def build_vision(parameters: Parameters, config: VisionConfig, image: ImageConfig) -> Model:
    """Build a vision tower: uint8 pixels [B, S, S, 3] -> float32 tokens [B, T, D].

    They are those of the tower's `forward`, but for CLIP those before the last block. `build_head` and
    `build_patches` run that block for the tokens that they need.
    """
    size, patch, grid = config.image_size, config.patch_size, config.grid_size
    pixels = op.parameter(PartialShape([-1, size, size, 3]), Type.u8, "pixels")
    x: Node = pixels
    if size % patch:  # pixels beyond the last whole patch are not seen
        x = op.slice(x, _ints(0, 0), _ints(grid * patch, grid * patch), _ints(1, 1), _ints(1, 2))
    # The patch convolution is one matrix product. Bytes are moved before they become floats.
    x = op.reshape(x, _ints(-1, grid, patch, grid, patch * 3), False)
    x = op.reshape(op.transpose(x, _ints(0, 1, 3, 2, 4)), _ints(-1, grid**2, patch * patch * 3), False)
    x = _normalize(x, image, patch)
    kernel = parameters["embeddings.patch_embedding.weight"].transpose(0, 2, 3, 1)
    x = _product(x, kernel.reshape(len(kernel), -1), parameters.get("embeddings.patch_embedding.bias"))
    blocks = range(config.num_hidden_layers)
    if isinstance(config, ClipVisionConfig):
        x = _layer_norm(_behind_class_token(x, parameters), parameters, "pre_layrnorm", config)
        x = _encoder(x, parameters, config, blocks[:-1], 1 + grid**2)
        return Model([x], [pixels], "vision")
    x = op.add(x, _constant(parameters["embeddings.position_embedding.weight"]))
    x = _encoder(x, parameters, config, blocks, grid**2)
    return Model([_layer_norm(x, parameters, "post_layernorm", config)], [pixels], "vision")


def build_head(parameters: Parameters, config: VisionConfig) -> Model:
    """Build the head: the tokens [B, T, D] of `build_vision` -> the embedding [B, P], both float32."""
    tokens = _tokens(config)
    if not isinstance(config, ClipVisionConfig):
        return Model([_head(tokens, parameters, config)], [tokens], "head")
    x = _last_block(tokens, parameters, config, lambda x: op.gather(x, _ints(0), _ints(1)))
    x = _projected(_layer_norm(x, parameters, "post_layernorm", config), parameters, "projection")
    return Model([x], [tokens], "head")


def build_patches(parameters: Parameters, config: ClipVisionConfig) -> Model:
    """Build the last block: the tokens [B, 1 + T, D] of `build_vision` -> those of patches [B, T, D]."""
    tokens, count = _tokens(config), 1 + config.grid_size**2
    last = range(config.num_hidden_layers)[-1:]
    x = _encoder(tokens, parameters, config, last, count)
    return Model([op.slice(x, _ints(1), _ints(count), _ints(1), _ints(1))], [tokens], "patches")


def build_naflex(parameters: Parameters, config: NaflexVisionConfig, image: NaflexImageConfig) -> Model:
    """Build a NaFlex vision tower for any number of patches.

    Inputs: uint8 patches [B, T, 3 P P], the positions of their grids [B, T, D] float32, and what attention
    adds to the scores of each token, [B, T] float32: 0, or `PADDING`. Output: float32 tokens [B, T, D].
    """
    patch = config.patch_size
    patches = op.parameter(PartialShape([-1, -1, 3 * patch**2]), Type.u8, "patches")
    positions = op.parameter(PartialShape([-1, -1, config.hidden_size]), Type.f32, "positions")
    padding = op.parameter(PartialShape([-1, -1]), Type.f32, "padding")
    x = _linear(_normalize(patches, image, patch), parameters, "embeddings.patch_embedding")
    x = op.add(x, positions)
    blocks = range(config.num_hidden_layers)
    x = _encoder(x, parameters, config, blocks, _SAME, op.unsqueeze(padding, _ints(1, 2)))
    x = _layer_norm(x, parameters, "post_layernorm", config)
    return Model([x], [patches, positions, padding], "naflex")


def build_naflex_head(parameters: Parameters, config: NaflexVisionConfig) -> Model:
    """Build the pooling head of a NaFlex tower.

    Inputs: tokens [B, T, D] and the padding [B, T] of `build_naflex`. Output: the embedding [B, D].
    """
    tokens = op.parameter(PartialShape([-1, -1, config.hidden_size]), Type.f32, "tokens")
    padding = op.parameter(PartialShape([-1, -1]), Type.f32, "padding")
    x = _head(tokens, parameters, config, op.unsqueeze(padding, _ints(2)))
    return Model([x], [tokens, padding], "head")


def build_text(parameters: Parameters, config: TextConfig) -> Model:
    """Build a text tower for any number of tokens.

    Inputs: int64 ids [B, T], and the place [B] int64 of the token that becomes the embedding. Output: the
    embedding [B, P], float32.
    """
    ids = op.parameter(PartialShape([-1, -1]), Type.i64, "ids")
    places = op.parameter(PartialShape([-1]), Type.i64, "places")
    length = op.gather(op.shape_of(ids), _ints(1), _ints(0))
    x = op.gather(_constant(parameters["embeddings.token_embedding.weight"]), ids, _ints(0))
    x = op.add(x, _first(parameters["embeddings.position_embedding.weight"], length))
    of_clip = isinstance(config, ClipTextConfig)
    mask = _first(_later(config.max_position_embeddings), length, axes=2) if of_clip else None
    x = _encoder(x, parameters, config, range(config.num_hidden_layers - 1), _SAME, mask)
    rows = op.unsqueeze(places, _ints(1))
    mask = None if mask is None else op.unsqueeze(op.gather(mask, rows, _ints(0)), _ints(1))  # [B, 1, 1, T]
    x = _last_block(x, parameters, config, lambda x: op.gather(x, rows, _ints(1), 1), mask)
    x = _layer_norm(x, parameters, "final_layer_norm", config)
    x = _projected(x, parameters, "projection" if of_clip else "head")
    return Model([x], [ids, places], "text")


def _tokens(config: VisionConfig) -> Node:
    count = config.grid_size**2 + isinstance(config, ClipVisionConfig)
    return op.parameter(PartialShape([-1, count, config.hidden_size]), Type.f32, "tokens")


def _behind_class_token(patches: Node, parameters: Parameters) -> Node:
    """[B, T, D] -> [B, 1 + T, D], with positions"""
    added = parameters["embeddings.position_embedding.weight"].copy()
    added[0] += parameters["embeddings.class_embedding"]
    x = op.pad(patches, _ints(0, 1, 0), _ints(0, 0, 0), "constant", np.float32(0))
    return op.add(x, _constant(added))


def _later(tokens: int) -> Values:
    """[T, T], what attention adds to the scores so that no token sees a later one."""
    return np.triu(np.full((tokens, tokens), PADDING), 1)


def _first(table: Values, length: Node, axes: int = 1) -> Node:
    """Take the first `length` [1] entries along the first axes of a table."""
    zeros, ones = _ints(*[0] * axes), _ints(*[1] * axes)
    return op.slice(_constant(table), zeros, op.concat([length] * axes, 0), ones, _ints(*range(axes)))


def _projected(x: Node, parameters: Parameters, name: str) -> Node:
    """[B, D] -> [B, P]; a tower without a projection has no such parameters"""
    return _linear(x, parameters, name) if f"{name}.weight" in parameters else x


def _normalize(x: Node, image: ImageConfig, patch: int) -> Node:
    """Bytes of patches [..., 3 P P] -> float32, in the reference's order, so that it rounds alike"""
    x = op.multiply(op.convert(x, Type.f32), np.float32(image.rescale))
    mean, std = (np.tile(np.array(value, np.float32), patch**2) for value in (image.mean, image.std))
    return op.divide(op.subtract(x, mean), std)


def _encoder(
    x: Node,
    parameters: Parameters,
    config: AnyConfig,
    blocks: Iterable[int],
    tokens: int,
    mask: Node | None = None,
) -> Node:
    for index in blocks:
        block = f"encoder.layers.{index}"
        y = _layer_norm(x, parameters, f"{block}.layer_norm1", config)
        x = op.add(x, _attention(y, y, parameters, f"{block}.self_attn", config, tokens, mask))
        y = _layer_norm(x, parameters, f"{block}.layer_norm2", config)
        x = op.add(x, _mlp(y, parameters, f"{block}.mlp", config))
    return x


def _last_block(
    x: Node,
    parameters: Parameters,
    config: AnyConfig,
    pick: Callable[[Node], Node],
    mask: Node | None = None,
) -> Node:
    """Compute one token of each row of a block: [B, T, D] -> [B, D]. `pick` takes it out, as [B, 1, D]."""
    block = f"encoder.layers.{config.num_hidden_layers - 1}"
    y = _layer_norm(x, parameters, f"{block}.layer_norm1", config)
    attended = _attention(pick(y), y, parameters, f"{block}.self_attn", config, _SAME, mask)
    x = op.add(pick(x), attended)
    y = _layer_norm(x, parameters, f"{block}.layer_norm2", config)
    x = op.add(x, _mlp(y, parameters, f"{block}.mlp", config))
    return op.squeeze(x, _ints(1))


def _attention(
    queries: Node,
    x: Node,
    parameters: Parameters,
    name: str,
    config: AnyConfig,
    tokens: int,
    mask: Node | None,
) -> Node:
    """Attend from the tokens `queries` to the tokens `x`, both [B, T, D], with a mask added to the scores.

    The mask is [B, 1, 1, T] or [T, T]. The result is shaped as `queries`.
    """
    heads, width = config.num_attention_heads, config.hidden_size
    weights, biases = (parameters.thirds(f"{name}.qkv_proj.{kind}") for kind in ("weight", "bias"))
    # With three products and plain attention the CPU plugin fuses everything from the transposes of the heads
    # to the weighted sum into one kernel. One product of all three would have to be split again.
    q, k, v = (
        _heads(_product(source, weight, bias), heads, tokens)
        for source, weight, bias in zip((queries, x, x), weights, biases, strict=True)
    )
    scores = op.multiply(op.matmul(q, k, False, True), np.float32((width // heads) ** -0.5))
    scores = scores if mask is None else op.add(scores, mask)
    y = op.matmul(op.softmax(scores, -1), v, False, False)
    y = op.reshape(op.transpose(y, _ints(0, 2, 1, 3)), _ints(0, tokens, width), True)
    return _linear(y, parameters, f"{name}.out_proj")


def _head(tokens: Node, parameters: Parameters, config: VisionConfig, mask: Node | None = None) -> Node:
    """[B, T, D] -> [B, D]; a mask [B, T, 1] is added to the scores"""
    x = _pool(tokens, parameters, config.num_attention_heads, mask)
    y = _layer_norm(x, parameters, "head.layernorm", config)
    return op.add(x, _mlp(y, parameters, "head.mlp", config))


def _pool(tokens: Node, parameters: Parameters, heads: int, mask: Node | None) -> Node:
    """Attend to all tokens by the probe: [B, T, D] -> [B, D].

    The probe is the same for all images, so its product with the key projection is a constant. Each head's
    mean of the tokens is taken before the value projection, which then sees one row instead of every token.
    The keys' bias adds the same to all scores of a head, which softmax ignores.
    """
    w_q, w_k, w_v = parameters.thirds("head.attention.in_proj_weight")
    b_q, _, b_v = parameters.thirds("head.attention.in_proj_bias")
    width = len(w_q) // heads
    probe = parameters["head.probe"].astype(np.float64)[0, 0]
    q = (w_q.astype(np.float64) @ probe + b_q).reshape(heads, 1, width) * width**-0.5
    keys = (q @ w_k.astype(np.float64).reshape(heads, width, -1))[:, 0]  # [H, D]
    values = w_v.reshape(heads, width, -1)  # [H, D/H, D]
    scores = op.matmul(tokens, _constant(keys.astype(np.float32)), False, True)  # [B, T, H]
    scores = scores if mask is None else op.add(scores, mask)
    means = op.matmul(op.softmax(scores, 1), tokens, True, False)  # [B, H, D]
    y = op.matmul(op.unsqueeze(means, _ints(2)), _constant(values), False, True)  # [B, H, 1, D/H]
    y = op.add(op.reshape(y, _ints(-1, len(w_q)), False), _constant(b_v))
    return _linear(y, parameters, "head.attention.out_proj")


def _heads(x: Node, heads: int, tokens: int) -> Node:
    """[B, T, D] -> [B, H, T, D/H]"""
    x = op.reshape(x, _ints(0, tokens, heads, -1), True)
    return op.transpose(x, _ints(0, 2, 1, 3))


def _mlp(x: Node, parameters: Parameters, name: str, config: AnyConfig) -> Node:
    hidden = _activate(_linear(x, parameters, f"{name}.fc1"), config.hidden_act)
    return _linear(hidden, parameters, f"{name}.fc2")


def _activate(x: Node, name: str) -> Node:
    if name == "quick_gelu":
        return op.swish(x, np.float32(QUICK_GELU))
    return op.gelu(x, "erf" if name == "gelu" else "tanh")


def _linear(x: Node, parameters: Parameters, name: str) -> Node:
    return _product(x, parameters[f"{name}.weight"], parameters.get(f"{name}.bias"))


def _product(x: Node, weight: Values, bias: Values | None) -> Node:
    x = op.matmul(x, _constant(weight), False, True)
    return x if bias is None else op.add(x, _constant(bias))


def _layer_norm(x: Node, parameters: Parameters, name: str, config: AnyConfig) -> Node:
    x = op.mvn(x, _ints(-1), True, float(config.layer_norm_eps), "inside_sqrt")
    x = op.multiply(x, _constant(parameters[f"{name}.weight"]))
    return op.add(x, _constant(parameters[f"{name}.bias"]))


def _constant(values: Values) -> Node:
    return op.constant(np.ascontiguousarray(values), shared_memory=True)


def _ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)
