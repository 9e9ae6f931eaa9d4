"""The fused vision runner with its optimisations switched off one by one, for `benchmarks.vision_waterfall`.

Each lever that is off replaces one part of the engine's own runner by the operation of torch that a plain
implementation would use. With all levers on, the embeddings are those of the engine's runner, bit by bit,
which a test holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from siglip_serve.checkpoint.model_config import ImageConfig
from siglip_serve.engine.buckets import rows_of_a_pass
from siglip_serve.engine.fused import kernels
from siglip_serve.engine.fused.blocks import Layer, attend, attend_by_cudnn, attend_by_torch
from siglip_serve.engine.fused.folded import FoldedPatchEmbedding, FoldedPooling
from siglip_serve.engine.fused.replays import Replays
from siglip_serve.engine.passes import Finish
from siglip_serve.towers.siglip import Block, VisionEmbeddings, VisionTower

__all__ = ["LeveredVision", "Levers"]


@dataclass(frozen=True)
class Levers:
    """Optimisations of the fused runner.

    Attributes:
        kernels: LayerNorm in one pass. The last product of a branch adds to the residual stream directly, and
            its bias is added where the next LayerNorm reads the stream.
        gelu: computed by the matrix product that feeds it, before its result is written.
        attention: by torch's choice, by cuDNN, or by a kernel of this project where there is one for the GPU
            and the shape, else by cuDNN.
        fold: the weights of the patch embedding normalise the pixels, and the pooling head multiplies its
            constant query into its key projection.
        graphs: a CUDA graph for every batch size, so that launches cost nothing.
    """

    kernels: bool = True
    gelu: bool = True
    attention: Literal["torch", "cudnn", "own"] = "own"
    fold: bool = True
    graphs: bool = True


class LeveredVision:
    """Run a SigLIP vision tower with the given levers; uint8 pixels -> EMBEDDING.

    Args:
        tower: on the CPU, float32. The runner takes it over.
        image: the checkpoint's normalisation.
        device: a CUDA device; without `graphs` also the CPU.
        dtype: bfloat16 or float16.
        levers: the optimisations that are on.
        max_rows: largest batch that is recorded; 0: the largest that is worth it.

    Attributes:
        max_rows: most rows of one call.
        replays: the passes.
    """

    def __init__(
        self,
        tower: VisionTower,
        image: ImageConfig,
        device: torch.device,
        dtype: torch.dtype,
        levers: Levers,
        max_rows: int = 0,
    ) -> None:
        tower.to(device)
        self._tokens, self._width = tower.context, tower.config.hidden_size
        self._embed: Callable[[Tensor], Tensor]
        if levers.fold:
            self._embed = FoldedPatchEmbedding(tower.embeddings, image, dtype)
        else:
            self._embed = _PatchEmbedding(tower.embeddings, image, dtype)
        self._blocks = _LeveredBlocks(tower.encoder.blocks, tower.post_layernorm, dtype, levers)
        self._head = FoldedPooling(tower.head, dtype) if levers.fold else tower.head.to(dtype)
        size = tower.config.image_size
        rows = torch.zeros(rows_of_a_pass(self._tokens, max_rows), size, size, 3, dtype=torch.uint8)
        self.replays = Replays(self._forward, [rows], device, levers.graphs)
        self.max_rows = self.replays.max_rows

    @torch.inference_mode()
    def __call__(self, pixels: NDArray[np.uint8], /, wanted: Sequence[str]) -> Finish:  # noqa: ARG002 - one output
        """Start a pass over pixels [n, S, S, 3] -> EMBEDDING [n, W]."""
        _, embedding = self.replays(pixels)
        return self.replays.fetch({"EMBEDDING": embedding})

    def _forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = self._blocks(self._embed(pixels), len(pixels))  # [n * T, W]
        tokens = x.view(len(pixels), self._tokens, self._width)
        return tokens, self._head(tokens).float()


class _PatchEmbedding:
    """uint8 pixels [n, S, S, 3] -> [n * T, W], by a normalisation and a convolution"""

    def __init__(self, embeddings: VisionEmbeddings, image: ImageConfig, dtype: torch.dtype) -> None:
        positions = embeddings.position_embedding.weight.detach()
        self._dtype, self._rescale = dtype, image.rescale
        self._conv, self._positions = embeddings.patch_embedding.to(dtype), positions.to(dtype)
        mean, std = (torch.tensor(v, device=positions.device) for v in (image.mean, image.std))
        self._mean, self._std = mean.view(3, 1, 1), std.view(3, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        x = (pixels.permute(0, 3, 1, 2) * self._rescale - self._mean) / self._std
        return (self._conv(x.to(self._dtype)).flatten(2).transpose(1, 2) + self._positions).flatten(0, 1)


class _LeveredBlocks:
    """`fused.blocks.Blocks` with levers."""

    def __init__(
        self, layers: Sequence[Block], final: nn.LayerNorm, dtype: torch.dtype, levers: Levers
    ) -> None:
        self._levers, self._final = levers, final
        self._layers: list[Layer] = []
        self._offset = torch.zeros_like(final.weight)
        for block in layers:
            self._layers.append(Layer(block, dtype, self._offset))
            self._offset = self._layers[-1].offset_after
        self._biases = [
            (block.self_attn.out_proj.bias.detach().to(dtype), block.mlp.fc2.bias.detach().to(dtype))
            for block in layers
        ]

    def __call__(self, x: Tensor, rows: int) -> Tensor:
        """Tokens [M, W] of `rows` images -> normalised tokens [M, W]; x is overwritten"""
        for layer, (b_out, b_fc2) in zip(self._layers, self._biases, strict=True):
            h = self._normalize(x, layer.offset1, layer.norm1)
            y = self._attend(torch.addmm(layer.b_qkv, h, layer.w_qkv), rows, layer.heads)
            x = self._add(x, y, layer.w_out, b_out)
            h = self._normalize(x, layer.offset2, layer.norm2)
            if self._levers.gelu:
                z = torch._addmm_activation(layer.b_fc1, h, layer.w_fc1, use_gelu=True)
            else:
                z = F.gelu(torch.addmm(layer.b_fc1, h, layer.w_fc1), approximate="tanh")
            x = self._add(x, z, layer.w_fc2, b_fc2)
        return self._normalize(x, self._offset, self._final)

    def _normalize(self, x: Tensor, offset: Tensor, norm: nn.LayerNorm) -> Tensor:
        if self._levers.kernels:
            return kernels.layer_norm(x, offset, norm)
        return F.layer_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)

    def _add(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if self._levers.kernels:
            return x.addmm_(y, weight)
        return x + torch.addmm(bias, y, weight)

    def _attend(self, qkv: Tensor, rows: int, heads: int) -> Tensor:
        if self._levers.attention == "own":
            return attend(qkv, rows, heads)
        if self._levers.attention == "torch":
            return attend_by_torch(qkv, rows, heads)
        return attend_by_cudnn(qkv, rows, heads)
