"""Zero-shot accuracy of a model in training, without files in between; `measure` reads files."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.model import Siglip
from training.pack import Pack, premultiplied
from training.scenes import Random, compose, plain
from training.tokenizer import PROMPTS, Tokenizer

__all__ = ["class_embeddings", "report", "zero_shot"]

PLACEMENTS = 4


@dataclass(frozen=True)
class _Views:
    pictures: Tensor  # uint8 [n, 3, S, S]
    label: Tensor  # int64 [n], position in pack.classes


def _views(pack: Pack, style: str, canvas: int, seed: int, placements: int) -> _Views:
    """Pictures of one style's drawings of the classes, centred on white if `placements` is 0."""
    position = {concept: number for number, concept in enumerate(pack.classes)}
    drawings = pack.of_style(style)
    drawings = drawings[np.isin(pack.concept[drawings], pack.classes)]
    art, mono = premultiplied(pack.rgba(drawings)), pack.mono(drawings)
    random = Random(seed)
    if placements:
        pictures = torch.cat([compose(art, mono, canvas, random) for _ in range(placements)])
    else:
        pictures = plain(art, mono, canvas)
    label = torch.tensor([position[int(concept)] for concept in pack.concept[drawings]])
    return _Views((pictures * 255).round().to(torch.uint8), label.repeat(max(1, placements)))


def _device(model: Siglip) -> torch.device:
    return model.logit_scale.device


@torch.no_grad()
def _embed(model: Siglip, pictures: Tensor) -> Tensor:
    device = _device(model)
    parts = []
    for part in pictures.split(1024):
        pixels = part.to(device).float() / 127.5 - 1
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            parts.append(F.normalize(model.image(pixels).float(), dim=1))
    return torch.cat(parts)


@torch.no_grad()
def class_embeddings(
    model: Siglip, tokenizer: Tokenizer, labels: Sequence[str], prompts: Sequence[str] = PROMPTS
) -> Tensor:
    """Mean over prompts of each label's normalised embedding, normalised again: [labels, width]."""
    total = torch.zeros(len(labels), model.shape.width, device=_device(model))
    for prompt in prompts:
        ids = torch.from_numpy(tokenizer([prompt.format(label) for label in labels])).to(_device(model))
        total += F.normalize(torch.cat([model.text(part) for part in ids.split(512)]).float(), dim=1)
    return F.normalize(total, dim=1)


def _top(scores: Tensor, label: Tensor) -> dict[str, float]:
    best = scores.topk(5, dim=1).indices.cpu()
    hit = best == label[:, None]
    return {
        "top1": round(hit[:, 0].float().mean().item(), 4),
        "top5": round(hit.any(1).float().mean().item(), 4),
    }


def zero_shot(
    model: Siglip, pack: Pack, text: Tensor, style: str, placed: bool
) -> dict[str, dict[str, float]]:
    """Accuracy on one style: trained classes and all classes among all, never-trained ones among themselves.

    Args:
        model: in eval mode.
        pack: the art.
        text: [classes, width], as `class_embeddings` gives for the labels of `pack.classes`.
        style: name of a style.
        placed: random placements, or centred on white.
    """
    views = _views(pack, style, model.shape.image_size, seed=1, placements=PLACEMENTS * placed)
    scores = _embed(model, views.pictures) @ text.T
    unseen = torch.isin(torch.tensor(pack.classes), torch.tensor(pack.never_trained))
    among, is_unseen = unseen.nonzero()[:, 0], unseen[views.label]
    renumbered = torch.cumsum(unseen, 0)[views.label[is_unseen]] - 1
    return {
        "trained": _top(scores[~is_unseen.to(scores.device)], views.label[~is_unseen]),
        "all": _top(scores, views.label),
        "never_trained": _top(scores[is_unseen.to(scores.device)][:, among.to(scores.device)], renumbered),
    }


def report(
    model: Siglip, pack: Pack, tokenizer: Tokenizer
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Zero-shot accuracy: placed or clean, style, group of classes, top-1 or top-5."""
    model.eval()
    labels = [pack.concepts[concept]["label"] for concept in pack.classes]
    text = class_embeddings(model, tokenizer, labels)
    styles = [style["name"] for style in pack.styles if style["role"] in ("held-out", "choose")]
    return {
        "placed" if placed else "clean": {
            style: zero_shot(model, pack, text, style, placed) for style in styles
        }
        for placed in (True, False)
    }
