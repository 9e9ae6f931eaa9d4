"""JSON objects of which one place is wrong."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

__all__ = ["mutated"]

_STRANGE: list[Any] = [
    *(None, True, 0, -1, 1.5, 2**53, "", "\x00", "data:", "https://", "ü" * 50, "=" * 9, "A"),
    *([], [[]], [None], [[1, 2]], {}, {"": None}, {"url": {}}, {"content": 1}, ["a"] * 100),
]


def mutated(body: Any, rng: random.Random, strange: Sequence[Any] = ()) -> Any:
    """A copy of the body with one place replaced, removed, doubled or renamed.

    Args:
        strange: further values for the place.
    """
    body = copy.deepcopy(body)
    places: list[tuple[Any, Any]] = []
    left = [body]
    while left:
        node = left.pop()
        keys: Any = node.keys() if isinstance(node, dict) else range(len(node))
        places += [(node, key) for key in keys]
        left += [node[key] for key in keys if isinstance(node[key], dict | list)]
    node, key = rng.choice(places)
    action = rng.randrange(5)
    if action == 0:
        del node[key]
    elif action == 1 and isinstance(node, dict):
        node[f"{key}s"] = node.pop(key)
    elif action == 2 and isinstance(node[key], str):
        at = rng.randrange(len(node[key]) + 1)
        node[key] = node[key][:at] + rng.choice(["", "*", "\n", "é", "="]) + node[key][at + 1 :]
    else:
        node[key] = rng.choice([*_STRANGE, *strange])
    return body
