"""The methods to draw heatmaps that `benchmarks.heatmaps` compares, each on one scene at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.saliency import (
    clip_maps_by_head,
    dense,
    last_blocks,
    legrad,
    pool_attention,
    streams,
    trace_tower,
)
from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.files import resolve
from siglip_serve.checkpoint.model_config import ModelConfig
from siglip_serve.embeddings.zero_shot import build_class_embeddings, cosine
from siglip_serve.engine.engines import TextEngine, VisionEngine
from siglip_serve.engine.plan import Plan
from siglip_serve.heatmaps.attribution import ClipExplainer, Explanation, SiglipExplainer
from siglip_serve.texts.tokenizer import load_tokenizer
from siglip_serve.towers.clip import ClipVisionTower
from siglip_serve.towers.load import AnyVisionTower, load_text, load_vision
from siglip_serve.towers.siglip import TowerTrace, VisionTower

__all__ = ["Case", "Maps", "Method", "Model", "Picture", "hide", "methods", "untrained", "windows"]

Picture = NDArray[np.uint8]
Rows = NDArray[np.float32]
Places = NDArray[np.floating[Any]]

# Blocks that LeGrad averages over, as many as the server rolls back by default.
DEFAULT_BLOCKS = 2
# Occlusion: patches per side of a window, and windows per side on small grids and on others.
WINDOW, POSITIONS, MORE_POSITIONS, SMALL_GRID = 3, 8, 12, 12


class Model:
    """A checkpoint: the tower to look into, and engines for the many embeddings.

    Args:
        name: directory or hub id.

    Attributes:
        config: of the checkpoint.
        tower: its vision tower, or one that replaces it.
    """

    def __init__(self, name: str) -> None:
        self.config: ModelConfig = load_config(resolve(name))
        self.tower: AnyVisionTower = load_vision(self.config.path)
        # The engine gets its own tower, since it changes the layout of the weights.
        tower = load_vision(self.config.path)
        self._vision = VisionEngine(tower, self.config.image, Plan("cpu", "float32"))

    @cached_property
    def _text(self) -> TextEngine:
        return TextEngine(load_text(self.config.path), Plan("cpu", "float32"))

    def embed(self, pictures: Picture) -> Rows:
        """uint8 [N, S, S, 3] -> float32 [N, E], not normalised"""
        found = self._vision(pictures).rows(0, len(pictures))
        return np.asarray(found["EMBEDDING"], dtype=np.float32)

    def classes(self, labels: Sequence[str], templates: Sequence[str]) -> Rows:
        """Embed labels as unit vectors [n, E], each the mean over templates."""
        tokenizer = load_tokenizer(self.config)
        ids = [tokenizer(t.replace("{}", label), truncation=True) for label in labels for t in templates]
        found = self._text(np.stack(ids)).rows(0, len(ids))["EMBEDDING"]
        units = build_class_embeddings(np.asarray(found).reshape(len(labels), len(templates), -1))
        return np.asarray(units, dtype=np.float32)

    def case(self, picture: Picture, prompts: Rows, bank: Rows) -> Case:
        """Make a case of a scene [S, S, 3] with vectors [K, E] of its objects and [Q, E] of other things."""
        return Case(self, picture, torch.from_numpy(prompts), torch.from_numpy(bank))


def untrained(model: Model, seed: int) -> Model:
    """Copy a model, with random weights in the tower to look into; its engines keep the checkpoint's."""
    changed = copy.copy(model)
    changed.tower = copy.deepcopy(model.tower)
    with torch.no_grad():
        torch.manual_seed(seed)
        for name, parameter in changed.tower.named_parameters():
            # Inputs of a layer have about unit variance, and so have its outputs.
            fan = parameter[0].numel() if parameter.ndim > 1 else len(parameter)
            parameter.copy_(torch.randn(parameter.shape) * (0 if name.endswith("bias") else fan**-0.5))
        for module in changed.tower.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
    return changed


