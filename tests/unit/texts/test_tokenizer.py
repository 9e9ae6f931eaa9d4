from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers import models, processors

from siglip_serve.checkpoint.model_config import ModelConfig
from siglip_serve.errors import CheckpointError, TextError
from siglip_serve.texts.tokenizer import decode_text, load_tokenizer

CONTEXT = 8


def checkpoint(path: Path, vocab_size: int = 1_000) -> ModelConfig:
    text = SimpleNamespace(max_position_embeddings=CONTEXT, vocab_size=vocab_size)
    return cast(ModelConfig, SimpleNamespace(path=path, family="siglip", text=text))


def write_settings(path: Path, **settings: Any) -> None:
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("trained")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a photo of a cat", "a photo of a dog", "cats and dogs"] * 10),
        model_prefix=str(path / "spiece"),
        vocab_size=30,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return (path / "spiece.model").read_bytes()


@pytest.fixture
def siglip(tmp_path: Path, trained: bytes) -> Path:
    (tmp_path / "spiece.model").write_bytes(trained)
    write_settings(tmp_path, tokenizer_class="SiglipTokenizer")
    return tmp_path


@pytest.fixture
def siglip2(tmp_path: Path) -> Path:
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3, "b": 4, ".": 5}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    backend.save(str(tmp_path / "tokenizer.json"))
    write_settings(tmp_path, tokenizer_class="GemmaTokenizer", padding_side="right")
    return tmp_path


def test_ids_fill_the_context_and_end_in_padding(siglip: Path) -> None:
    ids = load_tokenizer(checkpoint(siglip))("a cat")
    assert ids.dtype == np.int64
    assert ids.shape == (CONTEXT,)
    assert ids[-1] == 1


def test_siglip_ignores_case_punctuation_and_spacing(siglip: Path) -> None:
    tokenizer = load_tokenizer(checkpoint(siglip))
    assert tokenizer.encode("a cat") == tokenizer.encode("  A,\t CAT!! ")


def test_siglip2_ignores_case_and_keeps_punctuation(siglip2: Path) -> None:
    tokenizer = load_tokenizer(checkpoint(siglip2))
    assert tokenizer("aB.").tolist() == [3, 4, 5, 1, 0, 0, 0, 0]


def test_keeps_case_if_the_checkpoint_does(siglip2: Path) -> None:
    write_settings(siglip2, tokenizer_class="GemmaTokenizer", padding_side="right", do_lower_case=False)
    assert load_tokenizer(checkpoint(siglip2)).encode("aB.") == [3, 2, 5, 1]


def test_padding_side_is_the_checkpoints(siglip2: Path) -> None:
    write_settings(siglip2, tokenizer_class="GemmaTokenizer", padding_side="left")
    assert load_tokenizer(checkpoint(siglip2))("ab").tolist() == [0, 0, 0, 0, 0, 3, 4, 1]


@pytest.mark.parametrize("family", ["siglip", "siglip2"])
def test_long_text_is_an_error_unless_truncation_is_asked_for(
    family: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = load_tokenizer(checkpoint(request.getfixturevalue(family)))
    with pytest.raises(TextError, match=r"has (\d\d) tokens and 8 fit"):
        tokenizer("ab" * 20)
    ids = tokenizer("ab" * 20, truncation=True)
    assert ids.shape == (CONTEXT,)
    assert ids[-1] == 1


def test_keeps_a_text_that_just_fits(siglip2: Path) -> None:
    tokenizer = load_tokenizer(checkpoint(siglip2))
    assert tokenizer("a" * 7).tolist() == tokenizer("a" * 7, truncation=True).tolist() == [3] * 7 + [1]
    with pytest.raises(TextError, match="has 9 tokens"):
        tokenizer("a" * 8)


@pytest.mark.parametrize("text", ["", " ", "\n\t\u3000"])
def test_empty_text_is_an_error(siglip: Path, text: str) -> None:
    with pytest.raises(TextError, match="the text is empty"):
        load_tokenizer(checkpoint(siglip))(text)


def test_punctuation_alone_is_a_text_as_in_the_reference(siglip: Path) -> None:
    assert load_tokenizer(checkpoint(siglip)).encode("!?") == [1]


def test_a_token_beyond_the_embeddings_is_an_error(siglip2: Path) -> None:
    with pytest.raises(TextError, match="token id 5, the model has 5 token embeddings"):
        load_tokenizer(checkpoint(siglip2, vocab_size=5))("a.")


def test_decodes_utf8_and_refuses_other_bytes() -> None:
    assert decode_text("猫 🐈".encode(), 16) == "猫 🐈"
    with pytest.raises(TextError, match="byte 0xff at position 2"):
        decode_text(b"ab\xff", 16)


def test_finds_the_kind_of_tokenizer_without_settings(siglip: Path) -> None:
    (siglip / "tokenizer_config.json").unlink()
    assert load_tokenizer(checkpoint(siglip)).encode("!") == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_class": "BertTokenizer"}, "tokenizer_class is 'BertTokenizer', expected one of"),
        ({"tokenizer_class": "GemmaTokenizer"}, r"tokenizer\.json: no such file"),
        ({"truncation_side": "left"}, "truncation_side is 'left', expected 'right'"),
        ({"padding_side": "middle"}, "padding_side is 'middle', expected 'left' or 'right'"),
        ({"eos_token": "<end>"}, "the vocabulary has no '<end>'"),
    ],
)
def test_unusable_settings_are_named(siglip: Path, settings: dict[str, Any], message: str) -> None:
    write_settings(siglip, **{"tokenizer_class": "SiglipTokenizer", **settings})
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(checkpoint(siglip))


def test_unusable_files_are_named(siglip: Path, siglip2: Path) -> None:
    whole = (siglip2 / "tokenizer.json").read_text()
    for content in ("{}", "", "[1]", whole[: len(whole) // 2]):
        (siglip2 / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
            load_tokenizer(checkpoint(siglip2))
    write_settings(siglip, tokenizer_class="SiglipTokenizer")
    (siglip / "spiece.model").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="not a sentencepiece model"):
        load_tokenizer(checkpoint(siglip))
    (siglip / "spiece.model").unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load_tokenizer(checkpoint(siglip))
