"""Tokenizers on a unigram vocabulary of SentencePiece: XLM-RoBERTa's, and T5's.

MetaCLIP 2 uses the first, and SigLIP in the layout of open_clip the second. The ids are those of
`XLMRobertaTokenizer` and `T5Tokenizer` of transformers 5.x. They read the vocabulary, the character map and
the added tokens of `tokenizer.json`. Splitting at whitespace and the ends belong to the class.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from siglip_serve.checkpoint.files import read_json
from siglip_serve.errors import CheckpointError
from siglip_serve.texts.vocabulary import encode_all, special_tokens, token_id

__all__ = ["T5", "XLM_ROBERTA", "Unigram", "UnigramClass"]

_SPACE = "▁"


class UnigramClass(NamedTuple):
    """A class of tokenizers, as far as its files do not describe it.

    Attributes:
        tokens: its special tokens by name.
        unknown: id of the piece for unknown characters.
        sentinels: how many tokens `<extra_id_0>` and so on it adds, unless the settings have another number.
    """

    tokens: Mapping[str, str]
    unknown: int
    sentinels: int


_ENDS = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_MORE = {"bos_token": "<s>", "sep_token": "</s>", "cls_token": "<s>", "mask_token": "<mask>"}
XLM_ROBERTA = UnigramClass(_ENDS | _MORE, unknown=3, sentinels=0)
T5 = UnigramClass(_ENDS, unknown=2, sentinels=100)


class Unigram:
    """Callable from a text to its ids with special tokens.

    Args:
        path: the checkpoint's directory.
        settings: its `tokenizer_config.json`.
        kind: `XLM_ROBERTA` or `T5`.

    Attributes:
        pad_id: id of the padding.
        ids: ids of the ends and the padding by their text.

    Raises:
        CheckpointError: a file is missing or malformed.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], kind: UnigramClass) -> None:
        from tokenizers import Tokenizer as Backend
        from tokenizers import normalizers, pre_tokenizers, processors

        file = path / "tokenizer.json"
        saved = read_json(file)
        self._tokenizer = backend = Backend(_vocabulary(file, saved, kind.unknown))
        character_map = _character_map(file, saved)
        if character_map is not None:
            backend.normalizer = normalizers.Precompiled(character_map)
        prefix = "never" if settings.get("add_prefix_space") is False and kind is XLM_ROBERTA else "always"
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.WhitespaceSplit(),
                pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=prefix),
            ]
        )
        named, added = special_tokens(path, _with_sentinels(settings, kind), saved, kind.tokens)
        backend.add_tokens(added)
        backend.encode_special_tokens = settings.get("split_special_tokens") is True
        start, end, pad = named.get("bos_token"), named["eos_token"], named["pad_token"]
        ends = [end] if start is None else [start, end]
        self.ids = {token: token_id(backend, file, token) for token in (*ends, pad)}
        self.pad_id = self.ids[pad]
        backend.post_processor = processors.TemplateProcessing(
            single=[*ends[:-1], "$A", end],
            special_tokens=[(token, self.ids[token]) for token in dict.fromkeys(ends)],
        )
        self._ends = len(ends)

    def __call__(self, text: str, limit: int | None) -> list[int]:
        """Compute the ids of `text` with its special tokens, at most `limit` of them, the ends kept."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if limit is not None:
            encoding.truncate(limit - self._ends)
        return list(self._tokenizer.post_process(encoding).ids)

    def many(self, texts: Sequence[str]) -> Sequence[list[int]]:
        """Compute the ids of each text with its special tokens."""
        return encode_all(self._tokenizer, texts)


def _vocabulary(file: Path, saved: Mapping[str, Any], unknown: int) -> Any:
    from tokenizers import models

    try:
        if saved["model"]["type"] != "Unigram":
            raise TypeError(f"type {saved['model']['type']}")
        pieces = [(str(piece), float(score)) for piece, score in saved["model"]["vocab"]]
        return models.Unigram(vocab=pieces, unk_id=unknown, byte_fallback=False)
    except Exception as error:
        if type(error) not in (
            Exception,
            KeyError,
            TypeError,
            ValueError,
        ):  # the library raises nothing narrower
            raise
        raise CheckpointError(f"{file}: not a unigram vocabulary ({error})") from error


def _character_map(file: Path, saved: Mapping[str, Any]) -> bytes | None:
    """Find SentencePiece's normalisation of characters. Other normalizers are not of the class."""
    normalizer = saved.get("normalizer") or {}
    steps = normalizer.get("normalizers", []) if normalizer.get("type") == "Sequence" else [normalizer]
    for step in steps:
        if step.get("type") == "Precompiled" and step.get("precompiled_charsmap"):
            try:
                return base64.b64decode(step["precompiled_charsmap"])
            except ValueError as error:
                raise CheckpointError(f"{file}: the character map is not base64 ({error})") from error
    return None


def _with_sentinels(settings: Mapping[str, Any], kind: UnigramClass) -> Mapping[str, Any]:
    given = list(settings.get("additional_special_tokens") or [])
    count = settings.get("extra_ids", kind.sentinels) if kind.sentinels else 0
    if not count or any("<extra_id_" in str(token) for token in given):
        return settings
    given += [f"<extra_id_{number}>" for number in range(count)]
    return {**settings, "additional_special_tokens": given}