@dataclass(frozen=True)
class Case:
    """One scene as the methods see it: see `Model.case`."""

    model: Model
    picture: Picture
    prompts: Tensor
    bank: Tensor

    @property
    def side(self) -> int:
        """Patches along one side."""
        vision = self.model.config.vision
        return vision.image_size // vision.patch_size

    @property
    def vectors(self) -> Tensor:
        """[K + Q, E]"""
        return torch.cat([self.prompts, self.bank])

    @property
    def few_vectors(self) -> Tensor:
        """[K + 1, E], for maps that are linear in the vector: the mean of the bank is one vector."""
        return torch.cat([self.prompts, self.bank.mean(0, keepdim=True)])

    @cached_property
    def pixels(self) -> Tensor:
        """[1, 3, S, S], normalised."""
        image = self.model.config.image
        mean, std = (torch.tensor(values)[:, None, None] for values in (image.mean, image.std))
        pixels = torch.from_numpy(self.picture).permute(2, 0, 1) * image.rescale
        return ((pixels - mean) / std)[None]

    @cached_property
    def trace(self) -> TowerTrace:
        """The trace of all blocks."""
        with torch.inference_mode():
            return trace_tower(self.model.tower, self.pixels, len(self.model.tower.encoder.layers))

    @cached_property
    def before(self) -> list[Tensor]:
        """The residual stream before each block."""
        with torch.inference_mode():
            return streams(self.model.tower, self.trace)

    @cached_property
    def embedding(self) -> Tensor:
        """[1, E], as the tower itself pools it."""
        tower, tokens = self.model.tower, self.trace.after
        with torch.inference_mode():
            pooled: Tensor = tower.head(
                tower.post_layernorm(tokens) if isinstance(tower, VisionTower) else tokens
            )
        return pooled

    def last(self, blocks: int) -> TowerTrace:
        """Cut the trace of the last blocks from that of all."""
        return last_blocks(self.trace, self.before, blocks)


@dataclass(frozen=True)
class Maps:
    """Maps that a method finds for a scene.

    Attributes:
        own: [K, h, w], a map per prompt; h and w are those of the patch grid, or of the picture.
        bank: [h, w], the mean over the bank's prompts.
        completeness: largest difference between the sum of a map and the cosine; NaN where maps are not sums.
    """

    own: Places
    bank: Places
    completeness: float = field(default=float("nan"))


@dataclass(frozen=True)
class Method:
    """A way to draw a map.

    Attributes:
        name: as in the table.
        blocks: number of last blocks that it uses; None if it uses none.
        passes: images that the tower runs on for one map.
        find: finds the maps of a scene.
        relative: the part that prompts have in common is subtracted; false where the prompt is ignored.
        perturbed: deletion and insertion are measured.
    """

    name: str
    blocks: int | None
    passes: int
    find: Callable[[Case], Maps]
    relative: bool = True
    perturbed: bool = True


def methods(model: Model, seed: int) -> list[Method]:
    """List the methods that are compared on a model; the curve over the blocks comes first."""
    depth = len(model.tower.encoder.layers)
    siglip = isinstance(model.tower, VisionTower)
    default = min(DEFAULT_BLOCKS, depth) if siglip else depth
    curve = range(0 if siglip else 1, depth + 1)
    found = [Method("ours", k, 1, Ours(model, k), perturbed=k == default) for k in curve]
    last = min(DEFAULT_BLOCKS, depth)
    if siglip:
        found.append(Method("LeGrad, pooler", last, 1, lambda case: _legrad(case, last, "pooler")))
    random_weights = untrained(model, seed)
    ours = Ours(random_weights, default)
    generator = np.random.default_rng(seed)
    return [
        *found,
        Method("LeGrad, blocks", last, 1, lambda case: _legrad(case, last, "blocks")),
        Method("dense", None, 1, _dense),
        Method("occlusion", None, len(windows(model)) + 1, _occlusion),
        Method("pool attention", None, 1, _pool_attention, relative=False),
        Method("ours, untrained", default, 1, lambda case: ours(_as_seen_by(random_weights, case))),
        Method("random", None, 0, lambda case: _random(case, generator), relative=False),
    ]


