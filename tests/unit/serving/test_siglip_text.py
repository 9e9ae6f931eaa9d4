"""Texts of several requests in one batch: each is computed once, and errors keep to their own request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import triton_module
from numpy.typing import NDArray
from paths import TINY

from siglip_serve.checkpoint.config import load_config
from siglip_serve.config import Settings
from siglip_serve.engine.passes import Batch
from siglip_serve.texts.tokenizer import load_tokenizer

CONFIG = load_config(TINY)
LONG = "dog " * 100  # short enough to be kept, if it fitted


@pytest.fixture(scope="module")
def models() -> Iterator[Any]:
    with triton_module.installed():
        from siglip_serve.serving import siglip_text

        yield siglip_text


def make(models: Any, name: str, cached: int = 1000) -> Any:
    from siglip_serve.serving.context import Context
    from siglip_serve.serving.counters import RefusalCounter

    settings = Settings(checkpoint=str(TINY), dtype="float32", backend="torch", text_cache_rows=cached)
    model = "siglip_text_tokenize" if name == "SiglipTextTokenize" else "siglip_text_model"
    return getattr(models, name)(Context(settings, CONFIG, "cpu", model, RefusalCounter(model), shared=False))


class CountedTokenizer:
    """Keeps the texts that a tokenizer is given."""

    def __init__(self, model: Any) -> None:
        self.texts: list[str] = []
        self._tokenizer = model._tokenizer
        self.context_length = self._tokenizer.context_length
        model._tokenizer = self

    def batch(self, texts: Sequence[str], truncation: bool) -> Any:
        self.texts += texts
        return self._tokenizer.batch(texts, truncation)


class CountedEngine:
    """Keeps the rows that an engine is given, and fails for one of them."""

    def __init__(self, model: Any) -> None:
        self.rows: list[NDArray[np.int64]] = []
        self.failing: NDArray[np.int64] | None = None
        self._engine = model._engine
        model._engine = self

    def __call__(self, ids: NDArray[np.int64]) -> Batch:
        self.rows += list(ids.copy())
        found = self._engine(ids)
        failed = np.zeros(len(ids), np.bool_)
        if self.failing is not None:
            failed = (ids == self.failing).all(axis=1)
        return Batch(found.outputs, failed)


def texts(*rows: str | bytes, **parameters: Any) -> triton_module.Request:
    encoded = [row.encode() if isinstance(row, str) else row for row in rows]
    array = np.array(encoded, dtype=np.object_).reshape(-1, 1)
    return triton_module.Request({"INPUT_TEXT": array}, ["INPUT_IDS"], parameters)


def ids(*rows: str, **parameters: Any) -> triton_module.Request:
    array = load_tokenizer(CONFIG).batch(rows)[0]
    return triton_module.Request({"INPUT_IDS": array}, ["EMBEDDING"], parameters)


def test_a_text_of_several_requests_is_tokenized_once(models: Any) -> None:
    model = make(models, "SiglipTextTokenize")
    counted = CountedTokenizer(model)
    tokenizer = load_tokenizer(CONFIG)
    asked = [("a dog", "a cat", "a dog"), ("a cat",), ("a pizza", "a dog")]
    responses = model.execute([texts(*rows) for rows in asked])
    for rows, response in zip(asked, responses, strict=True):
        np.testing.assert_array_equal(
            response.arrays["INPUT_IDS"], np.stack([tokenizer(row) for row in rows])
        )
    assert counted.texts == ["a dog", "a cat", "a pizza"]
    (again,) = model.execute([texts("a pizza", "a bird", "a dog")])
    assert counted.texts == ["a dog", "a cat", "a pizza", "a bird"]
    expected = [tokenizer(text) for text in ("a pizza", "a bird", "a dog")]
    np.testing.assert_array_equal(again.arrays["INPUT_IDS"], expected)


def test_a_refused_text_is_named_in_every_request_that_holds_it(models: Any) -> None:
    model = make(models, "SiglipTextTokenize")
    asked = [
        texts("a dog"),
        texts("a dog", "", b"\xff", LONG),
        texts("a cat", LONG, truncation=True),
        texts("a dog", embed_model="other"),
        texts(LONG),
        texts("a cat"),
    ]
    first, wrong, cut, other, long, last = model.execute(asked)
    tokenizer = load_tokenizer(CONFIG)
    np.testing.assert_array_equal(first.arrays["INPUT_IDS"], [tokenizer("a dog")])
    np.testing.assert_array_equal(last.arrays["INPUT_IDS"], [tokenizer("a cat")])
    np.testing.assert_array_equal(cut.arrays["INPUT_IDS"], [tokenizer("a cat"), tokenizer(LONG, True)])
    assert wrong.error.text == (
        "INPUT_TEXT[1]: the text is empty; "
        "INPUT_TEXT[2]: not UTF-8 text (byte 0xff at position 0); "
        "INPUT_TEXT[3]: the text has 101 tokens and 64 fit: shorten it, or set truncation"
    )
    assert long.error.text.startswith("INPUT_TEXT[0]: the text has 101 tokens")
    assert "parameter 'embed_model': got 'other'" in other.error.text
    (again,) = model.execute([texts(LONG)])
    assert again.error.text == long.error.text  # the cut one was not kept


def test_a_text_of_several_requests_is_embedded_once(models: Any) -> None:
    model = make(models, "SiglipTextModel")
    counted = CountedEngine(model)
    asked = [("a dog", "a cat", "a dog"), ("a cat",), ("a pizza", "a dog")]
    responses = model.execute([ids(*rows) for rows in asked])
    assert len(counted.rows) == 3
    alone = {text: make(models, "SiglipTextModel").execute([ids(text)])[0] for text in ("a dog", "a cat")}
    for rows, response in zip(asked, responses, strict=True):
        for text, row in zip(rows, response.arrays["EMBEDDING"], strict=True):
            if text in alone:
                np.testing.assert_allclose(row, alone[text].arrays["EMBEDDING"][0], rtol=1e-4, atol=1e-5)
    (again,) = model.execute([ids("a pizza", "a bird", "a dog")])
    assert len(counted.rows) == 4
    np.testing.assert_array_equal(again.arrays["EMBEDDING"][2], responses[0].arrays["EMBEDDING"][0])


def test_without_a_cache_a_text_is_embedded_once_per_batch(models: Any) -> None:
    model = make(models, "SiglipTextModel", cached=0)
    counted = CountedEngine(model)
    for batches in (1, 2):
        one, two = model.execute([ids("a dog", "a dog"), ids("a dog")])
        assert len(counted.rows) == batches
        assert (one.arrays["EMBEDDING"] == two.arrays["EMBEDDING"]).all()


def test_a_text_that_failed_is_computed_again_for_the_next_caller(models: Any) -> None:
    model = make(models, "SiglipTextModel")
    counted = CountedEngine(model)
    counted.failing = load_tokenizer(CONFIG)("a dog")
    asked = [
        ids("a cat"),
        ids("a pizza", "a dog"),
        ids("a dog"),
        ids("a pizza", normalized="x"),
        ids("a pizza"),
    ]
    cat, both, dog, wrong, pizza = model.execute(asked)
    assert cat.error is pizza.error is None
    assert both.error.text == dog.error.text
    assert "not enough free memory" in dog.error.text
    assert "parameter 'normalized': got 'x'" in wrong.error.text
    counted.failing = None
    (answered,) = model.execute([ids("a dog", "a cat")])
    assert len(counted.rows) == 4
    np.testing.assert_array_equal(answered.arrays["EMBEDDING"][1], cat.arrays["EMBEDDING"][0])


@pytest.mark.parametrize("outside", [-1, CONFIG.text.vocab_size])
def test_refuses_ids_outside_the_vocabulary(models: Any, outside: int) -> None:
    wrong = ids("a dog", "a cat")
    wrong.inputs["INPUT_IDS"][1, 3] = outside
    inside = ids("a cat")
    inside.inputs["INPUT_IDS"][0, 3] = CONFIG.text.vocab_size - 1
    refused, answered = make(models, "SiglipTextModel").execute([wrong, inside])
    assert refused.error.text.startswith("INPUT_IDS[1]: an id outside the vocabulary, expected 0 to ")
    assert answered.error is None
