"""Token ids `[context_length]` int64 of a text, as the text tower was trained on them.

The kinds are told apart by `tokenizer_class` in the checkpoint's `tokenizer_config.json`:

- SigLIP 1 (`SiglipTokenizer`, `spiece.model`): lowercased, ASCII punctuation removed, whitespace
  collapsed, then sentencepiece. It ends with `</s>` and is padded with `</s>`.
- SigLIP 2 (`Siglip2Tokenizer`, `GemmaTokenizer`, `tokenizer.json`): lowercased, punctuation kept, then
  Gemma's byte-pair encoding. It ends with `<eos>` and is padded with `<pad>`.
- CLIP (`CLIPTokenizer`, `tokenizer.json`, or `vocab.json` and `merges.txt`): lowercased, whitespace
  collapsed, then byte-pair encoding. It stands between `<|startoftext|>` and `<|endoftext|>`.
- MetaCLIP 2 (`XLMRobertaTokenizer`, `tokenizer.json`): whitespace collapsed, then a unigram vocabulary. It
  stands between `<s>` and `</s>`.

The ids are those of transformers 5.x `SiglipTokenizer`, `Siglip2Tokenizer`, `CLIPTokenizer` and
`XLMRobertaTokenizer`, special tokens written in the text included. The package transformers is not needed.
A checkpoint in open_clip's layout gets the ids of open_clip, which cleans texts first. SigLIP's tower pools
the last position, so a text is always padded to the full context length.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from siglip_serve.checkpoint.files import is_open_clip, read_json
from siglip_serve.checkpoint.model_config import ModelConfig
from siglip_serve.checkpoint.open_clip import open_clip_tokenizer
from siglip_serve.errors import CheckpointError, TextError
from siglip_serve.texts.open_clip import OpenClipPairs, cleaner
from siglip_serve.texts.unigram import T5, XLM_ROBERTA, Unigram
from siglip_serve.texts.vocabulary import (
    content,
    encode_all,
    load_backend,
    load_pairs,
    special_tokens,
    token_id,
)

if TYPE_CHECKING:
    import sentencepiece

__all__ = ["Tokenizer", "decode_text", "find_tokenizer", "load_tokenizer"]

_UNDERLINE = "▁"
_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]+")
_SENTENCEPIECE_CLASSES = {"SiglipTokenizer", "SiglipTokenizerFast"}
_GEMMA_CLASSES = {"GemmaTokenizer", "GemmaTokenizerFast", "Siglip2Tokenizer", "TokenizersBackend"}
_CLIP_CLASSES = {"CLIPTokenizer", "CLIPTokenizerFast"}
_XLM_CLASSES = {"XLMRobertaTokenizer", "XLMRobertaTokenizerFast"}
_T5_CLASSES = {"T5Tokenizer", "T5TokenizerFast"}
# Parts of CLIP's words: its own two tokens, contractions, letters, single digits, other characters.
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_CLIP_START, _CLIP_END = "<|startoftext|>", "<|endoftext|>"
_CLIP_NAMED = {
    "bos_token": _CLIP_START,
    "eos_token": _CLIP_END,
    "unk_token": _CLIP_END,
    "pad_token": _CLIP_END,
}


class _Encoder(Protocol):
    pad_id: int

    def __call__(self, text: str, limit: int | None) -> list[int]:
        """The ids of `text` with its special tokens, at most `limit` of them, the end token kept."""

    def many(self, texts: Sequence[str]) -> Sequence[list[int]]:
        """The ids of each text, as a call without `limit` finds them, in less time."""


class Tokenizer:
    """Callable that turns one text into the ids of a checkpoint's text tower.

    Attributes:
        context_length: how many ids the tower takes, from the checkpoint's `config.json`.
    """

    def __init__(
        self,
        encoder: _Encoder,
        config: ModelConfig,
        padding_side: Literal["left", "right"],
        clean: Callable[[str], str] | None = None,
    ) -> None:
        self.context_length = config.text.max_position_embeddings
        self._encoder = encoder
        self._vocab_size = config.text.vocab_size
        self._padding_side = padding_side
        self._clean = clean or _unchanged

    def __call__(self, text: str, truncation: bool = False) -> NDArray[np.int64]:
        """Token ids of `text`, int64 `[context_length]`, padded.

        Args:
            text: any text with at least one character that is not whitespace.
            truncation: cut a text that does not fit, keeping the end token, instead of raising.

        Raises:
            TextError: empty, longer than the context, or holding a token the tower has no embedding for.
        """
        return self._pad([self.encode(text, truncation)])[0]

    def encode(self, text: str, truncation: bool = False) -> list[int]:
        """The ids of `text` without padding, at most `context_length`. It raises the errors of a call."""
        if not text.strip():
            raise _empty()
        return self._fitting(self._encoder(self._clean(text), self.context_length if truncation else None))

    def batch(
        self, texts: Sequence[str], truncation: bool = False
    ) -> tuple[NDArray[np.int64], dict[int, TextError]]:
        """Token ids of several texts, as a call finds them for each, in less time.

        Args:
            texts: as of a call.
            truncation: as of a call.

        Returns:
            int64 `[texts, context_length]`, and the errors of refused texts by index. Their rows are padding.
        """
        refused = {index: _empty() for index, text in enumerate(texts) if not text.strip()}
        kept = {index: self._clean(text) for index, text in enumerate(texts) if index not in refused}
        rows: list[list[int]] = [[]] * len(texts)
        for (index, text), ids in zip(kept.items(), self._encoder.many(list(kept.values())), strict=True):
            cut = truncation and len(ids) > self.context_length
            try:
                rows[index] = self._fitting(self._encoder(text, self.context_length) if cut else ids)
            except TextError as error:
                refused[index] = error
        return self._pad(rows), refused

    def _fitting(self, ids: list[int]) -> list[int]:
        """Return ids that the tower can take.

        Raises:
            TextError: there is none, they are too many, or one is outside of the vocabulary.
        """
        if not ids:
            raise _empty()
        if len(ids) > self.context_length:
            raise TextError(
                f"the text has {len(ids)} tokens and {self.context_length} fit: shorten it, or set truncation"
            )
        # An id beyond the embedding table would kill the device's context for every later request.
        if max(ids) >= self._vocab_size:
            raise TextError(
                f"the text has token id {max(ids)}, the model has {self._vocab_size} token embeddings"
            )
        return ids

    def _pad(self, rows: Sequence[list[int]]) -> NDArray[np.int64]:
        padded = np.full((len(rows), self.context_length), self._encoder.pad_id, dtype=np.int64)
        for row, ids in zip(padded, rows, strict=True):
            start = self.context_length - len(ids) if self._padding_side == "left" else 0
            row[start : start + len(ids)] = ids
        return padded


def _empty() -> TextError:
    return TextError("the text is empty")


def decode_text(data: bytes, max_bytes: int) -> str:
    """Decode UTF-8 text.

    Raises:
        TextError: longer than `max_bytes`, or not UTF-8. The message names the first bad byte.
    """
    if len(data) > max_bytes:
        raise TextError(f"{len(data)} bytes, at most {max_bytes} are allowed")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"not UTF-8 text (byte 0x{data[error.start]:02x} at position {error.start})"
        ) from error


def load_tokenizer(config: ModelConfig) -> Tokenizer:
    """Load the tokenizer of a checkpoint's directory.

    Raises:
        CheckpointError: a file is missing or malformed, or the tokenizer is of another kind.
    """
    load = find_tokenizer(config)
    if not is_open_clip(config.path):
        return load(None)
    return load(cleaner(config.path, open_clip_tokenizer(config.path)[1]))


def find_tokenizer(config: ModelConfig) -> Callable[[Callable[[str], str] | None], Tokenizer]:
    """Choose a checkpoint's tokenizer without loading it. The result takes a function that cleans texts.

    Raises:
        CheckpointError: the tokenizer is of a kind that is not served.
    """
    path = config.path
    settings = read_json(path / "tokenizer_config.json", missing_ok=True)
    if settings.get("truncation_side", "right") != "right":
        raise CheckpointError(f"{path}: truncation_side is {settings['truncation_side']!r}, expected 'right'")
    open_clip = is_open_clip(path)
    if open_clip and open_clip_tokenizer(path)[0]:
        return lambda clean: _checked(OpenClipPairs(path), config, settings, clean)
    name = settings.get("tokenizer_class") or _default_class(config)
    clip_family = config.family == "clip"
    if clip_family and name in _CLIP_CLASSES:
        return lambda clean: _checked(_Clip(path, settings), config, settings, clean)
    if clip_family and name in _XLM_CLASSES:
        return lambda clean: _checked(Unigram(path, settings, XLM_ROBERTA), config, settings, clean)
    if open_clip and not clip_family and name in _T5_CLASSES:
        side = _side(settings, "right", path)
        return lambda clean: Tokenizer(Unigram(path, settings, T5), config, side, clean)
    if not clip_family and name in _SENTENCEPIECE_CLASSES:
        side = _side(settings, "right", path)
        return lambda clean: Tokenizer(_SentencePiece(path, settings), config, side, clean)
    if not clip_family and name in _GEMMA_CLASSES:
        return lambda clean: _load_gemma(config, settings, clean)
    known = _CLIP_CLASSES | _XLM_CLASSES if clip_family else _SENTENCEPIECE_CLASSES | _GEMMA_CLASSES
    known = known | (_T5_CLASSES if open_clip and not clip_family else set())
    raise CheckpointError(f"{path}: tokenizer_class is {name!r}, expected one of {', '.join(sorted(known))}")


def _default_class(config: ModelConfig) -> str:
    """Choose the class of a directory whose settings name none."""
    if config.family == "clip":
        return "XLMRobertaTokenizer" if config.multilingual else "CLIPTokenizer"
    return "SiglipTokenizer" if (config.path / "spiece.model").is_file() else "Siglip2Tokenizer"


def _checked(
    encoder: _Clip | Unigram | OpenClipPairs,
    config: ModelConfig,
    settings: dict[str, Any],
    clean: Callable[[str], str] | None,
) -> Tokenizer:
    """Make the tokenizer of a CLIP, whose padding is not seen behind the end token."""
    if _side(settings, "right", config.path) != "right":  # before the text, it would need a mask
        raise CheckpointError(f"{config.path}: padding_side is 'left', expected 'right'")
    for token, index in encoder.ids.items():  # those that the vocabulary lacks come behind it
        if index >= config.text.vocab_size:
            raise CheckpointError(
                f"{config.path}: the token {token!r} has id {index}, "
                f"the model has {config.text.vocab_size} token embeddings"
            )
    return Tokenizer(encoder, config, "right", clean)


def _load_gemma(
    config: ModelConfig, settings: dict[str, Any], clean: Callable[[str], str] | None
) -> Tokenizer:
    if clean is not None:  # its cleaning decides about case
        settings = {**settings, "do_lower_case": False}
    gemma = _Gemma(config.path, settings)
    return Tokenizer(gemma, config, _side(settings, gemma.padding_side, config.path), clean)


def _unchanged(text: str) -> str:
    return text


class _SentencePiece:
    """transformers' `SiglipTokenizer`, step by step."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._model = _load_sentencepiece(path / "spiece.model")
        self._lowercase = settings.get("do_lower_case", True)
        self._unk = content(settings.get("unk_token", "<unk>"))
        eos, pad = (content(settings.get(key, "</s>")) for key in ("eos_token", "pad_token"))
        added = {content: int(index) for index, content in _added_tokens(settings).items()}
        self._special = {
            token: added[token] if token in added else self._id(path, token)
            for token in {self._unk, eos, pad, *added}
        }
        self._split = re.compile(
            "|".join(re.escape(token) for token in sorted(self._special, key=len, reverse=True))
        )
        self._eos_id, self.pad_id = self._special[eos], self._special[pad]
        self._unk_length = len(self._model.encode(self._unk))
        # No piece of a text that names no special token is one, unless it is a piece of the vocabulary.
        self._apart = all(
            self._model.id_to_piece(piece := self._model.piece_to_id(token)) == token
            and (self._model.is_control(piece) or self._model.is_unknown(piece))
            for token in self._special
        )

    def _id(self, path: Path, token: str) -> int:
        index: int = self._model.piece_to_id(token)
        if self._model.id_to_piece(index) != token:
            raise CheckpointError(f"{path / 'spiece.model'}: the vocabulary has no {token!r}")
        return index

    def __call__(self, text: str, limit: int | None) -> list[int]:
        pieces = self._pieces(_UNDERLINE + text.replace(_UNDERLINE, " "))
        if len(pieces) > 1 and pieces[0] == _UNDERLINE and pieces[1] in self._special:
            del pieces[0]
        ids = [
            self._special[piece] if piece in self._special else self._model.piece_to_id(piece)
            for piece in pieces
        ]
        if limit is not None:
            ids = ids[: limit - 1]
        return ids if ids and ids[-1] == self._eos_id else [*ids, self._eos_id]

    def many(self, texts: Sequence[str]) -> Sequence[list[int]]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[int]:
        if not self._apart or self._split.search(text):
            return self(text, None)
        text = self._canonical(_UNDERLINE + text.replace(_UNDERLINE, " "))
        # As in `_segment`, without a look at the pieces.
        ids: list[int] = self._model.encode(self._unk + text)
        if len(ids) >= self._unk_length:
            del ids[: self._unk_length]
        ids.append(self._eos_id)
        return ids

    def _pieces(self, text: str) -> list[str]:
        pieces: list[str] = []
        start = 0
        for match in self._split.finditer(text):
            pieces += [*self._segment(text[start : match.start()]), match.group()]
            start = match.end()
        return pieces + self._segment(text[start:])

    def _segment(self, text: str) -> list[str]:
        text = self._canonical(text)
        # sentencepiece drops a leading space marker, so the reference shields it behind the unknown token.
        pieces: list[str] = self._model.encode(self._unk + text, out_type=str)
        return pieces[self._unk_length :] if len(pieces) >= self._unk_length else pieces

    def _canonical(self, text: str) -> str:
        text = text.lower() if self._lowercase else text
        return " ".join(_PUNCTUATION.sub("", text).split())


