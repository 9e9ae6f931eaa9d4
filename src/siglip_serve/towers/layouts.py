"""Names and shapes that the programs which write checkpoints give to a tower's parameters.

Three layouts, told apart by the names of the tensors:

- transformers: query, key and value apart. A checkpoint of both towers has `vision_model.` and `text_model.`
  in front. That of one tower has nothing there, or, with a projection or from transformers 4, the same.
- open_clip's own towers: query, key and value in one tensor, projections transposed.
- open_clip's image towers from timm (SigLIP's): the same in timm's words, the pooling's query apart.

Each layout maps a parameter of ours to the tensors that it is made of, so that errors name what is missing or
unexpected in the words of the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Layout", "Part", "Side", "find_layout"]

Side = Literal["vision", "text"]
_SCALES = ("logit_scale", "logit_bias")
_PREFIXES: Mapping[Side, str] = {"vision": "vision_model.", "text": "text_model."}
_PROJECTIONS: Mapping[Side, str] = {"vision": "visual_projection.", "text": "text_projection."}
# Replacements in order. The first that fits a name is final, except that of the blocks.
_BLOCKS = {"encoder.layers.": "transformer.resblocks."}
_OPEN_CLIP = {
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".self_attn.qkv_proj.": ".attn.in_proj_",
    ".self_attn.": ".attn.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.": "conv1.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.": "token_embedding.",
    "pre_layrnorm.": "ln_pre.",
    "post_layernorm.": "ln_post.",
    "final_layer_norm.": "ln_final.",
    "head.": "text_projection.",
}
_TIMM_BLOCKS = {"encoder.layers.": "blocks."}
_TIMM = {
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
    ".self_attn.qkv_proj.": ".attn.qkv.",
    ".self_attn.out_proj.": ".attn.proj.",
    "embeddings.patch_embedding.": "patch_embed.proj.",
    "embeddings.position_embedding.weight": "pos_embed",
    "post_layernorm.": "norm.",
    "head.probe": "attn_pool.latent",
    "head.attention.out_proj.": "attn_pool.proj.",
    "head.layernorm.": "attn_pool.norm.",
    "head.mlp.": "attn_pool.mlp.",
}


@dataclass(frozen=True)
class Part:
    """A tensor that a parameter is made of. Several are put below each other.

    Attributes:
        name: in the file.
        shape: in the file.
        transposed: the file has rows and columns the other way round.
    """

    name: str
    shape: list[int]
    transposed: bool = False


class Layout:
    """The layout of one tower of a checkpoint.

    Args:
        side: which tower.
        prefix: what the tower's names begin with.
    """

    def __init__(self, side: Side, prefix: str) -> None:
        self._side, self._prefix = side, prefix

    def parts(self, name: str, shape: Sequence[int]) -> list[Part]:
        """List the tensors that a parameter of our tower, of this shape, is made of."""
        rows, *columns = shape
        if name.startswith("projection."):
            return [Part(name.replace("projection.", self._projection, 1), list(shape))]
        if ".qkv_proj." in name:
            return [
                Part(self._prefix + name.replace("qkv_proj", f"{part}_proj"), [rows // 3, *columns])
                for part in "qkv"
            ]
        return [Part(self._prefix + name, list(shape))]

    def foreign(self, name: str) -> bool:
        """Return True for a tensor that belongs to the other tower or to the scores."""
        if name in _SCALES:
            return True
        if not self._prefix:
            return False
        other: Side = "text" if self._side == "vision" else "vision"
        return name.startswith((_PREFIXES[other], _PROJECTIONS[other]))

    @property
    def _projection(self) -> str:
        return _PROJECTIONS[self._side]


class _OpenClip(Layout):
    """Towers of open_clip itself. A text tower's names begin with `text.` or with nothing."""

    def parts(self, name: str, shape: Sequence[int]) -> list[Part]:
        """List the tensors that a parameter of our tower, of this shape, is made of."""
        if name == "projection.weight":
            theirs = "proj" if self._side == "vision" else "text_projection"
            return [Part(self._prefix + theirs, list(reversed(shape)), transposed=True)]
        return [Part(self._prefix + _replaced(name, _BLOCKS, _OPEN_CLIP), list(shape))]

    def foreign(self, name: str) -> bool:
        """Return True for a tensor that belongs to the other tower or to the scores."""
        of_vision = name.startswith("visual.")
        return name in _SCALES or of_vision != (self._side == "vision")


class _Timm(_OpenClip):
    """Image towers that open_clip takes from timm."""

    def parts(self, name: str, shape: Sequence[int]) -> list[Part]:
        """List the tensors that a parameter of our tower, of this shape, is made of."""
        rows, *columns = shape
        if name.startswith("head.attention.in_proj_"):
            kind = name.removeprefix("head.attention.in_proj_")
            query, both = f"{self._prefix}attn_pool.q.{kind}", f"{self._prefix}attn_pool.kv.{kind}"
            return [Part(query, [rows // 3, *columns]), Part(both, [rows // 3 * 2, *columns])]
        theirs = self._prefix + _replaced(name, _TIMM_BLOCKS, _TIMM)
        return [Part(theirs, [1, *shape] if theirs.endswith("pos_embed") else list(shape))]


def find_layout(names: Iterable[str], side: Side) -> Layout:
    """Find the layout of a tower by the plain names of a checkpoint's tensors."""
    names = list(names)
    if any(name.startswith("visual.") for name in names):
        if side == "text":
            return _OpenClip(side, "text." if any(name.startswith("text.") for name in names) else "")
        if any(name.startswith("visual.trunk.") for name in names):
            return _Timm(side, "visual.trunk.")
        return _OpenClip(side, "visual.")
    outer = (*_PREFIXES.values(), *_PROJECTIONS.values())
    return Layout(side, _PREFIXES[side] if any(name.startswith(outer) for name in names) else "")


def _replaced(name: str, blocks: Mapping[str, str], words: Mapping[str, str]) -> str:
    for ours, theirs in blocks.items():
        name = name.replace(ours, theirs, 1)
    for ours, theirs in words.items():
        if ours in name if ours.startswith(".") else name.startswith(ours):
            return name.replace(ours, theirs, 1)
    return name
