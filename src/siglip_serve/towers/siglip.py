"""Both SigLIP towers in plain PyTorch.

Parameters keep the Hugging Face names, except that the query, key and value projections of a block are one
`qkv_proj`. A load hook fuses them. The result equals transformers' `SiglipModel` for the fixed-resolution
checkpoints of SigLIP and SigLIP 2, and open_clip's `CustomTextCLIP` with an image tower of timm.

Shapes: B images or texts, T tokens (grid_size ** 2 patches, or the context length), D hidden size,
H heads, P the joint space (D of the vision tower = `projection_size` of the text tower).

Source: "Sigmoid Loss for Language Image Pre-Training" (Zhai et al., 2023, arXiv 2303.15343), and
"SigLIP 2" (Tschannen et al., 2025, arXiv 2502.14786).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.model_config import TextConfig, VisionConfig
from siglip_serve.towers.clip_rules import QUICK_GELU
from siglip_serve.towers.weights import load_strictly, without_values

__all__ = [
    "AttentionPooling",
    "BlockTrace",
    "TextTower",
    "TowerTrace",
    "VisionTower",
    "load_text",
    "load_vision",
    "trace_blocks",
]

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(QUICK_GELU * x),
}


@dataclass(frozen=True)
class BlockTrace:
    """Intermediate values of a block.

    Attributes:
        queries, keys, values: [B, H, T, D/H] of its attention.
        mlp: [B, T, D], what its MLP added to the residual stream.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    mlp: Tensor

    def attention(self) -> Tensor:
        """Compute the weights by which tokens take from tokens, [B, H, T, T] float32. Rows sum to 1."""
        queries, keys = self.queries.float(), self.keys.float()
        return (queries @ keys.mT * queries.shape[-1] ** -0.5).softmax(-1)


@dataclass(frozen=True)
class TowerTrace:
    """Intermediate values of the last blocks of a vision tower.

    Attributes:
        before: [B, T, D], the residual stream before these blocks.
        blocks: the trace of each block, in order.
        after: [B, T, D], the residual stream behind them, not normalised.
    """

    before: Tensor
    blocks: tuple[BlockTrace, ...]
    after: Tensor


class Attention(nn.Module):
    """Multi-head self-attention; with `causal` no token sees a later one.

    A mask [B, 1, 1, T] is added to the scores: 0, or for tokens that nothing may see, minus infinity.
    """

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.register_load_state_dict_pre_hook(_fuse_qkv)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        return self.mix(*self.project(x), mask)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, D] -> queries, keys and values, each [B, H, T, D/H]"""
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries, keys and values, each [B, H, T, D/H] -> [B, T, D]"""
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with an activation between them. Its names are those of `config.json`."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Block(nn.Module):
    """A pre-LayerNorm transformer block."""

    def __init__(self, config: VisionConfig | TextConfig, causal: bool = False) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.self_attn = Attention(width, config.num_attention_heads, causal)
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = MLP(width, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))

    def trace(self, x: Tensor) -> tuple[Tensor, BlockTrace]:
        """[B, T, D] -> [B, T, D] as `forward`, and the trace of the block"""
        q, k, v = self.self_attn.project(self.layer_norm1(x))
        x = x + self.self_attn.mix(q, k, v)
        mlp = self.mlp(self.layer_norm2(x))
        return x + mlp, BlockTrace(q, k, v, mlp)


