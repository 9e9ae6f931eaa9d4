"""Token ids are those of transformers, for thousands of seeded strings and all kinds of tokenizers."""

from __future__ import annotations

import base64
import json
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import sentencepiece
from clip_vocabulary import END, START, write_clip_vocabulary
from transformers import CLIPTokenizer, GemmaTokenizer, Siglip2Tokenizer, SiglipTokenizer, XLMRobertaTokenizer
from varied_texts import character_map, corpus, train_sentencepiece, varied_texts, write_gemma

from siglip_serve.checkpoint.model_config import Family, ModelConfig
from siglip_serve.errors import TextError
from siglip_serve.texts.tokenizer import Tokenizer, load_tokenizer

COUNT = 5_000
CONTEXT = 24


def checkpoint(path: Path, context: int = CONTEXT, family: Family = "siglip") -> ModelConfig:
    """Give `load_tokenizer` the two things that it reads: the directory and the shape of the text tower."""
    text = SimpleNamespace(max_position_embeddings=context, vocab_size=10_000)
    return cast(ModelConfig, SimpleNamespace(path=path, family=family, text=text, multilingual=False))


@pytest.fixture(scope="module", params=[False, True], ids=["unknown", "byte-fallback"])
def sentencepiece_dir(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    path = tmp_path_factory.mktemp("siglip")
    train_sentencepiece(path, byte_fallback=request.param)
    SiglipTokenizer(vocab_file=str(path / "spiece.model")).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def gemma_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gemma(tmp_path_factory.mktemp("siglip2"))


def with_settings(source: Path, target: Path, **settings: Any) -> Path:
    """A copy of `source` with other values in its tokenizer_config.json."""
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps(config | settings))
    return target


def compare(
    path: Path, reference: Callable[..., Any], seed: int, count: int = COUNT, family: Family = "siglip"
) -> None:
    """All ids of every text, and the ids cut or padded to the context, against the reference. Batches too."""
    padded = load_tokenizer(checkpoint(path, family=family))
    whole = load_tokenizer(checkpoint(path, context=100_000, family=family))
    differing = []
    texts = list(varied_texts(seed, count))
    for text in texts:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This sequence already has")
            expected = reference(text)["input_ids"]
            fixed = reference(text, padding="max_length", truncation=True, max_length=CONTEXT)["input_ids"]
        if whole.encode(text) != expected or padded(text, truncation=True).tolist() != fixed:
            differing.append((text, whole.encode(text), expected))
    assert not differing, f"{len(differing)} of {count} differ, first: {differing[0]}"
    assert_batches_equal(padded, texts)


