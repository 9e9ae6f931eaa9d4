"""Names of tensors without what a training run put into them.

Compilers and parallel wrappers put `_orig_mod.` and `module.` anywhere into names, trainers put `model.` in
front of all.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["plain_names"]

_WRAPPERS = ("_orig_mod", "module")
_TRAINER = "model."


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Map the names of all tensors to plain names. `model.` goes only where all names begin with it."""
    plain = {name: _unwrapped(name) for name in names}
    while plain and all(name.startswith(_TRAINER) for name in plain.values()):
        plain = {name: short.removeprefix(_TRAINER) for name, short in plain.items()}
    return plain


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
