"""The named things: labels, aliases, and which of them make up the benchmark.

A concept is one emoji that is no flag and no modifier. Names: Unicode's CLDR, through emojibase (MIT).
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Concept", "benchmark_classes", "load_concepts", "name_index", "slug"]

COMPONENT, FLAGS = 2, 9
GROUPS_NAMED_LIKE_ICONS = {3, 4, 5, 6, 7}
_SHORTCODES = ("cldr", "emojibase", "github", "iamcal", "joypixels")
_COLOURS = {
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "light",
    "purple",
    "brown",
    "black",
    "white",
    "grey",
    "pink",
}
_COLOUR_OR_SIZE = _COLOURS | {"small", "medium", "large"}


@dataclass(frozen=True)
class Concept:
    """One named thing. `hexcode` has no variation selectors; `aliases` starts with `label`."""

    index: int
    hexcode: str
    label: str
    aliases: tuple[str, ...]
    group: int
    subgroup: int

    @property
    def synset(self) -> str:
        """`n` and the code point as eight decimal digits, as in ImageNet's folder names."""
        return f"n{int(self.hexcode.split('-')[0], 16):08d}"


def slug(text: str) -> str:
    """`Man's Shoe` -> `mans-shoe`."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"['’.]", "", text.lower())).strip("-")


def plain_hexcode(hexcode: str) -> str:
    """Lower-case, without variation selectors and joiners: vendors disagree on where to write those."""
    return "-".join(part for part in hexcode.lower().split("-") if part not in ("fe0f", "200d"))


def _words(name: str) -> str:
    return re.sub(r"[_\-\s]+", " ", re.sub(r"[“”’]", "", name.lower())).strip()


def load_concepts(cache: Path) -> list[Concept]:
    """Every non-flag emoji of emojibase, in Unicode's order of code points."""
    root = cache / "emojibase"
    entries: list[dict[str, Any]] = json.loads((root / "en/data.json").read_text())
    unicode_names: dict[str, str] = json.loads((root / "meta/unicode-names.json").read_text())
    codes = [json.loads((root / f"en/shortcodes/{name}.json").read_text()) for name in _SHORTCODES]
    kept = [e for e in entries if "group" in e and e["group"] not in (COMPONENT, FLAGS)]
    kept.sort(key=lambda e: plain_hexcode(e["hexcode"]))
    concepts = []
    for index, entry in enumerate(kept):
        names = [_words(entry["label"])]
        if entry["hexcode"] in unicode_names:
            names.append(_words(unicode_names[entry["hexcode"]]))
        for table in codes:
            found = table.get(entry["hexcode"], [])
            names += [_words(name) for name in ([found] if isinstance(found, str) else found)]
        names = [name for name in dict.fromkeys(names) if len(name) > 1 and name[0] not in "+-"]
        concepts.append(
            Concept(
                index=index,
                hexcode=plain_hexcode(entry["hexcode"]),
                label=names[0],
                aliases=tuple(names),
                group=entry["group"],
                subgroup=entry["subgroup"],
            )
        )
    return concepts


def name_index(concepts: Sequence[Concept], extra: Mapping[str, str], only_icons: bool) -> dict[str, int]:
    """Name in an art set -> concept.

    Args:
        concepts: as loaded.
        extra: names that an art set with code points uses, as name -> plain hexcode.
        only_icons: leave out aliases of faces, people and symbols; `ok` or `smile` mean
            other things in icon sets.
    """
    by_hexcode = {concept.hexcode: concept.index for concept in concepts}
    first: dict[str, int] = {}
    for concept in concepts:
        first.setdefault(slug(concept.label), concept.index)
    for name, hexcode in extra.items():
        if hexcode in by_hexcode:
            first.setdefault(name, by_hexcode[hexcode])
    claims: dict[str, set[int]] = {}
    for concept in concepts:
        if only_icons and concept.group not in GROUPS_NAMED_LIKE_ICONS:
            continue
        for alias in concept.aliases[1:]:
            claims.setdefault(slug(alias), set()).add(concept.index)
    for name, indices in claims.items():
        if len(indices) == 1 and len(name) > 2:
            first.setdefault(name, next(iter(indices)))
    return first


def _bare(label: str) -> str:
    return " ".join(word for word in re.split(r"[\s\-]+", label) if word not in _COLOUR_OR_SIZE)


def benchmark_classes(
    concepts: Sequence[Concept], drawings: Iterable[tuple[str, int]], held_out: Sequence[str], count: int
) -> list[int]:
    """The `count` concepts with most training drawings that a benchmark can fairly ask for.

    A class is one code point with a label of its own, drawn in every held-out style. Clock faces and
    keycaps are none. Of labels that differ by a word of colour or size alone one is kept: a drawing in one
    ink at a random scale cannot show the difference.

    Args:
        concepts: as loaded.
        drawings: (style, concept) of every drawing.
        held_out: names of the held-out styles.
        count: how many classes; raises ValueError if there are fewer.
    """
    drawn: dict[int, set[str]] = {}
    training: Counter[int] = Counter()
    for style, concept in drawings:
        drawn.setdefault(concept, set()).add(style)
        training[concept] += style not in held_out
    label_count = Counter(concept.label for concept in concepts)
    eligible = [
        c
        for c in concepts
        if "-" not in c.hexcode
        and label_count[c.label] == 1
        and set(held_out) <= drawn.get(c.index, set())
        and training[c.index] >= 10
        and not re.search(r"oclock|thirty|keycap", c.label)
    ]
    eligible.sort(key=lambda c: (-training[c.index], c.hexcode))
    kept: dict[str, Concept] = {}
    for candidate in eligible:
        kept.setdefault(_bare(candidate.label) or candidate.label, candidate)
    if len(kept) < count:
        raise ValueError(f"{count} classes asked for, {len(kept)} are eligible")
    return sorted(concept.index for concept in list(kept.values())[:count])
