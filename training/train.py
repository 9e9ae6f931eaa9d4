"""Train the small SigLIP on drawings.

    python -m training.train --pack .cache/art.npz --tokenizer spiece.model --out OUT --minutes 12

Every step shows each trained concept twice, drawn in two random ways, against the names of all trained
concepts. The loss is SigLIP's sigmoid loss plus a cross-entropy through a linear head that is dropped at
saving. The learning rate falls with time, not with steps, so that a run ends on time. A moving average is
kept.
"""

import json
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.evaluate import class_embeddings, report, zero_shot
from training.loop import descend, run_for
from training.model import Shape, Siglip
from training.optimizers import MovingAverage, optimizers, set_rate
from training.pack import Pack, load_pack, premultiplied
from training.scenes import (
    Random,
    art_brightness,
    deform,
    degrade,
    elastic,
    ink_first,
    place,
    restyle,
    sample_placement,
)
from training.tokenizer import Tokenizer, variants

__all__ = [
    "SOURCES",
    "DrawingSource",
    "ImageSource",
    "Names",
    "Settings",
    "choose_score",
    "main",
    "train",
]

GROUPS_THAT_MAY_FACE_EITHER_WAY = {3, 4, 5, 7}


@dataclass(frozen=True)
class Settings:
    """One configuration of a run."""

    shape: Shape
    minutes: float = 12.4
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    views: int = 2
    concepts_a_step: int = 0  # 0: all
    restyle: float = 1.0
    warp: float = 0.05
    kept_tokens: float = 0.5
    full_from: float = 0.7
    drop_path: float = 0.05
    head_weight: float = 1.0
    muon: bool = True
    ema: float = 0.9995
    seed: int = 0
    compile: bool = True


class ImageSource(Protocol):
    """Something that shows concepts. Register one in `SOURCES` to train on further kinds of images."""

    def pictures(self, concepts: Tensor) -> Tensor:
        """int64 [B] of trained concepts -> RGB 0..1 [B, 3, S, S], on the device of `concepts`."""
        ...


def _weights(pack: Pack, drawings: Sequence[int]) -> list[float]:
    """Frequencies at which one concept's drawings are shown: vendors before icon sets, near-twins share."""
    light = {"noto-mono-300": 0.4, "noto-mono-500": 0.4, "noto-mono-700": 0.4, "unifont": 0.5, "dinkie": 0.6}
    styles = [pack.styles[int(pack.style[n])] for n in drawings]
    icons = sum(style["kind"] == "icons" for style in styles)
    each_icon = min(0.5, 2.5 / max(1, icons))
    return [
        each_icon if s["kind"] == "icons" else light.get(s["name"], 1.0 if s["mono"] else 1.5) for s in styles
    ]


