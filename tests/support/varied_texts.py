"""Thousands of seeded texts of all kinds, and small vocabularies that are trained on others."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from clip_vocabulary import END, START
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, trainers
from transformers import Siglip2Tokenizer

__all__ = ["character_map", "corpus", "train_sentencepiece", "varied_texts", "write_gemma"]

# fmt: off
WORDS = [
    "a", "photo", "of", "the", "cat", "dog", "house", "red", "blue", "large", "small", "painting",
    "sketch", "in", "on", "under", "Tench", "Tinca", "tinca", "GREAT", "White", "Shark", "café",
    "naïve", "Straße", "İstanbul", "ΣΊΣΥΦΟΣ", "Привет", "мир", "写真", "猫", "사진", "صورة", "תמונה",
    "चित्र", "ภาพ",
]
# fmt: on
RANGES = [
    (0x20, 0x7E),
    (0x00, 0x1F),
    (0x7F, 0xA0),
    (0xA1, 0x24F),
    (0x300, 0x36F),
    (0x370, 0x3FF),
    (0x400, 0x4FF),
    (0x590, 0x6FF),
    (0x900, 0x97F),
    (0xE00, 0xE7F),
    (0x1100, 0x11FF),
    (0x2000, 0x206F),
    (0x2100, 0x214F),
    (0x2460, 0x24FF),
    (0x2580, 0x2584),
    (0x3000, 0x30FF),
    (0x4E00, 0x4FFF),
    (0xAC00, 0xADFF),
    (0xF900, 0xFAFF),
    (0xFE00, 0xFE0F),
    (0xFF00, 0xFFEF),
    (0x1D400, 0x1D4FF),
    (0x1F300, 0x1F64F),
    (0x1F1E6, 0x1F1FF),
    (0xE0061, 0xE007F),
    (0x10FFF0, 0x10FFFF),
]
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u200b", "\u3000", "\u2028", "\x1c", "▁", "▁▁"]
SPECIAL = [
    "</s>",
    "<unk>",
    "<pad>",
    "<eos>",
    "<bos>",
    "<mask>",
    "<table>",
    "<TABLE>",
    "<0x41>",
    "<",
    ">",
    "</S>",
    "<s>",
    START,
    END,
    END.upper(),
    END[:-1],
    "it's",
    "We'LL",
    "12345678901234567890",
    "٣٤٥Ⅷ½",
]


def varied_texts(seed: int, count: int) -> Iterator[str]:
    """Words, every script, whitespace of all kinds, special tokens and very long texts; never empty."""
    rng = random.Random(seed)
    while count:
        length = rng.choice([1, 2, 5, 10, 20, 400 if count % 50 == 0 else 30])
        text = "".join(_part(rng) for _ in range(length))
        if text.strip():
            count -= 1
            yield text


def _part(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(WORDS) + rng.choice([" ", " ", " ", ", ", ". ", "", "-", "'s "])
    if kind < 0.60:
        return rng.choice(SPACES)
    if kind < 0.68:
        return rng.choice(SPECIAL)
    low, high = rng.choice(RANGES)
    return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6)))


def corpus() -> list[str]:
    """Texts to train on: made-up words of few of the characters that the compared texts have."""
    rng = random.Random(0)
    cut = [word[:end] for word in WORDS for end in range(1, len(word) + 1)]
    made_up = ["".join(rng.choices(cut, k=2)) for _ in range(3_000)]
    return [" ".join(rng.choices(made_up, k=8)) + rng.choice(",.!?😀🇩🇪") for _ in range(3_000)]


def train_sentencepiece(path: Path, byte_fallback: bool, **ids: int) -> None:
    """Write `spiece.model`."""
    options: dict[str, Any] = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | ids
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(path / "spiece"),
        vocab_size=1_200,
        character_coverage=0.98,
        byte_fallback=byte_fallback,
        minloglevel=2,
        **options,
    )


def character_map(file: Path) -> bytes:
    """Find sentencepiece's normalisation of characters in a trained model, a message of protobuf."""
    return dict(_fields(dict(_fields(file.read_bytes()))[3]))[2]


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The number and content of each field. Only those with a length are given."""
    place = 0

    def number() -> int:
        nonlocal place
        value, shift = 0, 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(message):
        tag = number()
        if tag & 7 == 2:
            length = number()
            yield tag >> 3, message[place : place + length]
            place += length
        elif tag & 7 == 5:
            place += 4
        else:
            number()


def write_gemma(path: Path) -> Path:
    """Write a tokenizer of Gemma's construction with the settings of the published SigLIP 2 checkpoints."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    bytes_of_fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    backend.train_from_iterator(
        [text.lower() for text in corpus()],
        trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False, limit_alphabet=300),
    )
    content = json.loads(backend.to_str())
    vocabulary = content["model"]["vocab"]
    for token in bytes_of_fallback:
        vocabulary.setdefault(token, len(vocabulary))
    merges: Any = [tuple(merge) for merge in content["model"]["merges"]]
    tokenizer = Siglip2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        add_bos_token=False,
        add_eos_token=True,
        padding_side="right",
    )
    tokenizer.add_tokens(["<table>", "\n\n"])
    tokenizer.save_pretrained(path)
    return path
