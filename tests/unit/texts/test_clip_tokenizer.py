"""CLIP's tokenizer: special tokens and truncation, and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from clip_checkpoints import edit_json, make_clip
from clip_vocabulary import END, write_clip_vocabulary

from siglip_serve.checkpoint.config import load_config
from siglip_serve.errors import CheckpointError
from siglip_serve.texts.tokenizer import load_tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_clip(tmp_path)


def tokenizer_files(path: Path) -> Path:
    assert write_clip_vocabulary(path, ["a photo of a cat", "a photo of a dog"] * 20, size=300) <= 300
    return path


def test_texts_stand_between_their_tokens(checkpoint: Path) -> None:
    config = load_config(tokenizer_files(checkpoint))
    tokenizer = load_tokenizer(config)
    end = json.loads((checkpoint / "vocab.json").read_text())[END]
    ids = tokenizer("A  Cat ")
    assert ids.dtype == np.int64
    assert ids.shape == (config.text.max_position_embeddings,)
    assert ids[0] == end - 1
    assert (ids[len(tokenizer.encode("a cat")) - 1 :] == end).all()
    cut_off = tokenizer("cat " * 100, truncation=True)
    assert cut_off[-1] == end
    assert (cut_off == end).sum() == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"vocab.json": None}, "no tokenizer.json, and not both of vocab.json and merges.txt"),
        ({"merges.txt": None}, "no tokenizer.json, and not both of vocab.json and merges.txt"),
        ({"vocab.json": "{"}, "vocab.json and merges.txt: not a byte-pair vocabulary"),
        ({"vocab.json": "[]"}, "vocab.json and merges.txt: not a byte-pair vocabulary"),
        ({"merges.txt": "#version: 0.2\nq x\n"}, "vocab.json and merges.txt: not a byte-pair vocabulary"),
        ({"merges.txt": "#version: 0.2\nqx\n"}, "vocab.json and merges.txt: not a byte-pair vocabulary"),
        ({"tokenizer.json": "{"}, "tokenizer.json: not valid JSON"),
        ({"tokenizer.json": '{"model": 5}'}, "tokenizer.json: not a byte-pair vocabulary"),
        ({"tokenizer.json": '{"model": {"vocab": {"a": 0}, "merges": [5]}}'}, "not a byte-pair vocabulary"),
        ({"tokenizer.json": '{"added_tokens": []}'}, "tokenizer.json: not a byte-pair vocabulary"),
        ({"tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}'}, "expected one of CLIPTokenizer"),
        ({"tokenizer_config.json": '{"padding_side": "left"}'}, "padding_side is 'left', expected 'right'"),
        ({"tokenizer_config.json": '{"truncation_side": "left"}'}, "truncation_side is 'left'"),
        ({"tokenizer_config.json": '{"pad_token": 5}'}, "the special tokens of the tokenizer are malformed"),
        (
            {"tokenizer_config.json": '{"added_tokens_decoder": {"x": "y"}}'},
            "special tokens .* are malformed",
        ),
        ({"tokenizer.json": '{"added_tokens": [{"content": "a"}]}'}, "special tokens .* are malformed"),
        ({"tokenizer_config.json": '{"pad_token": "<pad>"}'}, "the token '<pad>' has id 300"),
    ],
)
def test_refuses_unusable_tokenizers_by_name(
    files: dict[str, str | None], message: str, tmp_path: Path
) -> None:
    config = load_config(make_clip(tmp_path))
    size = write_clip_vocabulary(
        tmp_path, ["a photo of a cat, two dogs and a large red house"] * 20, size=300
    )
    edit_json(tmp_path / "config.json", text_config__vocab_size=size)
    for name, content in files.items():
        if content is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_text(content)
    message = message.replace("300", str(size))
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(load_config(config.path))
