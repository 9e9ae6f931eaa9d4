"""Inputs of a request: texts and pictures, each with the place where the caller wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["File", "Input", "Link", "Picture", "Resolved", "Text"]


@dataclass(frozen=True)
class Text:
    """A text.

    Attributes:
        where: its place in the request, for messages, such as `input[3]`.
    """

    where: str
    text: str


@dataclass(frozen=True)
class Picture:
    """An image file as standard base64 text, which is passed on undecoded."""

    where: str
    base64: bytes


@dataclass(frozen=True)
class File:
    """An image file as bytes."""

    where: str
    data: bytes


@dataclass(frozen=True)
class Link:
    """An image file at an http or https URL, which is still to be fetched."""

    where: str
    url: str


Input: TypeAlias = Text | Picture | File | Link
Resolved: TypeAlias = Text | Picture | File
