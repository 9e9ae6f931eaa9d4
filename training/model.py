"""A SigLIP to train: plain torch, with the parameter names of the Hugging Face checkpoint layout.

It differs from an inference model in what only training needs: vision tokens may be dropped, and residual
branches may be skipped for single samples.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Shape", "Siglip"]

EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """Sizes of both towers. The text tower is projected to the width of the vision tower."""

    image_size: int = 96
    patch: int = 8
    width: int = 128
    layers: int = 9
    heads: int = 4
    text_width: int = 96
    text_layers: int = 2
    text_heads: int = 3
    context: int = 64
    vocab: int = 1600


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = (self.q_proj, self.k_proj, self.v_proj)
        weight = torch.cat([part.weight for part in parts])
        bias = torch.cat([part.bias for part in parts])
        qkv = F.linear(x, weight, bias).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, T, D/heads]
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return out


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width, eps=EPS)
        self.self_attn = _Attention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = _Mlp(width)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:  # keep: [2, B, 1, 1]
        x = x + keep[0] * self.self_attn(self.layer_norm1(x))
        return x + keep[1] * self.mlp(self.layer_norm2(x))


class _Encoder(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, drop_path: float) -> Tensor:
        for number, layer in enumerate(self.layers):
            rate = drop_path * number / max(1, len(self.layers) - 1)
            keep = (torch.rand(2, len(x), 1, 1, device=x.device) >= rate).to(x.dtype) / (1 - rate)
            x = layer(x, keep)
        return x


class _PoolingHead(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.layernorm = nn.LayerNorm(width, eps=EPS)
        self.mlp = _Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        probe = self.probe.to(x.dtype).expand(len(x), -1, -1)
        x = self.attention(probe, x, x, need_weights=False)[0]  # [B, 1, D]
        x = x + self.mlp(self.layernorm(x))
        return x[:, 0]


class _Patches(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, shape.width, shape.patch, shape.patch)
        self.position_embedding = nn.Embedding((shape.image_size // shape.patch) ** 2, shape.width)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [B, T, D]
        out: Tensor = x + self.position_embedding.weight.to(x.dtype)
        return out


class _Tokens(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(shape.vocab, shape.text_width)
        self.position_embedding = nn.Embedding(shape.context, shape.text_width)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.token_embedding(ids) + self.position_embedding.weight
        return out


class _Vision(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embeddings = _Patches(shape)
        self.encoder = _Encoder(shape.width, shape.heads, shape.layers)
        self.post_layernorm = nn.LayerNorm(shape.width, eps=EPS)
        self.head = _PoolingHead(shape.width, shape.heads)

    def tokens(self, pixels: Tensor, kept_tokens: float, drop_path: float) -> Tensor:
        x: Tensor = self.embeddings(pixels)
        if kept_tokens < 1:
            count = int(x.shape[1] * kept_tokens)
            chosen = torch.rand(x.shape[:2], device=x.device).topk(count, dim=1).indices
            x = x.gather(1, chosen[..., None].expand(-1, -1, x.shape[2]))  # [B, count, D]
        out: Tensor = self.post_layernorm(self.encoder(x, drop_path))
        return out

    def forward(self, pixels: Tensor, kept_tokens: float, drop_path: float) -> Tensor:
        out: Tensor = self.head(self.tokens(pixels, kept_tokens, drop_path))
        return out


class _Text(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embeddings = _Tokens(shape)
        self.encoder = _Encoder(shape.text_width, shape.text_heads, shape.text_layers)
        self.final_layer_norm = nn.LayerNorm(shape.text_width, eps=EPS)
        self.head = nn.Linear(shape.text_width, shape.width)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.final_layer_norm(self.encoder(self.embeddings(ids), 0.0))
        out: Tensor = self.head(x[:, -1])  # the last position stands for the sentence
        return out


class Siglip(nn.Module):
    """Both towers, the scale and the bias."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.text_model = _Text(shape)
        self.vision_model = _Vision(shape)
        self.logit_scale = nn.Parameter(torch.tensor([2.303]))
        self.logit_bias = nn.Parameter(torch.tensor([-10.0]))
        self.apply(_initialise)

    def image(self, pixels: Tensor, kept_tokens: float = 1.0, drop_path: float = 0.0) -> Tensor:
        """[B, 3, S, S] in -1..1 -> [B, width], not normalised. A share `kept_tokens` is seen."""
        out: Tensor = self.vision_model(pixels, kept_tokens, drop_path)
        return out

    def image_means(self, pixels: Tensor, drop_path: float = 0.0) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] in -1..1 -> the mean of the patch tokens, and `image`. Both [B, width]."""
        tokens = self.vision_model.tokens(pixels, 1.0, drop_path)
        return tokens.mean(1), self.vision_model.head(tokens)

    def text(self, ids: Tensor) -> Tensor:
        """int64 [B, context] -> [B, width], not normalised."""
        out: Tensor = self.text_model(ids)
        return out


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, nn.MultiheadAttention):
        nn.init.xavier_uniform_(module.in_proj_weight)
