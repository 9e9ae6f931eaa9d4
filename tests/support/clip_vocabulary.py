"""A small byte-pair vocabulary in CLIP's format, trained by the test."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

START, END = "<|startoftext|>", "<|endoftext|>"


def write_clip_vocabulary(path: Path, texts: Iterable[str], size: int = 900) -> int:
    """Write `vocab.json` and `merges.txt`; return the number of tokens, the end token last."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2,
        end_of_word_suffix="</w>",
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((text.lower() for text in texts), trainer)
    backend.model.save(str(path))
    vocabulary = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
    # As in the published vocabulary, these two are the last.
    vocabulary |= {START: len(vocabulary), END: len(vocabulary) + 1}
    (path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    return len(vocabulary)
