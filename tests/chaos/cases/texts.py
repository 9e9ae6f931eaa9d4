"""Cases of texts: any Unicode, bytes that are none, lengths at the limits, labels, templates and prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.chaos.cases.base import World, chance, edge, picture
from tests.chaos.cases.files import operate
from tests.chaos.messages import Infer, Tensor, of_array, of_rows

__all__ = ["labels", "prompts", "text_bytes", "texts"]

# Ranges of code points that tokenizers treat in ways of their own.
_RANGES: tuple[tuple[int, int], ...] = (
    (32, 126),
    (0, 31),
    (0xA0, 0x24F),
    (0x300, 0x36F),
    (0x590, 0x6FF),
    (0x900, 0x97F),
    (0xE00, 0xE7F),
)
_RANGES += ((0x1100, 0x11FF), (0x2000, 0x206F), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xE000, 0xF8FF))
_RANGES += ((0xFE00, 0xFE0F), (0xFFF0, 0xFFFF), (0x1F300, 0x1FAFF), (0xE0000, 0xE007F), (0x10FF00, 0x10FFFF))
_SPECIAL: tuple[str, ...] = (
    "<s>",
    "</s>",
    "<pad>",
    "<unk>",
    "<mask>",
    "<|endoftext|>",
    "▁",
    "\ufeff",
    "\u202e",
    "{}",
    "{0}",
    "{{}}",
)
_SPECIAL += ("%s", "${HOME}", "\0", "\r\n", "﷽", "ﬁ", "İ", "ß", "👩‍👩‍👧‍👦", "🇩🇪", "a" * 300, "́" * 50)
_WORDS = ("dog", "a photo of a cat", "red", "sofa", "the", "airplane", "Straße", "犬", "собака")


def text_bytes(rng: random.Random) -> bytes:
    """Make one text, which may be no UTF-8."""
    parts = [_part(rng) for _ in range(rng.choice((0, 1, 1, 2, 3, 8)))]
    text = rng.choice(("", " ", "")).join(parts)
    data = text.encode("utf-8", "surrogatepass")
    if chance(rng, 0.15):
        at = rng.randrange(len(data) + 1)
        data = (
            data[:at]
            + rng.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\x80"))
            + data[at:]
        )
    if chance(rng, 0.004):
        data = (data or b"x") * rng.choice((100, 1024, 8192, 100_000))
    return data[: 2**20]


def _part(rng: random.Random) -> str:
    if chance(rng, 0.4):
        return rng.choice(_WORDS)
    if chance(rng, 0.3):
        return rng.choice(_SPECIAL)
    first, last = rng.choice(_RANGES)
    return "".join(chr(rng.randint(first, last)) for _ in range(rng.choice((1, 3, 10, 40))))


def texts(rng: random.Random, _: World) -> tuple[str, Infer]:
    """Make a request of texts, sometimes truncated, sometimes to the tokenizer alone."""
    rows = [text_bytes(rng) for _ in range(rng.choice((1, 1, 1, 2, 5, 33)))]
    if chance(rng, 0.01):
        rows = [row[:100] for row in rows] * (2000 // len(rows))
    values: Sequence[Any] = (True, False, "longest_first", "do_not_truncate", "true", 1)
    parameters = {"truncation": rng.choice(values)} if chance(rng, 0.6) else {}
    model = rng.choice(("embed_text", "siglip_text", "siglip_text_tokenize"))
    about = f"{len(rows)} texts, {sum(map(len, rows))} bytes to {model}"
    return about, Infer(model, [of_rows("INPUT_TEXT", rows)], parameters)


def labels(rng: random.Random, world: World) -> tuple[str, Infer]:
    """Make a request to classify_image of odd labels and templates."""
    images = [picture(rng, world)[1] for _ in range(rng.choice((1, 1, 2, 4)))]
    if chance(rng, 0.1):
        images[0] = operate(images[0], rng)[1]
    rows = [text_bytes(rng) for _ in range(rng.choice((0, 1, 2, 3, 17)))]
    tensors = [of_rows("INPUT_IMAGE", images), of_rows("LABELS", rows, [len(rows)])]
    if chance(rng, 0.4):
        tensors.append(_templates(rng))
    parameters = {"softmax": rng.choice((True, False, "true", "yes"))} if chance(rng, 0.4) else {}
    return f"{len(images)} pictures x {len(rows)} labels", Infer("classify_image", tensors, parameters)


def _templates(rng: random.Random) -> Tensor:
    rows = [
        rng.choice((b"{}", b"a photo of {}", b"{} {}", b"none", b"{{}}", b""))
        for _ in range(rng.choice((1, 2, 5)))
    ]
    if chance(rng, 0.2):
        rows[0] += text_bytes(rng)
    return of_rows("TEMPLATE", rows, [len(rows)])


def prompts(rng: random.Random, world: World) -> tuple[str, Infer]:
    """Make a request to explain_image with odd prompts and options."""
    image = picture(rng, world)[1]
    rows = [
        text_bytes(rng) if chance(rng, 0.6) else rng.choice(_WORDS).encode()
        for _ in range(rng.choice((0, 1, 1, 2, 4)))
    ]
    tensors = [of_rows("INPUT_IMAGE", [image]), of_rows("PROMPTS", rows, [len(rows)])]
    options = {
        "MODE": (b"absolute", b"relative", b"", b"RELATIVE", b"\xff"),
        "NORMALIZE": (b"none", b"prompt", b"joint", b"x"),
        "COLORMAP": (b"bwr", b"jet", b"viridis", b"cividis", b"nipy"),
    }
    for name, values in options.items():
        if chance(rng, 0.3):
            tensors.append(of_rows(name, [rng.choice(values)], [1]))
    if chance(rng, 0.3):
        tensors.append(_templates(rng))
    if chance(rng, 0.3):
        background = [text_bytes(rng) for _ in range(rng.choice((0, 1, 3)))]
        tensors.append(of_rows("BACKGROUND", background, [len(background)]))
    if chance(rng, 0.5):
        tensors.append(of_array("SIZE", _size(rng)))
    if chance(rng, 0.3):
        value = rng.choice((0.0, 0.5, 1.0, -0.1, 1.1, float("nan"), float("inf"), 1e-45))
        tensors.append(of_array("OPACITY", np.array([value], np.float32)))
    outputs = rng.choice(((), ("HEATMAPS",), ("OVERLAY",), ("SCORES", "UNATTRIBUTED"), ("PATCH_MAPS",)))
    about = f"{len(rows)} prompts with {', '.join(tensor.name for tensor in tensors[2:]) or 'no options'}"
    return about, Infer("explain_image", tensors, {}, outputs)


def _size(rng: random.Random) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Draw the size of heatmaps, mostly small, sometimes at the edges of int32."""
    if chance(rng, 0.8):
        return np.array([rng.randint(1, 300), rng.randint(1, 300)], np.int32)
    sides = [max(min(edge(rng), 2**31 - 1), -(2**31)) for _ in range(2)]
    return np.array(sides, np.int32)