class DrawingSource:
    """Packed drawings in random styles, restyled, placed and degraded."""

    def __init__(self, pack: Pack, settings: Settings, device: torch.device) -> None:
        chosen = pack.of_role("train")
        chosen = chosen[~np.isin(pack.concept[chosen], pack.never_trained)]
        self.settings = settings
        self.random = Random(settings.seed, device, torch.float16 if device.type == "cuda" else torch.float32)
        self.rgba = pack.rgba(chosen, workers=16).to(device)
        self.mono = pack.mono(chosen).to(device)
        by_concept: list[list[int]] = [[] for _ in pack.concepts]
        for row, drawing in enumerate(chosen):
            by_concept[int(pack.concept[drawing])].append(row)
        most = max(len(rows) for rows in by_concept)
        table = np.zeros((len(by_concept), most), np.int64)
        cumulative = np.full((len(by_concept), most), 2.0, np.float32)
        for concept, rows in enumerate(by_concept):
            if rows:
                weights = np.cumsum(_weights(pack, [int(chosen[row]) for row in rows]))
                table[concept, : len(rows)] = rows
                cumulative[concept, : len(rows)] = weights / weights[-1]
        self.table = torch.from_numpy(table).to(device)
        self.cumulative = torch.from_numpy(cumulative).to(device)
        either = [
            c["group"] in GROUPS_THAT_MAY_FACE_EITHER_WAY and not {"left", "right"} & set(c["label"].split())
            for c in pack.concepts
        ]
        self.either_way = torch.tensor(either, device=device)
        self.shown = sorted({int(pack.concept[drawing]) for drawing in chosen})

    def _draw(self, concepts: Tensor) -> Tensor:
        point = torch.rand(len(concepts), 1, generator=self.random.generator, device=concepts.device)
        column = (point >= self.cumulative[concepts]).sum(1)
        return self.table[concepts, column.clamp(max=self.table.shape[1] - 1)]

    def art(self, concepts: Tensor) -> tuple[Tensor, Tensor]:
        """Restyled drawings of concepts [B] in random order: [B, 4, S, S], and which get an ink."""
        random = self.random
        rows = self._draw(concepts)
        art, mono = premultiplied(self.rgba[rows], random.dtype), self.mono[rows]
        flip = self.either_way[concepts] & random.chance(0.2, len(rows))
        art = torch.where(flip[:, None, None, None], art.flip(3), art)
        art, mono = ink_first(art, mono, random)
        return restyle(art, mono, self.settings.restyle, random)

    def pictures(self, concepts: Tensor) -> Tensor:
        """Pictures of concepts, as in `ImageSource`. The batch is taken to be in random order."""
        random, settings = self.random, self.settings
        art, mono = self.art(concepts)
        canvas = settings.shape.image_size
        placement = sample_placement(art_brightness(art), mono, canvas, random, rotation=0.18)
        warp = elastic(len(art), canvas, settings.warp, random)
        placed = place(art, mono, deform(placement, 0.07, random), warp)
        return degrade(placed, random)


SOURCES: dict[str, Callable[[Pack, Settings, torch.device], ImageSource]] = {"drawings": DrawingSource}


class Names:
    """Ways of naming each concept, tokenised once: a random one of each at every step."""

    def __init__(self, pack: Pack, tokenizer: Tokenizer, device: torch.device, count: int = 48) -> None:
        aliases = [alias for concept in pack.concepts for alias in concept["aliases"]]
        shared = {alias for alias in aliases if aliases.count(alias) > 1}
        rows = []
        for concept in pack.concepts:
            own = [alias for alias in concept["aliases"][1:] if alias not in shared and alias.isascii()]
            rows.append(tokenizer(variants(concept["label"], own, count, seed=0)))
        self.ids = torch.from_numpy(np.stack(rows).astype(np.int32)).to(device)

    def some(self, concepts: Tensor) -> Tensor:
        """Token ids [B, context] of a random name of each concept [B]."""
        which = torch.randint(self.ids.shape[1], (len(concepts),), device=concepts.device)
        return self.ids[concepts, which].long()


def _loss(
    model: Siglip,
    head: Callable[[Tensor], Tensor],
    image: Tensor,
    text: Tensor,
    target: Tensor,
    head_weight: float,
) -> Tensor:
    """SigLIP's loss of [B, D] against [C, D] where picture b shows text target[b], plus the head's."""
    cosine = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    logits = cosine * model.logit_scale.exp() + model.logit_bias
    sign = torch.full_like(logits, -1.0).scatter_(1, target[:, None], 1.0)
    sigmoid = -F.logsigmoid(sign * logits).sum() / len(image)
    return sigmoid + head_weight * F.cross_entropy(head(image), target, label_smoothing=0.1)


def choose_score(model: Siglip, pack: Pack, tokenizer: Tokenizer) -> float:
    """Zero-shot top-1 on the drawings that are only for choosing between runs."""
    model.eval()
    text = class_embeddings(model, tokenizer, [pack.concepts[c]["label"] for c in pack.classes])
    style = next(s["name"] for s in pack.styles if s["role"] == "choose")
    return zero_shot(model, pack, text, style, placed=True)["trained"]["top1"]


