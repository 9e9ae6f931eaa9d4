"""Measure how well heatmaps find the objects of composed scenes whose places are known to the pixel.

    python -m benchmarks.heatmaps --output benchmarks/results/heatmaps.csv --sheets build/heatmaps

Methods that draw a map of a prompt:

    ours             the maps that the server gives, for every number of last blocks
    ours, untrained  the maps of a tower with random weights, which show what the method invents
    occlusion        the drop of the cosine when a window is hidden; 64 windows, 144 on large grids
    LeGrad, pooler   gradients by the pooling head's attention, as the authors do for SigLIP; last 2 blocks
    LeGrad, blocks   gradients by the blocks' self-attention; last 2 blocks
    dense            the cosine of each patch alone, as MaskCLIP
    pool attention   the attention of the pooling head, whatever the prompt
    random           noise

Maps are relative, as the server's are: to the mean over the scene's prompts (`scene`), or to the mean over a
bank of other things (`many`). Maps that ignore the prompt are not relative. A prompt is the mean over the
templates that the offline benchmark uses.

Metrics, each the mean over scenes with its bootstrapped 95 % interval:

    pointing     the highest pixel is the object's
    ap           average precision of the pixels
    iou          mean intersection over union of object and background, at the mean of the clipped map
    contrast     a prompt's map is higher inside its object than another prompt's map is there
    deletion     area under the relative cosine while patches are removed, the highest first: low is good
    insertion    area while patches are added on the mean colour, the highest first: high is good

Deletion and insertion are measured on the first `--perturbed` scenes, with maps relative to the scene. Their
score is the trained tower's cosine with the prompt minus the mean over the scene's prompts, so a map that is
the same for all prompts gets 0. `completeness` is the largest difference between the cosine and the sum of a
map with its unattributed rest. Only `ours` adds up.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tqdm import tqdm

from benchmarks.heatmap_methods import Case, Maps, Method, Model, Picture, hide, methods
from benchmarks.records import about, write_csv
from siglip_serve.embeddings.zero_shot import cosine
from siglip_serve.heatmaps.picture import View, normalize, overlay
from training.composed import Scenes, draw_scenes
from training.pack import load_pack
from training.tokenizer import PROMPTS
from validate.measures import localization

__all__ = ["METRICS", "Scene", "Setup", "collect", "main", "measure", "prepare", "summary"]

PACKAGES = ("torch", "openvino", "numpy")
METRICS = ("pointing", "ap", "iou", "contrast", "deletion", "insertion")
BANK = 16
STEPS = 6

Rows = NDArray[np.float32]
Key = tuple[str, str, str]  # method, blocks, prompts


@dataclass(frozen=True)
class Scene:
    """One picture with its objects, each of another kind.

    Attributes:
        picture: [S, S, 3].
        masks: [K, S, S], at least one pixel each.
        concepts: [K].
    """

    picture: Picture
    masks: NDArray[np.bool_]
    concepts: tuple[int, ...]


@dataclass(frozen=True)
class Setup:
    """Model, methods and vectors that all scenes are measured with.

    Attributes:
        units: unit vectors of the concepts that occur.
        bank: [Q, E].
    """

    model: Model
    ways: list[Method]
    units: dict[int, Rows]
    bank: Rows

    def case(self, scene: Scene) -> Case:
        """Make the case of a scene, which methods take."""
        return self.model.case(scene.picture, np.stack([self.units[c] for c in scene.concepts]), self.bank)

    def place(self, maps: NDArray[np.floating[Any]]) -> Rows:
        """Enlarge maps [n, h, w] to all pixels, [n, S, S]."""
        vision = self.model.config.vision
        size = vision.image_size
        if maps.shape[1:] == (size, size):
            return np.asarray(maps, dtype=np.float32)
        covered = vision.grid_size * vision.patch_size / size
        view = View(size, size, (0.0, 0.0, float(size), float(size)), covered)
        return view.place(np.asarray(maps, dtype=np.float32), size, size)


def read(scenes: Scenes) -> list[Scene]:
    """Keep scenes in which at least two kinds of objects are visible, and join the places of one kind."""
    found = []
    masks_of, concepts_of = scenes.masks.numpy(), scenes.concepts.numpy()
    pictures = np.rint(scenes.pictures.numpy() * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    for picture, masks, concepts in zip(pictures, masks_of, concepts_of, strict=True):
        places = {int(c): masks[concepts == c].any(axis=0) for c in np.unique(concepts) if c >= 0}
        seen = {concept: mask for concept, mask in places.items() if mask.any()}
        if len(seen) > 1:
            found.append(Scene(picture, np.stack(list(seen.values())), tuple(seen)))
    return found


def prepare(
    model: Model, scenes: Sequence[Scene], labels: Sequence[str], others: Sequence[int], seed: int
) -> Setup:
    """Embed the concepts of the scenes, and a bank of `BANK` of the concepts `others`."""
    bank = np.random.default_rng(seed).choice(others, min(BANK, len(others)), replace=False)
    wanted = sorted({concept for scene in scenes for concept in scene.concepts} | set(bank.tolist()))
    vectors = model.classes([labels[concept] for concept in wanted], PROMPTS)
    units = dict(zip(wanted, vectors, strict=True))
    return Setup(model, methods(model, seed), units, np.stack([units[concept] for concept in bank.tolist()]))


def measure(setup: Setup, scene: Scene, perturbed: bool) -> dict[Key, dict[str, float]]:
    """Measure every method on one scene; the numbers are means over its objects."""
    case, rows = setup.case(scene), {}
    curves = Perturbation(setup.model, case) if perturbed else None
    for way in setup.ways:
        maps = way.find(case)
        contrast = localization.pairwise_contrast(setup.place(maps.own), scene.masks)
        for prompts, relative in variants(way, maps).items():
            placed = setup.place(relative)
            pairs = list(zip(placed, scene.masks, strict=True))
            numbers = {
                "pointing": float(np.mean([localization.pointing_game(*pair) for pair in pairs])),
                "ap": float(np.mean([localization.average_precision(*pair) for pair in pairs])),
                "iou": float(np.mean([localization.mean_iou(*pair) for pair in pairs])),
                "contrast": contrast,
                "deletion": float("nan"),
                "insertion": float("nan"),
                "completeness": maps.completeness,
            }
            if curves and way.perturbed and prompts != "many":
                numbers["deletion"], numbers["insertion"] = curves(relative)
            rows[way.name, "" if way.blocks is None else str(way.blocks), prompts] = numbers
    return rows


def variants(way: Method, maps: Maps) -> dict[str, NDArray[np.floating[Any]]]:
    """Make maps relative to the scene's prompts and to the bank, unless they ignore the prompt."""
    if not way.relative:
        return {"": maps.own}
    return {"scene": maps.own - maps.own.mean(0), "many": maps.own - maps.bank}


