"""Where a vision tower sees a prompt: the cosine as a sum over the places of the image.

Some factors depend on the whole image: attention, the scale of each LayerNorm, the gate of the last
activation. Held at their values, they make the embedding y of an image a sum of parts that each place adds.
For a vector w in the space of the embeddings this gives

    <w, y> / |y| = sum of maps[w] + unattributed[w],

exactly, for every image. If w is a unit text embedding, this is the cosine. It is linear in w, so the
difference of two prompts is explained by the difference of their vectors. Unattributed are the parts without
a place: biases, and the sum that is added to the token of the whole image.

Source: "Interpreting CLIP's Image Representation via Text-Based Decomposition" (Gandelsman, Efros and
Steinhardt, ICLR 2024, arXiv 2310.05916) for CLIP. SigLIP has no class token, so its embedding is decomposed
from the pooling head backwards: see `SiglipExplainer`.

Shapes: B images, P vectors of width E (of the embeddings), T patches, D hidden size, H heads, K blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from siglip_serve.towers.clip import ClipVisionTower
from siglip_serve.towers.naflex import NaflexVisionTower
from siglip_serve.towers.siglip import ACTIVATIONS, TowerTrace, VisionTower, trace_blocks

__all__ = ["ClipExplainer", "Explainer", "Explanation", "SiglipExplainer", "explainer_of", "on_host"]

# Products of earlier sets of vectors are kept on the device: most sets, and most values of one set.
_SETS_KEPT, _VALUES_KEPT = 16, 2**20
_LAYERS_AT_ONCE = 8

Array = TypeVar("Array", Tensor, NDArray[np.float32])


@dataclass(frozen=True)
class Explanation(Generic[Array]):
    """The parts of image embeddings, as vectors see them.

    Tensors of B images come from an explainer. Arrays of one image, without the leading dimension, come from
    an engine.

    Attributes:
        maps: [..., P, T] float32, row by row of the patch grid. With `unattributed` its sum over the places
            is the score, <vector, embedding> / |embedding|.
        unattributed: [..., P] float32, the part of the score that has no place.
        embedding: [..., E] float32, not normalised.
    """

    maps: Array
    unattributed: Array
    embedding: Array


def on_host(found: Explanation[Tensor]) -> Explanation[NDArray[np.float32]]:
    """Copy the explanation of one image, [1, ...], to arrays without the leading dimension."""
    parts = found.maps[0], found.unattributed[0], found.embedding[0]
    # Together, since each copy waits for the device.
    joined = torch.cat([part.flatten() for part in parts]).cpu()
    sizes = [part.numel() for part in parts]
    split = zip(joined.split(sizes), parts, strict=True)
    return Explanation(*(values.view(part.shape).numpy() for values, part in split))


class Explainer(Protocol):
    """Finds the maps of one tower."""

    def explain(self, tower: Any, pixels: Tensor, vectors: Tensor) -> Explanation[Tensor]:
        """Explain the embeddings of B images.

        Args:
            tower: the tower that this explainer was made for.
            pixels: [B, 3, S, S] of the tower's dtype, normalised as the checkpoint asks.
            vectors: [P, E] float32 on the device of the tower.
        """


def explainer_of(tower: VisionTower | ClipVisionTower, blocks: int, most: int) -> Explainer:
    """Make the explainer of a tower; `blocks` and `most` are those of `SiglipExplainer`."""
    if isinstance(tower, ClipVisionTower):
        return ClipExplainer(tower)
    return SiglipExplainer(tower, blocks, most)


class SiglipExplainer:
    """Find the maps of a SigLIP tower, or of a NaFlex tower by the trace of an image without padding.

    The head's MLP is linear once the scale of its LayerNorm and the gate of its GELU are held at their
    values. A vector's view of the embedding thus becomes a linear form on the pooled tokens. The form is
    rolled back through the last blocks: the part that attention added to a token counts for the tokens that
    it came from, and the part that the MLP added counts for the token itself.

    Args:
        tower: the head and the output projections of the last blocks are kept.
        blocks: how many blocks are rolled back, K, at most all that the tower has. With 0 the places are
            the pooled tokens themselves, and the cost hardly grows with the number of vectors.
        most: with more vectors than this no block is rolled back.
    """

    def __init__(self, tower: VisionTower | NaflexVisionTower, blocks: int = 2, most: int = 32) -> None:
        self._most = most
        self.blocks = blocks = min(blocks, len(tower.encoder.layers))
        layers = tower.encoder.blocks[len(tower.encoder.layers) - blocks :]
        # Layers are kept instead of their weights, which may still be moved to a device.
        self._projections: list[nn.Linear] = [layer.self_attn.out_proj for layer in layers]
        self._norm = tower.post_layernorm
        attention, mlp = tower.head.attention, tower.head.mlp
        self._heads = attention.num_heads
        self._probe, self._attention, self._out = tower.head.probe, attention, attention.out_proj
        self._head_norm, self._fc1, self._fc2 = tower.head.layernorm, mlp.fc1, mlp.fc2
        self._activation = mlp.activation

    @torch.inference_mode()
    def explain(self, tower: VisionTower, pixels: Tensor, vectors: Tensor) -> Explanation[Tensor]:
        """Explain images. See `Explainer`."""
        return self(tower.trace(pixels, self.blocks), vectors)

    def prepare(self, vectors: Tensor) -> tuple[Tensor]:
        """Move vectors [P, D] float32 to the device of the tower, as `__call__` takes them behind a trace."""
        return (vectors.to(self._probe.device),)

    @torch.inference_mode()
    def __call__(self, trace: TowerTrace, vectors: Tensor) -> Explanation[Tensor]:
        """Explain the images of a trace.

        Args:
            trace: of the last `blocks` blocks. See `VisionTower.trace`.
            vectors: [P, D] float32 on the device of the trace.
        """
        stream = trace.after.float()
        tokens = _normalize(stream, self._norm)  # [B, T, D]
        weights, pooled = self._pool(tokens)  # [B, H, T], [B, D]
        embedding, form, constant = self._linearize(pooled, vectors)
        # form [B, P, D] is how vectors see the pooled token; per_head is how they see the values of each head
        per_head = (form @ self._out.weight.float()).unflatten(-1, (self._heads, -1))  # [B, P, H, D/H]
        _, _, w_v = self._attention.in_proj_weight.float().chunk(3)
        _, _, b_v = self._attention.in_proj_bias.float().chunk(3)
        constant = constant + form @ self._out.bias.float() + per_head.flatten(2) @ b_v
        w_v = w_v.unflatten(0, (self._heads, -1))  # [H, D/H, D]
        if not trace.blocks or len(vectors) > self._most:
            values = torch.einsum("btd,hed->bhte", tokens, w_v)
            maps = torch.einsum("bht,bhte,bphe->bpt", weights, values, per_head)
        else:
            forms = torch.einsum("bphe,hed->bphd", per_head, w_v)
            on_tokens = torch.einsum("bht,bphd->bptd", weights, forms)
            maps, rest = self._roll_back(on_tokens, trace)
            constant = constant + rest
        length = embedding.norm(dim=-1)[:, None]
        return Explanation(maps / length[..., None], constant / length, embedding)

    def _pool(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, T, D] -> the probe's attention [B, H, T] and the pooled token [B, D]"""
        attention, heads = self._attention, self._heads
        w_q, w_k, w_v = attention.in_proj_weight.float().chunk(3)
        b_q, b_k, b_v = attention.in_proj_bias.float().chunk(3)
        query = F.linear(self._probe.float()[0, 0], w_q, b_q).unflatten(-1, (heads, -1))  # [H, D/H]
        # The query is the same for all images, so with the keys' weights it makes one vector per head.
        folded = torch.einsum("he,hed->hd", query, w_k.unflatten(0, (heads, -1)))
        shift = (query * b_k.unflatten(0, (heads, -1))).sum(-1)[:, None]  # [H, 1]
        scores = (torch.einsum("btd,hd->bht", tokens, folded) + shift) * query.shape[-1] ** -0.5
        weights = scores.softmax(-1)
        mixed = weights @ tokens  # [B, H, D]
        values = torch.einsum("bhd,hed->bhe", mixed, w_v.unflatten(0, (heads, -1))).flatten(1) + b_v
        return weights, F.linear(values, self._out.weight.float(), self._out.bias.float())

    def _linearize(self, pooled: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Make the head's MLP linear at the pooled token [B, D], as vectors [P, D] see it.

        Returns:
            The embedding [B, D], and form [B, P, D] and constant [B, P] such that <vector, embedding> is
            <form, pooled> + constant.
        """
        norm, fc1, fc2 = self._head_norm, self._fc1, self._fc2
        w1, w2 = fc1.weight.float(), fc2.weight.float()
        b1, b2 = fc1.bias.float(), fc2.bias.float()
        gamma, beta = norm.weight.float(), norm.bias.float()
        centred, scale = _standardize(pooled, norm.eps)
        hidden = F.linear(centred / scale * gamma + beta, w1, b1)  # [B, 4 D]
        embedding = pooled + F.linear(ACTIVATIONS[self._activation](hidden), w2, b2)
        # gelu(u) = u * gate(u). Near 0 the quotient gelu(u) / u would lose digits.
        if self._activation == "gelu":
            gate = 0.5 * (1 + torch.erf(hidden * 0.5**0.5))
        else:
            gate = 0.5 * (1 + torch.tanh(_GELU_SLOPE * (hidden + _GELU_CUBIC * hidden**3)))
        seen = (vectors @ w2) * gate[:, None]  # [B, P, 4 D]
        form = vectors + _centre((seen @ w1) * gamma) / scale[:, None]
        constant = seen @ (w1 @ beta + b1) + vectors @ b2
        return embedding, form, constant

    def _roll_back(self, forms: Tensor, trace: TowerTrace) -> tuple[Tensor, Tensor]:
        """Forms [B, P, T, D] on the normalised tokens -> maps [B, P, T], and the part without place [B, P]"""
        _, scale = _standardize(trace.after.float(), self._norm.eps)  # [B, T, 1]
        rest = (forms @ self._norm.bias.float()).sum(-1)
        forms = _centre(forms * self._norm.weight.float()) / scale[:, None]
        # The stream is a sum: its value before the blocks, and what each block's attention and MLP added.
        maps = torch.einsum("bptd,btd->bpt", forms, trace.before.float())
        for block, projection in zip(trace.blocks, self._projections, strict=True):
            maps += torch.einsum("bptd,btd->bpt", forms, block.mlp.float())
            rest = rest + (forms @ projection.bias.float()).sum(-1)
            per_head = (forms @ projection.weight.float()).unflatten(-1, (block.values.shape[1], -1))
            # Vectors are put side by side, so that each head's attention is multiplied once: [B, H, T, P *
            # D/H].
            columns = per_head.permute(0, 3, 2, 1, 4).flatten(3)
            # The forms of all tokens, gathered at the token that a value comes from.
            gathered = (block.attention().mT @ columns).unflatten(-1, (forms.shape[1], -1))
            maps += (gathered * block.values.float()[:, :, :, None]).sum((1, 4)).mT
        return maps, rest


class ClipExplainer:
    """Find the maps of a CLIP tower: what the class token took from each patch, in every layer.

    The class token ends as the sum of its first value and what the attention and the MLP of each block added.
    The part of attention is a sum over tokens and heads. A vector sees each term through the output
    projection, the last LayerNorm and the projection to the joint space. These are the same for all images,
    so they are multiplied with the vectors once and kept. [L, T, H, D] is never computed: a layer costs one
    row of attention, and one product of its values [T, D] with as many columns as there are vectors.

    Args:
        tower: the output projections, the last LayerNorm and the projection are kept.
    """

    def __init__(self, tower: ClipVisionTower) -> None:
        self._projections = [block.self_attn.out_proj for block in tower.encoder.blocks]
        self._norm, self._projection = tower.post_layernorm, tower.projection
        self._seen: OrderedDict[bytes, tuple[Tensor, Tensor, Tensor]] = OrderedDict()

    @torch.inference_mode()
    def explain(self, tower: ClipVisionTower, pixels: Tensor, vectors: Tensor) -> Explanation[Tensor]:
        """Explain images. See `Explainer`."""
        form, seen, constant = self.prepare(vectors)
        x, blocks = tower.embed(pixels), tower.encoder.blocks  # [B, 1 + T, D]
        maps = torch.zeros((), device=x.device)
        for start in range(0, len(blocks), _LAYERS_AT_ONCE):
            end = start + _LAYERS_AT_ONCE
            trace = trace_blocks(x, blocks[start:end])
            x, maps = trace.after, maps + _taken(trace, seen[start:end])
        return self.conclude(x, maps, form, constant)

    def conclude(self, x: Tensor, maps: Tensor, form: Tensor, constant: Tensor) -> Explanation[Tensor]:
        """Explain images by what their class tokens took.

        Args:
            x: [B, 1 + T, D], the tokens behind the blocks.
            maps: [B, P, 1 + T], what the class token took from each token.
            form, constant: as of `prepare`.
        """
        last, norm = x[:, 0].float(), self._norm
        centred, scale = _standardize(last, norm.eps)
        embedding = (centred / scale * norm.weight.float() + norm.bias.float()) @ self._matrix().T
        length = embedding.norm(dim=-1, keepdim=True)
        places = maps[..., 1:]
        # All the rest of the class token has no place in the image: its first value, what MLPs and biases
        # added, and what it took from itself.
        rest = last @ form.T - places.sum(-1)
        return Explanation(
            places / (scale * length)[..., None],
            rest / (scale * length) + constant / length,
            embedding,
        )

    def _matrix(self) -> Tensor:
        """[P, D], the projection to the joint space, or the identity for a tower without one"""
        if isinstance(self._projection, nn.Linear):
            return self._projection.weight.float()
        weight = self._norm.weight
        return torch.eye(len(weight), device=weight.device)

    @torch.inference_mode()
    def prepare(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Multiply vectors with the weights behind the values, or find the products of an earlier call.

        Args:
            vectors: [P, E] float32.

        Returns:
            How vectors see the class token, [P, D], the mixed values of each layer, [L, P, D], and the bias
            of the last LayerNorm, [P], on the device of the tower.
        """
        key = vectors.cpu().numpy().tobytes()
        found = self._seen.pop(key, None)
        if found is None:
            norm = self._norm
            projected = vectors.to(norm.weight.device) @ self._matrix()
            # The mean that the last LayerNorm takes off is taken off here.
            form = _centre(projected * norm.weight.float())
            seen = [form @ projection.weight.float() for projection in self._projections]
            found = form, torch.stack(seen), projected @ norm.bias.float()
        if found[1].numel() <= _VALUES_KEPT:
            self._seen[key] = found
            if len(self._seen) > _SETS_KEPT:
                self._seen.popitem(last=False)
        return found


def _taken(trace: TowerTrace, seen: Tensor) -> Tensor:
    """Find what the class token took from each token in some layers, as vectors see it, [B, P, 1 + T].

    Layers are taken together, so that a GPU does not wait for many small products.

    Args:
        trace: of B images.
        seen: [L, P, D], how vectors see the mixed values of these layers.
    """
    layers = trace.blocks
    # The heads of all layers lie side by side, since a GPU joins tensors of up to four dimensions at once.
    queries = torch.cat([layer.queries[:, :, 0] for layer in layers], dim=1).float()  # [B, L * H, D/H]
    keys = torch.cat([layer.keys for layer in layers], dim=1).float()  # [B, L * H, 1 + T, D/H]
    scores = (keys @ queries[..., None])[..., 0] * queries.shape[-1] ** -0.5
    del keys
    weighted = torch.cat([layer.values for layer in layers], dim=1).float()
    weighted *= scores.softmax(-1)[..., None]
    weighted = weighted.transpose(1, 2).flatten(2)  # [B, 1 + T, L * D]
    return (weighted @ seen.permute(0, 2, 1).flatten(0, 1)).transpose(1, 2)


_GELU_SLOPE = (2 / torch.pi) ** 0.5
_GELU_CUBIC = 0.044715


def _centre(x: Tensor) -> Tensor:
    """Subtract the mean of the last dimension."""
    return x - x.mean(-1, keepdim=True)


def _standardize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Subtract the mean of [..., D], and return the deviation [..., 1] that a LayerNorm divides by."""
    centred = _centre(x)
    return centred, (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def _normalize(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps)
