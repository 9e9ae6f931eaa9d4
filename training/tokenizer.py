"""The checkpoint's sentencepiece vocabulary, and text to ids as SigLIP does it.

python -m training.tokenizer --pack .cache/art.npz --out spiece.model
"""

import random
import re
import string
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from training.pack import load_pack

__all__ = ["PROMPTS", "TEMPLATES", "Tokenizer", "main", "train_tokenizer", "variants"]

PAD_EOS = 1

TEMPLATES = (
    "{}",
    "a photo of a {}.",
    "a photo of the {}.",
    "a photo of {}.",
    "this is a photo of {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "a drawing of a {}.",
    "a drawing of the {}.",
    "a cartoon {}.",
    "an icon of a {}.",
    "a {} icon.",
    "an emoji of a {}.",
    "the {} emoji.",
    "a sketch of a {}.",
    "a painting of a {}.",
    "clip art of a {}.",
    "a symbol for {}.",
    "a black and white drawing of a {}.",
    "a low resolution photo of a {}.",
    "a bad photo of a {}.",
    "a good photo of the {}.",
    "a blurry photo of a {}.",
    "a close-up photo of a {}.",
    "a bright photo of a {}.",
    "a dark photo of the {}.",
    "a photo of a large {}.",
    "a photo of a small {}.",
    "a photo of one {}.",
    "a photo of my {}.",
    "a rendering of a {}.",
    "a 3d model of a {}.",
    "itap of a {}.",
    "art of the {}.",
    "a {}.",
    "the {}.",
    "some {}.",
    "a sticker of a {}.",
    "a logo of a {}.",
    "a toy {}.",
)
PROMPTS = (
    "{}",
    "a photo of a {}.",
    "a drawing of a {}.",
    "an icon of a {}.",
    "an image of a {}.",
    "the {} emoji.",
)


def canonical(text: str) -> str:
    """Lower case, no punctuation, single spaces."""
    return re.sub(r"\s+", " ", text.lower().translate(str.maketrans("", "", string.punctuation))).strip()


def train_tokenizer(names: Sequence[str], out: Path, vocabulary: int) -> None:
    """Write `out`, which ends in `.model`: a unigram model over `names` and the templates."""
    corpus = [canonical(name) for name in names] + [
        canonical(template.format("")) for template in TEMPLATES
    ] * 8
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus * 2),
        model_prefix=str(out.with_suffix("")),
        vocab_size=vocabulary,
        pad_id=0,
        eos_id=PAD_EOS,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        character_coverage=1.0,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    out.with_suffix(".vocab").unlink()


class Tokenizer:
    """Text -> int64 [n, context], ended and filled up with `</s>`."""

    def __init__(self, model: Path, context: int) -> None:
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
        self.context = context

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        ids = np.full((len(texts), self.context), PAD_EOS, np.int64)
        for row, text in zip(ids, texts, strict=True):
            found = self.pieces.encode(canonical(text))[: self.context - 1]
            row[: len(found)] = found
        return ids


def variants(label: str, aliases: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` ways of naming one concept. Two of three use its label, the others an alias of its own."""
    rng = random.Random(f"{seed}/{label}")
    names = [rng.choice(aliases) if aliases and n % 3 == 2 else label for n in range(count)]
    return [
        (rng.choice(TEMPLATES) if n % 2 else rng.choice(PROMPTS)).format(name) for n, name in enumerate(names)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, default=Path(".cache/art.npz"), help="what build_data wrote")
    parser.add_argument("--out", type=Path, required=True, help="the .model file to write")
    parser.add_argument("--vocabulary", type=int, default=1600, help="pieces")
    args = parser.parse_args(argv)
    aliases = [alias for concept in load_pack(args.pack).concepts for alias in concept["aliases"]]
    train_tokenizer(aliases, args.out, args.vocabulary)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