class _Gemma:
    """transformers' `Siglip2Tokenizer`: the file's own byte-pair encoding behind a lowercasing step.

    transformers' `AutoTokenizer` opens the fixed-resolution SigLIP 2 checkpoints with `GemmaTokenizer`,
    which forgets their `do_lower_case`. The towers were trained on lowercase text, so it is kept here.
    The file's `post_processor` says which end tokens are added. `add_eos_token` is not read.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        from tokenizers import normalizers

        self._tokenizer = load_backend(path / "tokenizer.json")
        self.padding_side = (self._tokenizer.padding or {}).get("direction", "right")
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if settings.get("do_lower_case", True):
            steps = [normalizers.Lowercase(), self._tokenizer.normalizer]
            self._tokenizer.normalizer = normalizers.Sequence([step for step in steps if step is not None])
        self._ends = self._tokenizer.num_special_tokens_to_add(False)
        pad = content(settings.get("pad_token", "<pad>"))
        self.pad_id = token_id(self._tokenizer, path / "tokenizer.json", pad)

    def __call__(self, text: str, limit: int | None) -> list[int]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if limit is not None:
            encoding.truncate(limit - self._ends)
        return list(self._tokenizer.post_process(encoding).ids)

    def many(self, texts: Sequence[str]) -> Sequence[list[int]]:
        return encode_all(self._tokenizer, texts)


class _Clip:
    """transformers' `CLIPTokenizer`: of the files, only the vocabulary and the special tokens count."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        from tokenizers import Regex, normalizers, pre_tokenizers, processors
        from tokenizers import Tokenizer as Backend

        saved = read_json(path / "tokenizer.json", missing_ok=True)
        named, added = special_tokens(path, settings, saved, _CLIP_NAMED)
        self._tokenizer = backend = Backend(load_pairs(path, saved, named["unk_token"]))
        backend.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        backend.add_tokens(added)
        backend.encode_special_tokens = settings.get("split_special_tokens") is True
        start, end, pad = named["bos_token"], named["eos_token"], named["pad_token"]
        self.ids = {token: token_id(backend, path, token) for token in (start, end, pad)}
        self.pad_id = self.ids[pad]
        backend.post_processor = processors.RobertaProcessing(
            (end, self.ids[end]), (start, self.ids[start]), False, False
        )
        self._ends = backend.num_special_tokens_to_add(False)

    def __call__(self, text: str, limit: int | None) -> list[int]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if limit is not None:
            encoding.truncate(limit - self._ends)
        return list(self._tokenizer.post_process(encoding).ids)

    def many(self, texts: Sequence[str]) -> Sequence[list[int]]:
        return encode_all(self._tokenizer, texts)


def _load_sentencepiece(file: Path) -> sentencepiece.SentencePieceProcessor:
    import sentencepiece

    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{file}: not a sentencepiece model ({error})") from error


def _added_tokens(settings: dict[str, Any]) -> dict[str, str]:
    return {index: content(token) for index, token in settings.get("added_tokens_decoder", {}).items()}


def _side(settings: dict[str, Any], default: str, path: Path) -> Literal["left", "right"]:
    side = settings.get("padding_side", default)
    if side == "left" or side == "right":  # noqa: PLR1714 - narrows the type
        return side
    raise CheckpointError(f"{path}: padding_side is {side!r}, expected 'left' or 'right'")
