"""Train an image tower whose mean patch token tells football kits apart.

    python -m training.train_jerseys --out runs/jersey --minutes 9

Every step draws new kits, each on several players in other light, poses and cameras. A supervised
contrastive loss (Khosla et al., 2020, arXiv 2004.11362) brings crops of one kit together and others apart.
Some kits share all colours, or nearly. Nothing but drawn jerseys is shown. The learning rate falls with time,
not with steps, so that a run ends on time. A moving average is kept.
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.jerseys import WIDE, training_batch
from training.loop import descend, run_for
from training.model import Shape, Siglip
from training.optimizers import MovingAverage, optimizers, set_rate
from training.scenes import Random

__all__ = ["Settings", "contrastive", "main", "train"]

TOWER = "vision_model."
JERSEYS = Shape(image_size=64)  # a jersey is rarely more than 40 pixels high


@dataclass(frozen=True)
class Settings:
    """One configuration of a run."""

    shape: Shape
    minutes: float = 8.7
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    kits: int = 256
    views: int = 8
    temperature: float = 0.1
    head_weight: float = 0.2  # of the same loss on the pooling head's output
    least_height: int = 10  # of a whole player, pixels
    drop_path: float = 0.0
    ema: float = 0.999
    seed: int = 0
    compile: bool = True


def contrastive(embeddings: Tensor, kit: Tensor, temperature: float) -> Tensor:
    """The supervised contrastive loss of [B, D], of which rows of the same kit [B] belong together."""
    unit = F.normalize(embeddings, dim=1)
    logits = (unit @ unit.T) / temperature
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    log_share = logits - logits.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    same = (kit[:, None] == kit) & ~itself
    return -(log_share * same).sum() / same.sum()


class _Run:
    """The state of one training run."""

    def __init__(self, settings: Settings) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.random = Random(settings.seed + 1, self.device)
        self.conditions = replace(WIDE, heights=(settings.least_height, WIDE.heights[1]))
        self.model = Siglip(settings.shape).to(self.device)
        tower: nn.Module = self.model.vision_model  # the text tower stays as it is, and is not saved
        self.average = MovingAverage(self.model, settings.ema)
        self.optimizers = optimizers([tower], settings.learning_rate, settings.weight_decay, muon=True)
        if settings.compile:
            for block in self.model.vision_model.encoder.layers:
                block.compile(dynamic=False)

    def step(self, progress: float) -> Tensor:
        """One update; `progress` is 0..1. Returns the loss, unread."""
        settings = self.settings
        set_rate(self.optimizers, settings.learning_rate, progress)
        size = settings.shape.image_size
        pixels, kit = training_batch(settings.kits, settings.views, self.random, size, self.conditions)
        with torch.autocast(self.device.type, torch.bfloat16):
            mean, pooled = self.model.image_means(pixels.float() * 2 - 1, settings.drop_path)
        loss = contrastive(mean.float(), kit, settings.temperature)
        loss = loss + settings.head_weight * contrastive(pooled.float(), kit, settings.temperature)
        descend(loss, [self.model.vision_model], self.optimizers)
        self.average.update(self.model)
        return loss.detach()


def train(settings: Settings, out: Path) -> Siglip:
    """Train for `settings.minutes` and return the averaged model; `out` gets its image tower now and then."""
    run = _Run(settings)

    def save() -> str:
        run.average.save(out / "model.safetensors", TOWER)
        return ""

    steps = run_for(settings.minutes, out.name, run.step, save)
    crops = steps * settings.kits * settings.views
    (out / "run.json").write_text(json.dumps({"steps": steps, "crops": crops}) + "\n")
    return run.average.model


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and settings")
    parser.add_argument("--set", default="{}", help="JSON object with fields of Settings")
    parser.add_argument("--minutes", type=float, help="time to train for")
    args = parser.parse_args(argv)

    values = json.loads(args.set)
    settings = Settings(shape=replace(JERSEYS, **values.pop("shape", {})), **values)
    if args.minutes is not None:
        settings = replace(settings, minutes=args.minutes)
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "settings.json").write_text(json.dumps(asdict(settings), indent=2) + "\n")
    train(settings, args.out)


if __name__ == "__main__":
    main()