class _Run:
    """The state of one training run."""

    def __init__(self, pack: Pack, tokenizer: Tokenizer, settings: Settings, source: ImageSource) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.source = settings, source
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = Siglip(settings.shape).to(self.device)
        self.average = MovingAverage(self.model, settings.ema)
        trained = np.setdiff1d(np.unique(pack.concept[pack.of_role("train")]), pack.never_trained)
        self.trained = torch.from_numpy(trained).to(self.device)
        self.head = nn.Linear(settings.shape.width, len(trained)).to(self.device)
        self.names = Names(pack, tokenizer, self.device)
        self.optimizers = optimizers(
            [self.model, self.head], settings.learning_rate, settings.weight_decay, settings.muon
        )
        if settings.compile:
            for block in [*self.model.vision_model.encoder.layers, *self.model.text_model.encoder.layers]:
                block.compile(dynamic=False)

    def step(self, progress: float) -> Tensor:
        """One update; `progress` is 0..1. Returns the loss, unread."""
        settings = self.settings
        set_rate(self.optimizers, settings.learning_rate, progress)
        count = settings.concepts_a_step or len(self.trained)
        shown = torch.randperm(len(self.trained), device=self.device)[:count]
        target = torch.arange(count, device=self.device).repeat(settings.views)
        target = target[torch.randperm(len(target), device=self.device)]
        pixels = self.source.pictures(self.trained[shown][target]).float() * 2 - 1
        kept = 1.0 if progress > settings.full_from else settings.kept_tokens
        with torch.autocast(self.device.type, torch.bfloat16):
            image = self.model.image(pixels, kept, settings.drop_path)
            text = self.model.text(self.names.some(self.trained[shown]))
        weight, bias = self.head.weight[shown], self.head.bias[shown]
        head = partial(F.linear, weight=weight, bias=bias)
        loss = _loss(self.model, head, image.float(), text.float(), target, settings.head_weight)
        descend(loss, [self.model, self.head], self.optimizers)
        self.average.update(self.model)
        return loss.detach()


def train(pack: Pack, tokenizer: Tokenizer, settings: Settings, source: ImageSource, out: Path) -> Siglip:
    """Train for `settings.minutes` and return the averaged model; `out` gets it now and then as well."""
    run = _Run(pack, tokenizer, settings, source)

    def save() -> str:
        run.average.save(out / "model.safetensors")
        return f"choosing set {choose_score(run.average.model, pack, tokenizer):.4f}"

    run_for(settings.minutes, out.name, run.step, save)
    return run.average.model


def _settings(args: Namespace) -> Settings:
    values = json.loads(args.config.read_text()) if args.config else {}
    values |= json.loads(args.set)
    shape = Shape(**values.pop("shape", {}))
    if args.minutes is not None:
        values["minutes"] = args.minutes
    return Settings(shape=shape, **values)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, default=Path(".cache/art.npz"), help="what build_data wrote")
    parser.add_argument("--tokenizer", type=Path, default=Path("checkpoints/siglip-tiny/spiece.model"))
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, settings and report")
    parser.add_argument("--config", type=Path, help="JSON file with fields of Settings")
    parser.add_argument("--set", default="{}", help="JSON object with fields of Settings, over --config")
    parser.add_argument("--minutes", type=float, help="time to train for; overrides the configuration")
    parser.add_argument("--source", choices=sorted(SOURCES), default="drawings")
    args = parser.parse_args(argv)

    settings, pack = _settings(args), load_pack(args.pack)
    tokenizer = Tokenizer(args.tokenizer, settings.shape.context)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = SOURCES[args.source](pack, settings, device)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "settings.json").write_text(json.dumps(asdict(settings), indent=2) + "\n")
    model = train(pack, tokenizer, settings, source, args.out)
    results = report(model, pack, tokenizer)
    (args.out / "report.json").write_text(json.dumps(results, indent=2) + "\n")
    print(args.out.name, {style: numbers["trained"]["top1"] for style, numbers in results["placed"].items()})


if __name__ == "__main__":
    main()