class Encoder(nn.Module):
    """The stack of blocks; with `causal` no token sees a later one."""

    def __init__(self, config: VisionConfig | TextConfig, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.layers = nn.ModuleList(Block(config, causal) for _ in range(config.num_hidden_layers))

    @property
    def blocks(self) -> list[Block]:
        """The blocks in order: `layers` with its type."""
        return cast("list[Block]", list(self.layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        for layer in self.layers:
            x = layer(x, mask)
        return x


class AttentionPooling(nn.Module):
    """The MAP head: one learned probe attends to all tokens, followed by a residual MLP."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.attention = nn.MultiheadAttention(width, config.num_attention_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = MLP(width, config.intermediate_size, config.hidden_act)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, D], not normalised; the mask is that of `Attention`"""
        heads = (self.attention.num_heads, -1)
        w_q, w_kv = self.attention.in_proj_weight.tensor_split([tokens.shape[-1]])
        b_q, b_kv = self.attention.in_proj_bias.tensor_split([tokens.shape[-1]])
        # The probe is the same for all images, so its query is computed once, not once per image.
        q = F.linear(self.probe, w_q, b_q).unflatten(-1, heads).transpose(1, 2)  # [1, H, 1, D/H]
        kv = F.linear(tokens, w_kv, b_kv).unflatten(-1, (2, *heads))
        k, v = kv.permute(2, 0, 3, 1, 4)  # [B, H, T, D/H]
        y = F.scaled_dot_product_attention(q.expand(len(tokens), -1, -1, -1), k, v, mask)  # [B, H, 1, D/H]
        x = self.attention.out_proj(y.transpose(1, 2).flatten(2))[:, 0]  # [B, D]
        return x + self.mlp(self.layernorm(x))


class VisionEmbeddings(nn.Module):
    """Patches become tokens with learned positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.grid_size**2, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, T, D]; pixels beyond the last whole patch of a side are not seen"""
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        return x + self.position_embedding.weight


class VisionTower(nn.Module):
    """Normalised pixels -> patch tokens; `head` pools tokens into the image embedding."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = AttentionPooling(config)

    @property
    def context(self) -> int:
        """Tokens of one image."""
        return self.config.grid_size**2

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute the reference's `last_hidden_state`.

        Args:
            pixels: [B, 3, S, S], floating point, normalised as the checkpoint asks.

        Returns:
            [B, T, D] patch tokens. `head` pools them into the reference's `pooler_output` [B, D].
        """
        x = self.embeddings(pixels)
        x = self.encoder(x)
        return self.post_layernorm(x)

    def patches(self, tokens: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D], the tokens that stand for a place: all"""
        return tokens

    def trace(self, pixels: Tensor, blocks: int) -> TowerTrace:
        """Trace the last `blocks` blocks on pixels [B, 3, S, S], normalised as the checkpoint asks."""
        x = self.embeddings(pixels)
        split = len(self.encoder.blocks) - blocks
        for block in self.encoder.blocks[:split]:
            x = block(x)
        return trace_blocks(x, self.encoder.blocks[split:])


def trace_blocks(x: Tensor, blocks: Iterable[Block]) -> TowerTrace:
    """Run `Block`s one after the other on the residual stream [B, T, D], and trace them."""
    before, traces = x, []
    for block in blocks:
        x, trace = block.trace(x)
        traces.append(trace)
    return TowerTrace(before, tuple(traces), x)


class TextEmbeddings(nn.Module):
    """Token ids become tokens with learned positions."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]"""
        x = self.token_embedding(ids)
        return x + self.position_embedding.weight[: ids.shape[1]]


class TextTower(nn.Module):
    """Token ids -> tokens; `pool` projects the last position into the joint space."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.projection_size)

    @property
    def context(self) -> int:
        """Tokens of one text."""
        return self.config.max_position_embeddings

    def forward(self, ids: Tensor) -> Tensor:
        """Compute the reference's `last_hidden_state`.

        Args:
            ids: [B, T] int64, padded to the context length; the padding is attended to.

        Returns:
            [B, T, D] tokens.
        """
        x = self.embeddings(ids)
        x = self.encoder(x)
        return self.final_layer_norm(x)

    def pool(self, tokens: Tensor, ids: Tensor) -> Tensor:  # noqa: ARG002 - the place is the same for all ids
        """[B, T, D] of ids [B, T] -> [B, P], the reference's `pooler_output`, not normalised"""
        return self.head(tokens[:, -1])


def load_vision(path: Path) -> VisionTower:
    """Load the vision tower of a checkpoint directory, in float32, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: the configuration or the weights are not those of a SigLIP. All missing, unexpected
            and mis-shaped tensors are listed, up to 20.
    """
    config = load_config(path).vision
    with without_values():
        tower = VisionTower(config)
    load_strictly(tower, path, "vision")
    return tower


def load_text(path: Path) -> TextTower:
    """Load the text tower of a checkpoint directory, in float32, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: there is no text tower, or as for `load_vision`.
    """
    config = load_config(path).text
    with without_values():
        tower = TextTower(config)
    load_strictly(tower, path, "text")
    return tower


def _fuse_qkv(_module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    for kind in ("weight", "bias"):
        names = [f"{prefix}{part}_proj.{kind}" for part in "qkv"]
        if all(name in state for name in names):
            state[f"{prefix}qkv_proj.{kind}"] = torch.cat([state.pop(name) for name in names])