class Ours:
    """The maps that the server gives, of the last `blocks` blocks."""

    def __init__(self, model: Model, blocks: int) -> None:
        self._blocks, tower = blocks, model.tower
        self._explainer: SiglipExplainer | ClipExplainer
        if isinstance(tower, VisionTower):
            self._explainer = SiglipExplainer(tower, blocks, 2**30)
        else:
            self._explainer = ClipExplainer(tower)

    def __call__(self, case: Case) -> Maps:
        """Find the maps of a scene; see `Method.find`."""
        tower, vectors = case.model.tower, case.few_vectors
        if isinstance(self._explainer, SiglipExplainer):
            found = self._explainer(case.last(self._blocks), vectors)
        elif not isinstance(tower, VisionTower):
            found = self._without_first(self._explainer.explain(tower, case.pixels, vectors), tower, case)
        expected = F.normalize(case.embedding, dim=-1) @ vectors.T
        wrong = (found.maps.sum(-1) + found.unattributed - expected).abs().max()
        maps = _on_grid(case, found.maps[0])
        return Maps(maps[:-1], maps[-1], float(wrong))

    def _without_first(
        self, found: Explanation[Tensor], tower: ClipVisionTower, case: Case
    ) -> Explanation[Tensor]:
        """Move the parts of CLIP's first blocks, which the server places too, to the unattributed rest."""
        first = len(tower.encoder.blocks) - self._blocks
        if not first:
            return found
        moved = clip_maps_by_head(tower, case.trace, case.few_vectors)[:, :, :first].sum((2, 3))  # [B, P, T]
        return Explanation(found.maps - moved, found.unattributed + moved.sum(-1), found.embedding)


def _as_seen_by(model: Model, case: Case) -> Case:
    return Case(model, case.picture, case.prompts, case.bank)


def _legrad(case: Case, blocks: int, of: Any) -> Maps:
    return _split(case, legrad(case.model.tower, case.last(blocks), case.vectors, of)[0])


def _dense(case: Case) -> Maps:
    return _split(case, dense(case.model.tower, case.last(1), case.vectors)[0])


def _pool_attention(case: Case) -> Maps:
    maps = _on_grid(case, pool_attention(case.model.tower, case.last(1)))
    return Maps(np.repeat(maps, len(case.prompts), 0), maps[0])


def _random(case: Case, generator: np.random.Generator) -> Maps:
    maps = generator.random((len(case.prompts) + 1, case.side, case.side), dtype=np.float32)
    return Maps(maps[:-1], maps[-1])


def _occlusion(case: Case) -> Maps:
    """Measure how much the cosine drops when a window is painted over with the picture's mean colour.

    The window stands at evenly spaced places. A pixel gets the mean over the windows that covered it.
    """
    gone, size = windows(case.model), len(case.picture)
    pictures = np.concatenate([case.picture[None], hide(case.picture, gone)])
    cosines = cosine(case.model.embed(pictures), case.vectors.numpy())  # [windows + 1, K + Q]
    drops = (cosines[0] - cosines[1:]).astype(np.float32)
    covered = gone.reshape(len(gone), -1).astype(np.float32)
    maps = (drops.T @ covered / covered.sum(0)).reshape(-1, size, size)
    return Maps(maps[: len(case.prompts)], maps[len(case.prompts) :].mean(0))


def windows(model: Model) -> NDArray[np.bool_]:
    """Make occlusion masks, bool [n, S, S]: windows that overlap by half or more and cover all pixels."""
    vision = model.config.vision
    size, patch = vision.image_size, vision.patch_size
    side = size // patch
    positions = POSITIONS if side <= SMALL_GRID else MORE_POSITIONS
    window = min(max(WINDOW, -(-2 * side // (positions + 1))), side - 1) * patch
    starts = np.rint(np.linspace(0, size - window, positions)).astype(int)
    found = np.zeros((positions, positions, size, size), dtype=bool)
    for row, top in enumerate(starts):
        for column, left in enumerate(starts):
            found[row, column, top : top + window, left : left + window] = True
    return found.reshape(-1, size, size)


def hide(picture: Picture, gone: NDArray[np.bool_]) -> Picture:
    """Copy a picture [S, S, 3] n times, with its mean colour where the mask [n, S, S] is true."""
    color = np.rint(picture.mean((0, 1))).astype(np.uint8)
    return np.asarray(np.where(gone[..., None], color, picture))


def _split(case: Case, maps: Tensor) -> Maps:
    """Split the maps [K + Q, T] of all vectors into those of the prompts and of the bank."""
    places = _on_grid(case, maps)
    return Maps(places[: len(case.prompts)], places[len(case.prompts) :].mean(0))


def _on_grid(case: Case, maps: Tensor) -> Rows:
    """[n, T] -> [n, G, G]"""
    return np.asarray(maps.numpy().reshape(len(maps), case.side, case.side), dtype=np.float32)
