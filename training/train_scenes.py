"""Teach a trained SigLIP to see several things in one picture.

    python -m training.train_scenes --init checkpoints/siglip-tiny --out OUT

Training starts from a checkpoint's weights. Every step shows single drawings, as in `training.train`, and
scenes of two to four of them, each against the names of all trained concepts. The things in a scene are its
positives. No place is ever shown to the model.

The saved weights lie on the line between those at the start and those at the end, near the end. They keep
more of what the start could do ("Robust fine-tuning of zero-shot models", Wortsman et al., arXiv 2109.01903).
"""

import copy
import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.composed import MOST, compose_scenes, draw_scenes, sample_presence
from training.evaluate import class_embeddings, report
from training.loop import descend, run_for
from training.model import Shape, Siglip
from training.optimizers import MovingAverage, optimizers, set_rate
from training.pack import Pack, load_pack
from training.scenes import degrade
from training.tokenizer import Tokenizer
from training.train import DrawingSource, Names, Settings, choose_score

__all__ = ["SceneSettings", "main", "recall", "train_scenes"]

_CHECKED = 1000
_CHECK_SEED = 11


@dataclass(frozen=True)
class SceneSettings:
    """One configuration of a run."""

    shape: Shape
    minutes: float = 7.6
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.1
    singles: int = 1544
    scenes: int = 1024
    warp: float = 0.05
    kept_tokens: float = 0.5
    full_from: float = 0.6
    drop_path: float = 0.05
    head_weight: float = 0.5
    ema: float = 0.9995
    start_share: float = 0.15
    seed: int = 0
    compile: bool = True


class _Run:
    """The state of one run."""

    def __init__(self, pack: Pack, tokenizer: Tokenizer, settings: SceneSettings, init: Path) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = Siglip(settings.shape).to(self.device)
        self.model.load_state_dict(load_file(init / "model.safetensors", str(self.device)))
        self.average = MovingAverage(self.model, settings.ema)
        self.start = {name: value.clone() for name, value in self.model.state_dict().items()}
        trained = np.setdiff1d(np.unique(pack.concept[pack.of_role("train")]), pack.never_trained)
        self.trained = torch.from_numpy(trained).to(self.device)
        self.head = nn.Linear(settings.shape.width, len(trained)).to(self.device)
        self.names = Names(pack, tokenizer, self.device)
        drawing = Settings(shape=settings.shape, warp=settings.warp, seed=settings.seed)
        self.source = DrawingSource(pack, drawing, self.device)
        self.optimizers = optimizers(
            [self.model, self.head], settings.learning_rate, settings.weight_decay, muon=True
        )
        if settings.compile:
            for block in [*self.model.vision_model.encoder.layers, *self.model.text_model.encoder.layers]:
                block.compile(dynamic=False)

    def step(self, progress: float) -> Tensor:
        """One update; `progress` is 0..1. Returns the loss, unread."""
        settings = self.settings
        set_rate(self.optimizers, settings.learning_rate, progress)
        single = torch.randint(len(self.trained), (settings.singles,), device=self.device)
        scenes, shown = self._scenes()
        pictures = torch.cat([self.source.pictures(self.trained[single]), scenes])
        positive = torch.cat([F.one_hot(single, len(self.trained)).bool(), shown])  # [B, C]
        kept = 1.0 if progress > settings.full_from else settings.kept_tokens
        with torch.autocast(self.device.type, torch.bfloat16):
            image = self.model.image(pictures.float() * 2 - 1, kept, settings.drop_path)
            text = self.model.text(self.names.some(self.trained))
        loss = self._loss(image.float(), text.float(), positive)
        descend(loss, [self.model, self.head], self.optimizers)
        self.average.update(self.model)
        return loss.detach()

    def blended(self) -> Siglip:
        """The moving average with its share of the weights at the start, in evaluation mode."""
        model = copy.deepcopy(self.average.model).eval()
        share = self.settings.start_share
        averaged = model.state_dict()
        model.load_state_dict({name: averaged[name].lerp(self.start[name], share) for name in averaged})
        return model

    def _scenes(self) -> tuple[Tensor, Tensor]:
        """Pictures [N, 3, S, S], and bool [N, C]: which trained concepts are in them."""
        random, count = self.source.random, self.settings.scenes
        present = sample_presence(count, random)
        which = torch.randint(len(self.trained), (count, MOST), device=self.device)
        # Styles are dealt out by position, and a scene's drawings are to differ in style.
        order = torch.randperm(count * MOST, device=self.device)
        art, mono = self.source.art(self.trained[which.flatten()[order]])
        back = torch.argsort(order)
        art, mono = art[back].unflatten(0, (count, MOST)), mono[back].unflatten(0, (count, MOST))
        pictures, _ = compose_scenes(art, mono, present, self.settings.shape.image_size, random, 0.18)
        shown = torch.zeros(count, len(self.trained), device=self.device)
        shown.scatter_add_(1, which, present.float())
        return degrade(pictures, random), shown > 0

    def _loss(self, image: Tensor, text: Tensor, positive: Tensor) -> Tensor:
        """SigLIP's loss of [B, D] against [C, D], and a cross-entropy through the head that is not kept."""
        cosine = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
        logits = cosine * self.model.logit_scale.exp() + self.model.logit_bias
        sigmoid = -F.logsigmoid(torch.where(positive, logits, -logits)).sum() / len(image)
        target = positive / positive.sum(1, keepdim=True)
        classified = F.cross_entropy(self.head(image), target, label_smoothing=0.1)
        return sigmoid + self.settings.head_weight * classified


