"""Lengths of texts on both sides of their limits, and padding that is not the end token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from paths import TINY

from siglip_serve.checkpoint.model_config import ModelConfig
from siglip_serve.errors import TextError
from siglip_serve.texts.tokenizer import decode_text, load_tokenizer

CONTEXT = 8
EOS, PAD = 1, 0


@pytest.fixture
def checkpoint(tmp_path: Path) -> ModelConfig:
    """The bundled sentencepiece model, padded with a token of its own."""
    shutil.copy(TINY / "spiece.model", tmp_path)
    added = {"0": {"content": "<pad>"}, "1": {"content": "</s>"}}
    settings = {"tokenizer_class": "SiglipTokenizer", "pad_token": "<pad>", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    text = SimpleNamespace(max_position_embeddings=CONTEXT, vocab_size=32_000)
    return cast(ModelConfig, SimpleNamespace(path=tmp_path, family="siglip", text=text))


def test_pads_with_the_pad_token_and_ends_with_the_end_token(checkpoint: ModelConfig) -> None:
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer.encode("dog")
    assert ids[-1] == EOS
    assert PAD not in ids
    assert tokenizer("dog").tolist() == ids + [PAD] * (CONTEXT - len(ids))


def test_accepts_a_text_of_exactly_the_most_bytes() -> None:
    assert decode_text("größe".encode(), 7) == "größe"
    with pytest.raises(TextError, match=r"^7 bytes, at most 6 are allowed"):
        decode_text("größe".encode(), 6)


def test_keeps_the_end_token_of_a_text_that_is_cut(checkpoint: ModelConfig) -> None:
    tokenizer = load_tokenizer(checkpoint)
    text = "dog " * 3
    whole = tokenizer.encode(text)
    while len(whole) < CONTEXT:
        text += "dog "
        whole = tokenizer.encode(text)
    assert len(whole) == CONTEXT
    assert tokenizer.encode(text, truncation=True) == whole
    with pytest.raises(TextError, match=f"the text has {CONTEXT + 1} tokens and {CONTEXT} fit"):
        tokenizer.encode(text + "dog")
    assert tokenizer.encode(text + "dog", truncation=True) == whole
