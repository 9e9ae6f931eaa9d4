"""The way of open_clip from a text to ids: cleaning, and the tokenizer of its CLIP.

Texts are repaired by ftfy and unescaped from HTML, as in open_clip 3.3, before any tokenizer sees them. The
package ftfy is needed for that.

Its own tokenizer (`SimpleTokenizer`) differs from transformers' in what a word is. Case is ignored in
contractions, and `<start_of_text>` and `<end_of_text>` are the special tokens. Padding has id 0.
"""

from __future__ import annotations

import html
import string
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from siglip_serve.checkpoint.files import read_json
from siglip_serve.errors import CheckpointError
from siglip_serve.texts.vocabulary import load_pairs

__all__ = ["OpenClipPairs", "cleaner"]

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_START, _END = "<start_of_text>", "<end_of_text>"
# Their names in the vocabulary files, which are those of transformers.
_NAMED = {_START: "<|startoftext|>", _END: "<|endoftext|>"}
# open_clip ignores case everywhere. In its last class that drops one mark, whose upper case is a letter.
_DROPPED = "\u0345"
_WORDS = rf"(?i:{_START}|{_END}|'s|'t|'re|'ve|'m|'ll|'d)|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}{_DROPPED}]+"
_CACHED_WORDS = 65_536


def cleaner(path: Path, how: str) -> Callable[[str], str]:
    """Make the function that cleans texts.

    Args:
        path: the checkpoint's directory, for messages.
        how: `lower`, `whitespace` (case is kept) or `canonicalize` (punctuation goes, too).

    Raises:
        CheckpointError: the package ftfy is not installed.
    """
    try:
        import ftfy
    except ImportError as error:
        raise CheckpointError(
            f"{path}: open_clip repairs texts with the package ftfy, which is not installed (extra runtime)"
        ) from error

    def clean(text: str) -> str:
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        if how == "canonicalize":
            text = text.replace("_", " ").translate(_NO_PUNCTUATION).lower()
        text = " ".join(text.split())
        return text.lower() if how == "lower" else text

    return clean


class OpenClipPairs:
    """Callable from a cleaned text to its ids with special tokens: open_clip's `SimpleTokenizer`.

    Args:
        path: the checkpoint's directory. It has the vocabulary as transformers writes it.

    Attributes:
        pad_id: id of the padding.
        ids: ids of start and end by their text.

    Raises:
        CheckpointError: a file is missing or malformed, or the vocabulary lacks the two special tokens.
    """

    def __init__(self, path: Path) -> None:
        from tokenizers import Regex, pre_tokenizers

        saved = read_json(path / "tokenizer.json", missing_ok=True)
        self._pairs = load_pairs(path, saved, _NAMED[_END])
        found = {token: self._pairs.token_to_id(name) for token, name in _NAMED.items()}
        self.ids = {token: index for token, index in found.items() if index is not None}
        for token, name in _NAMED.items():
            if token not in self.ids:
                raise CheckpointError(f"{path}: the vocabulary has no {name!r}")
        self.pad_id = 0
        self._split = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
        self._bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._word = lru_cache(_CACHED_WORDS)(self._encode_word)

    def __call__(self, text: str, limit: int | None) -> list[int]:
        """Compute the ids of `text` with its special tokens, at most `limit` of them, the end kept."""
        words = self._split.pre_tokenize_str(text)
        ids = [self.ids[_START], *(index for word, _ in words for index in self._word(word)), self.ids[_END]]
        return ids if limit is None or len(ids) <= limit else [*ids[: limit - 1], self.ids[_END]]

    def many(self, texts: Sequence[str]) -> Sequence[list[int]]:
        """Compute the ids of each text with its special tokens."""
        return [self(text, None) for text in texts]

    def _encode_word(self, word: str) -> tuple[int, ...]:
        if word in self.ids:
            return (self.ids[word],)
        ((mapped, _),) = self._bytes.pre_tokenize_str(word)
        return tuple(token.id for token in self._pairs.tokenize(mapped))