@torch.no_grad()
def recall(model: Siglip, pack: Pack, tokenizer: Tokenizer, role: str) -> float:
    """Share of the objects of drawn scenes whose names are among as many best of all class names.

    Args:
        model: in evaluation mode.
        pack: the art.
        tokenizer: of the model.
        role: of the styles that the scenes are drawn in; outlines are left out.
    """
    device = model.logit_scale.device
    scenes = draw_scenes(pack, _CHECKED, model.shape.image_size, _CHECK_SEED, role)
    text = class_embeddings(model, tokenizer, [pack.concepts[c]["label"] for c in pack.classes])
    embedded = [model.image(part.to(device) * 2 - 1) for part in scenes.pictures.split(250)]
    scores = F.normalize(torch.cat(embedded).float(), dim=1) @ text.T
    position = {concept: number for number, concept in enumerate(pack.classes)}
    found = total = 0
    for row, concepts in zip(scores.cpu(), scenes.concepts.tolist(), strict=True):
        wanted = {position[c] for c in concepts if c >= 0}
        found += len(wanted & set(row.topk(len(wanted)).indices.tolist()))
        total += len(wanted)
    return found / total


def train_scenes(pack: Pack, tokenizer: Tokenizer, settings: SceneSettings, init: Path, out: Path) -> Siglip:
    """Train for `settings.minutes` and return the model; `out` gets it now and then as well."""
    run = _Run(pack, tokenizer, settings, init)

    def save() -> str:
        found = run.blended()
        save_file(
            {name: value.cpu() for name, value in found.state_dict().items()}, out / "model.safetensors"
        )
        singles, scenes = choose_score(found, pack, tokenizer), recall(found, pack, tokenizer, "choose")
        return f"choosing set: singles {singles:.4f}, scenes {scenes:.4f}"

    print(f"{out.name} at the start, {save()}", flush=True)
    run_for(settings.minutes, out.name, run.step, save)
    return run.blended()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, default=Path(".cache/art.npz"), help="what build_data wrote")
    parser.add_argument("--init", type=Path, default=Path("checkpoints/siglip-tiny"), help="begin with these")
    parser.add_argument("--tokenizer", type=Path, default=Path("checkpoints/siglip-tiny/spiece.model"))
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, settings and report")
    parser.add_argument("--set", default="{}", help="JSON object with fields of SceneSettings")
    parser.add_argument("--minutes", type=float, help="time to train for")
    args = parser.parse_args(argv)

    values = json.loads(args.set)
    if args.minutes is not None:
        values["minutes"] = args.minutes
    settings = SceneSettings(shape=Shape(**values.pop("shape", {})), **values)
    pack, tokenizer = load_pack(args.pack), Tokenizer(args.tokenizer, settings.shape.context)
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "settings.json").write_text(json.dumps(asdict(settings), indent=2) + "\n")
    model = train_scenes(pack, tokenizer, settings, args.init, args.out)
    results = report(model, pack, tokenizer) | {"scenes": recall(model, pack, tokenizer, "held-out")}
    (args.out / "report.json").write_text(json.dumps(results, indent=2) + "\n")
    print(args.out.name, "scenes", results["scenes"])


if __name__ == "__main__":
    main()
