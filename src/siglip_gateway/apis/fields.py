"""Fields of JSON objects, read with messages that name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from siglip_gateway.refusals import Refusal

__all__ = ["boolean", "chosen", "integer", "listed", "number", "texts_of", "whole", "wrong"]

_NAMES = {
    "dict": "an object",
    "list": "a list",
    "str": "a text",
    "int": "a number",
    "float": "a number",
    "bool": "a truth value",
    "NoneType": "null",
}


def wrong(where: str, value: object, expected: str) -> Refusal:
    """The refusal of a value of a wrong type."""
    kind = _NAMES.get(type(value).__name__, type(value).__name__)
    return Refusal(400, f"{where}: {kind}, expected {expected}", param=where, code="invalid_type")


def listed(body: Mapping[str, Any], name: str) -> list[Any]:
    """A list, or an empty one where it is missing or null.

    Raises:
        Refusal: 400, another type.
    """
    value = body.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise wrong(name, value, "a list")
    return value


def texts_of(body: Mapping[str, Any], name: str) -> list[str]:
    """A list of texts, or an empty one where it is missing or null.

    Raises:
        Refusal: 400, another type. The message names the index.
    """
    values = listed(body, name)
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise wrong(f"{name}[{index}]", value, "a text")
    return values


def boolean(body: Mapping[str, Any], name: str, default: bool | None = None) -> bool | None:
    """A truth value.

    Raises:
        Refusal: 400, another type.
    """
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def whole(body: Mapping[str, Any], name: str) -> int | None:
    """A whole number, or None where it is missing or null.

    Raises:
        Refusal: 400, another type.
    """
    value = body.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise wrong(name, value, "a whole number")
    return value


def integer(value: object, where: str, bits: int) -> int:
    """A whole number that fits `bits` bits, with its sign.

    Raises:
        Refusal: 400, another type, or a number that does not fit.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong(where, value, "a whole number")
    if not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
        raise Refusal(
            400, f"{where}: {value}, expected a number of {bits} bits", param=where, code="invalid_value"
        )
    return value


def number(body: Mapping[str, Any], name: str, least: float, most: float) -> float | None:
    """A number between two others, or None where it is missing or null.

    Raises:
        Refusal: 400, another type, or beyond the limits.
    """
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(name, value, f"a number from {least:g} to {most:g}")
    if not least <= value <= most:
        raise Refusal(
            400, f"{name}: {value}, expected {least:g} to {most:g}", param=name, code="invalid_value"
        )
    return float(value)


def chosen(value: object, name: str, choices: Sequence[str]) -> str:
    """One of some words.

    Raises:
        Refusal: 400, another value. The message lists the words.
    """
    if not isinstance(value, str) or value not in choices:
        shown = repr(value)[:60]
        raise Refusal(
            400, f"{name}: {shown}, expected one of {', '.join(choices)}", param=name, code="invalid_value"
        )
    return value