class Perturbation:
    """Scores of a scene while its patches are removed or added."""

    def __init__(self, model: Model, case: Case) -> None:
        self._model, self._case = model, case
        size = len(case.picture)
        ends = np.concatenate([case.picture[None], hide(case.picture, np.ones((1, size, size), dtype=bool))])
        self._whole, self._empty = self._scores(ends)

    def __call__(self, maps: NDArray[np.floating[Any]]) -> tuple[float, float]:
        """Measure the areas of deletion and insertion of maps [K, h, w], means over the K prompts."""
        areas = []
        for prompt, scores in enumerate(self._patches(maps)):
            gone = self._pixels(localization.removal_steps(scores, STEPS)[1:-1])
            pictures = np.concatenate([hide(self._case.picture, gone), hide(self._case.picture, ~gone)])
            found = self._scores(pictures)[:, prompt]
            whole, empty = self._whole[prompt : prompt + 1], self._empty[prompt : prompt + 1]
            deleted = np.concatenate([whole, found[: len(gone)], empty])
            inserted = np.concatenate([empty, found[len(gone) :], whole])
            areas.append([localization.area_under_curve(curve) for curve in (deleted, inserted)])
        deletion, insertion = np.mean(areas, axis=0).tolist()
        return deletion, insertion

    def _scores(self, pictures: Picture) -> Rows:
        """[n, K], minus the mean over the prompts."""
        cosines = cosine(self._model.embed(pictures), self._case.prompts.numpy())
        return np.asarray(cosines - cosines.mean(axis=1, keepdims=True), dtype=np.float32)

    def _patches(self, maps: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """Average maps over each patch, [K, G, G]."""
        side, patch = self._case.side, self._model.config.vision.patch_size
        if maps.shape[1] == side:
            return maps
        whole = maps[:, : side * patch, : side * patch].reshape(len(maps), side, patch, side, patch)
        means: NDArray[np.floating[Any]] = whole.mean(axis=(2, 4))
        return means

    def _pixels(self, gone: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """[n, G, G] -> [n, S, S]. Pixels outside whole patches, which the tower does not see, are gone."""
        patch, size = self._model.config.vision.patch_size, len(self._case.picture)
        pixels = np.ones((len(gone), size, size), dtype=bool)
        whole = gone.repeat(patch, axis=1).repeat(patch, axis=2)
        pixels[:, : whole.shape[1], : whole.shape[2]] = whole
        return pixels


def collect(setup: Setup, scenes: Sequence[Scene], perturbed: int, seed: int) -> list[dict[str, str]]:
    """Measure all scenes; one row of the table per method and kind of relative map."""
    found: dict[Key, list[dict[str, float]]] = {}
    for number, scene in enumerate(tqdm(scenes, unit="scene", disable=None)):
        for key, numbers in measure(setup, scene, number < perturbed).items():
            found.setdefault(key, []).append(numbers)
    passes = {way.name: way.passes for way in setup.ways}
    counts = {
        "checkpoint": setup.model.config.path.name,
        "scenes": str(len(scenes)),
        "objects": str(sum(len(scene.concepts) for scene in scenes)),
        "perturbed": str(min(perturbed, len(scenes))),
    }
    return [
        counts
        | {"method": key[0], "blocks": key[1], "prompts": key[2], "passes": str(passes[key[0]])}
        | _columns(numbers, seed)
        for key, numbers in found.items()
    ]


def _columns(numbers: Sequence[dict[str, float]], seed: int) -> dict[str, str]:
    columns: dict[str, str] = {}
    for name in METRICS:
        values = np.array([each[name] for each in numbers])
        known = values[np.isfinite(values)]
        low, high = localization.bootstrap_interval(values, seed=seed)
        mean = known.mean() if known.size else float("nan")
        columns |= {name: _text(mean), f"{name}_low": _text(low), f"{name}_high": _text(high)}
    wrong = max(each["completeness"] for each in numbers)
    return columns | {"completeness": "" if np.isnan(wrong) else f"{wrong:.1e}"}


def _text(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.4f}"


def summary(rows: Sequence[dict[str, str]]) -> str:
    """Format the rows as a table with one column per metric."""
    lines = [f"{'method':18s}{'blocks':>7s}{'prompts':>9s}" + "".join(f"{name:>11s}" for name in METRICS)]
    for row in rows:
        cells = "".join(f"{row[name] or '-':>11s}" for name in METRICS)
        lines.append(f"{row['method']:18s}{row['blocks']:>7s}{row['prompts']:>9s}{cells}")
    return "\n".join(lines)


def sheet(setup: Setup, scene: Scene, names: Sequence[str]) -> Image.Image:
    """Draw a scene with the maps of every method relative to the scene's prompts, one row per object."""
    case, picture, tile = setup.case(scene), Image.fromarray(scene.picture), 144
    seen = np.ones(scene.masks.shape[1:], dtype=bool)
    shown = [way for way in setup.ways if way.perturbed]
    page = Image.new("RGB", ((len(shown) + 1) * tile, len(names) * (tile + 14) + 14), "white")
    draw = ImageDraw.Draw(page)
    for column, way in enumerate([None, *shown]):
        if way is None:
            images = [overlay(picture, mask.astype(np.float32), seen, "cividis", 0.6) for mask in scene.masks]
        else:
            placed = setup.place(next(iter(variants(way, way.find(case)).values())))
            images = [overlay(picture, heat, seen) for heat in normalize(placed, "prompt")]
        draw.text((column * tile + 2, 1), way.name if way else "where it is", fill="black")
        for row, (image, name) in enumerate(zip(images, names, strict=True)):
            top = 14 + row * (tile + 14)
            page.paste(image.resize((tile, tile), Image.Resampling.NEAREST), (column * tile, top))
            if way is None:
                draw.text((2, top + tile), name, fill="black")
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see --help."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--checkpoint", default="checkpoints/siglip-tiny", help="directory or hub id (default: %(default)s)")
    add("--pack", type=Path, default=Path(".cache/art.npz"), help="drawings (default: %(default)s)")
    add("--scenes", type=int, default=500, metavar="N", help="how many (default: %(default)s)")
    add("--perturbed", type=int, default=60, metavar="N", help="with deletion and insertion (%(default)s)")
    add("--seed", type=int, default=0, help="seed of scenes, bank and random weights (%(default)s)")
    add("--output", type=Path, help="the .csv file to write")
    add("--append", action="store_true", help="keep the rows that --output has")
    add("--sheets", type=Path, help="folder for pictures of the first scenes with all maps")
    add("--threads", type=int, default=1, help="threads of the traced tower; large ones gain by more (1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, pack = Model(options.checkpoint), load_pack(options.pack)
    canvas = model.config.vision.image_size
    scenes = read(draw_scenes(pack, options.scenes, canvas, options.seed, role="held-out"))
    labels = [concept["label"] for concept in pack.concepts]
    setup = prepare(model, scenes, labels, pack.classes, options.seed)
    rows = collect(setup, scenes, options.perturbed, options.seed)
    print(summary(rows))
    if options.output:
        write_csv(options.output, [about(PACKAGES) | row for row in rows], options.append)
    if options.sheets:
        options.sheets.mkdir(parents=True, exist_ok=True)
        for number, scene in enumerate(scenes[:8]):
            page = sheet(setup, scene, [labels[concept] for concept in scene.concepts])
            page.save(options.sheets / f"scene_{number}.png")


if __name__ == "__main__":
    main()
