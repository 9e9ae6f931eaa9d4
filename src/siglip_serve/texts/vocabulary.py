"""Parts that tokenizers share: vocabularies, special tokens, their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from siglip_serve.checkpoint.files import read_json
from siglip_serve.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Named", "content", "encode_all", "load_backend", "load_pairs", "special_tokens", "token_id"]

_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")
Named = dict[str, str]


def special_tokens(
    path: Path, settings: Mapping[str, Any], saved: Mapping[str, Any], defaults: Mapping[str, str]
) -> tuple[Named, list[tokenizers.AddedToken]]:
    """Find the named tokens, and what is added to the vocabulary unless it is there, in this order.

    Args:
        path: the checkpoint's directory.
        settings: its `tokenizer_config.json`.
        saved: its `tokenizer.json`, or an empty one.
        defaults: the class's tokens by name, such as `eos_token`.

    Raises:
        CheckpointError: the files describe tokens in another form.
    """
    from tokenizers import AddedToken

    try:
        named = {key: settings.get(key) or default for key, default in defaults.items()}
        extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
        extra = list(extra.values() if isinstance(extra, dict) else extra)
        decoder = settings.get("added_tokens_decoder")
        if decoder is None:  # the layout of old versions of the reference
            texts = read_json(path / "special_tokens_map.json", missing_ok=True)
            named |= {key: texts[key] for key in named if texts.get(key)}
            special = {content(token) for token in (*named.values(), *extra)}
            decoder = {
                index: {"content": token, "special": token in special, "normalized": token not in special}
                for token, index in read_json(path / "added_tokens.json", missing_ok=True).items()
            }
            decoder |= {token["id"]: token for token in saved.get("added_tokens", [])}
        added = [decoder[index] for index in sorted(decoder, key=int)]
        described = {content(token): token for token in added}
        tokens = [described.get(content(token), token) for token in (*named.values(), *extra)]
        return {key: content(token) for key, token in named.items()}, [
            AddedToken(token, special=True)
            if isinstance(token, str)
            else AddedToken(
                content(token), **{"special": True, **{flag: token[flag] for flag in _FLAGS if flag in token}}
            )
            for token in (*added, *tokens)
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the special tokens of the tokenizer are malformed ({error})"
        ) from error


def load_pairs(path: Path, saved: Mapping[str, Any], unknown: str) -> tokenizers.models.BPE:
    """Load CLIP's vocabulary and merges from `tokenizer.json`, or else from `vocab.json` and `merges.txt`.

    Raises:
        CheckpointError: the files are missing or malformed.
    """
    from tokenizers.models import BPE

    files = [path / "vocab.json", path / "merges.txt"]
    if not saved and not all(file.is_file() for file in files):
        raise CheckpointError(f"{path}: no tokenizer.json, and not both of vocab.json and merges.txt")
    try:
        if saved:
            model = saved["model"]
            pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
            vocabulary = model["vocab"]
        else:
            vocabulary, pairs = BPE.read_file(*map(str, files))
        return BPE(
            vocab=vocabulary,
            merges=pairs,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=unknown,
        )
    except Exception as error:
        if type(error) not in (Exception, KeyError, TypeError):  # the library raises nothing narrower
            raise
        named = "tokenizer.json" if saved else "vocab.json and merges.txt"
        raise CheckpointError(f"{path}: {named}: not a byte-pair vocabulary ({error})") from error


def load_backend(file: Path) -> tokenizers.Tokenizer:
    """Load a `tokenizer.json` as it is.

    Raises:
        CheckpointError: the file is missing or malformed.
    """
    from tokenizers import Tokenizer as Backend

    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    try:
        return Backend.from_file(str(file))
    except Exception as error:
        if type(error) is not Exception:  # the library raises nothing narrower for a malformed file
            raise
        raise CheckpointError(f"{file}: not a tokenizer ({error})") from error


def encode_all(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Compute the ids of texts with their special tokens, on several cores where there are many texts."""
    return [encoding.ids for encoding in backend.encode_batch_fast(texts)]


def token_id(backend: tokenizers.Tokenizer, source: Path, token: str) -> int:
    """Find the id of a token.

    Raises:
        CheckpointError: the vocabulary has no such token.
    """
    index = backend.token_to_id(token)
    if index is None:
        raise CheckpointError(f"{source}: the vocabulary has no {token!r}")
    return index


def content(token: str | Mapping[str, Any]) -> str:
    """Return the text of a token, which files give plainly or in an object."""
    return token if isinstance(token, str) else str(token["content"])