def assert_batches_equal(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """A batch has the ids and the errors of its texts one by one."""
    for truncation in (False, True):
        rows, refused = tokenizer.batch(texts, truncation)
        for index, text in enumerate(texts):
            if index in refused:
                with pytest.raises(TextError, match=f"^{re.escape(str(refused[index]))}$"):
                    tokenizer(text, truncation)
            else:
                np.testing.assert_array_equal(rows[index], tokenizer(text, truncation))
        assert bool(refused) is not truncation


def test_siglip_ids_equal_transformers(sentencepiece_dir: Path) -> None:
    reference = SiglipTokenizer.from_pretrained(sentencepiece_dir)
    compare(sentencepiece_dir, reference, seed=1)


@pytest.mark.parametrize("settings", [{"do_lower_case": False}, {"padding_side": "left"}], ids=str)
def test_siglip_ids_follow_the_settings(
    sentencepiece_dir: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    path = with_settings(sentencepiece_dir, tmp_path, **settings)
    reference = SiglipTokenizer.from_pretrained(path)
    compare(path, reference, seed=2, count=500)


def test_siglip_settings_in_the_published_form(sentencepiece_dir: Path, tmp_path: Path) -> None:
    """The published files list `</s>` and `<unk>` in `added_tokens_decoder`, as transformers 4.x did."""
    form = {"lstrip": True, "rstrip": True, "normalized": False, "single_word": False, "special": True}
    added = {"1": {"content": "</s>", **form}, "2": {"content": "<unk>", **form}}
    path = with_settings(sentencepiece_dir, tmp_path, added_tokens_decoder=added)
    compare(path, SiglipTokenizer.from_pretrained(path), seed=3, count=500)


def test_siglip2_ids_equal_transformers(gemma_dir: Path) -> None:
    reference = Siglip2Tokenizer.from_pretrained(gemma_dir)
    assert reference("Cat")["input_ids"][-1] == 1
    compare(gemma_dir, reference, seed=4)


@pytest.mark.parametrize(
    "settings",
    [
        {
            "add_bos_token": False,
            "add_eos_token": True,
            "do_lower_case": True,
            "tokenizer_class": "GemmaTokenizer",
        },
        {"add_bos_token": True, "add_eos_token": False},
        {"padding_side": "left"},
    ],
    ids=["published", "flags-are-not-read", "left"],
)
def test_siglip2_ids_follow_the_settings(gemma_dir: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    path = with_settings(gemma_dir, tmp_path, **settings)
    reference = Siglip2Tokenizer.from_pretrained(path)
    compare(path, reference, seed=5, count=500)


def test_siglip2_without_a_template_gets_no_end_token(gemma_dir: Path, tmp_path: Path) -> None:
    path = with_settings(gemma_dir, tmp_path)
    content = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    reference = Siglip2Tokenizer.from_pretrained(path)
    compare(path, reference, seed=6, count=200)


def test_the_gemma_class_that_auto_tokenizer_picks_forgets_to_lowercase(
    gemma_dir: Path, tmp_path: Path
) -> None:
    """Why `Siglip2Tokenizer` is the reference: `GemmaTokenizer` ignores the checkpoint's `do_lower_case`."""
    path = with_settings(gemma_dir, tmp_path, do_lower_case=True, add_eos_token=True)
    reference = GemmaTokenizer.from_pretrained(path)
    ours = load_tokenizer(checkpoint(path))
    assert ours.encode("A Photo of the CAT") == reference("a photo of the cat")["input_ids"]
    assert ours.encode("A Photo of the CAT") != reference("A Photo of the CAT")["input_ids"]


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    assert write_clip_vocabulary(path, corpus()) == 900
    return path


def test_clip_ids_equal_transformers(clip_dir: Path) -> None:
    reference = CLIPTokenizer.from_pretrained(clip_dir)
    assert reference("cat")["input_ids"][-1] == 899
    compare(clip_dir, reference, seed=7, family="clip")


def test_clip_ids_of_one_file(clip_dir: Path, tmp_path: Path) -> None:
    CLIPTokenizer.from_pretrained(clip_dir).save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    compare(tmp_path, CLIPTokenizer.from_pretrained(tmp_path), seed=8, count=1_000, family="clip")


def described(token: str, **flags: bool) -> dict[str, Any]:
    return {"content": token, "single_word": False, "lstrip": False, "rstrip": False, **flags}


@pytest.mark.parametrize("with_one_file", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
def test_clip_settings_in_the_published_form(
    clip_dir: Path, tmp_path: Path, with_one_file: bool, normalized: bool
) -> None:
    """The published files tell the tokens three times over, in the layout of transformers 4.x."""
    named = {
        "bos_token": described(START, normalized=normalized),
        "eos_token": described(END, normalized=normalized),
        "unk_token": described(END, normalized=normalized),
    }
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((clip_dir / name).read_bytes())
    if with_one_file:
        CLIPTokenizer.from_pretrained(clip_dir).save_pretrained(tmp_path)
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        for token in content["added_tokens"]:
            token["normalized"] = normalized
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({**named, "pad_token": "!"}))
    settings: dict[str, Any] = {key: {**token, "__type": "AddedToken"} for key, token in named.items()}
    settings |= {
        "pad_token": END,
        "do_lower_case": True,
        "errors": "replace",
        "tokenizer_class": "CLIPTokenizer",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    reference = CLIPTokenizer.from_pretrained(tmp_path)
    assert reference.pad_token == "!"
    compare(tmp_path, reference, seed=9, count=500, family="clip")


def test_clip_tokens_of_a_file_of_their_own(clip_dir: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((clip_dir / name).read_bytes())
    added = {"<mask>": 900, "Straße": 901, "<table>": 902}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_special_tokens": ["<mask>"]}))
    reference = CLIPTokenizer.from_pretrained(tmp_path)
    assert reference("<mask>")["input_ids"][1] == 900
    compare(tmp_path, reference, seed=12, count=500, family="clip")


@pytest.mark.parametrize(
    "settings",
    [
        {"additional_special_tokens": ["<mask>", "</s>"]},
        {"extra_special_tokens": {"mask_token": "<mask>"}},
        {"split_special_tokens": True},
    ],
    ids=["list", "named", "split"],
)
def test_clip_ids_follow_the_settings(clip_dir: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    path = with_settings(saved_by_reference(clip_dir), tmp_path, **settings)
    compare(path, CLIPTokenizer.from_pretrained(path), seed=13, count=500, family="clip")


def saved_by_reference(source: Path) -> Path:
    target = source.with_name("clip_saved")
    CLIPTokenizer.from_pretrained(source).save_pretrained(target)
    return target


def test_clip_tokens_that_were_added(clip_dir: Path, tmp_path: Path) -> None:
    """Some are of the vocabulary, some come behind it."""
    tokenizer = CLIPTokenizer.from_pretrained(clip_dir)
    tokenizer.add_tokens(["<table>", "Straße"])
    tokenizer.save_pretrained(tmp_path)
    compare(tmp_path, CLIPTokenizer.from_pretrained(tmp_path), seed=10, count=500, family="clip")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        "898": described(START, normalized=False, special=True),
        "899": described(END, normalized=True, special=True),
        "900": described("<table>", normalized=True, special=False),
        "901": described("</s>", normalized=False, special=True),
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    compare(tmp_path, CLIPTokenizer.from_pretrained(tmp_path), seed=11, count=500, family="clip")


def test_truncation_is_asked_for(sentencepiece_dir: Path, gemma_dir: Path) -> None:
    for path in (sentencepiece_dir, gemma_dir):
        ours = load_tokenizer(checkpoint(path))
        ids = ours("cat " * 100, truncation=True)
        assert ids.dtype == np.int64
        assert ids.shape == (CONTEXT,)
        assert ids[-1] == 1


@pytest.fixture(scope="module")
def xlm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary with the ids of XLM-RoBERTa's special tokens."""
    path = tmp_path_factory.mktemp("metaclip2")
    train_sentencepiece(path, byte_fallback=False, bos_id=0, pad_id=1, eos_id=2, unk_id=3)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path / "spiece.model"))
    (path / "spiece.model").unlink()
    vocabulary = [(model.id_to_piece(index), model.get_score(index)) for index in range(len(model))]
    tokenizer = XLMRobertaTokenizer(vocab=[*vocabulary, ("<mask>", 0.0)])
    tokenizer.save_pretrained(path)
    return path


def test_metaclip2_ids_equal_transformers(xlm_dir: Path) -> None:
    reference = XLMRobertaTokenizer.from_pretrained(xlm_dir)
    ids = reference("cat")["input_ids"]
    assert (ids[0], ids[-1]) == (0, 2)
    compare(xlm_dir, reference, seed=14, family="clip")


def test_metaclip2_ids_with_a_character_map(xlm_dir: Path, tmp_path: Path) -> None:
    """The published file has the map of sentencepiece's NFKC, and tokens that were added."""
    path = with_settings(xlm_dir, tmp_path)
    saved = json.loads((path / "tokenizer.json").read_text())
    train_sentencepiece(path, byte_fallback=False)
    characters = base64.b64encode(character_map(path / "spiece.model")).decode()
    saved["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": characters}
    (path / "tokenizer.json").write_text(json.dumps(saved))
    reference = XLMRobertaTokenizer.from_pretrained(path)
    assert reference("ｃａｔ")["input_ids"] == reference("cat")["input_ids"]
    compare(path, reference, seed=15, count=1_000, family="clip")
