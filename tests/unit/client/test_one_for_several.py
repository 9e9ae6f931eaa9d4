"""One path, one text or one image where a method of a client expects several."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from siglip_serve_client import AsyncClient, Client

NOBODY = "127.0.0.1:9"  # no request must reach it
PICTURE = b"an encoded image"

# Calls of a method with one value in place of several, by the name of the argument.
CALLS: list[tuple[str, Callable[[Any, Any], Any]]] = [
    ("images", lambda client, one: client.embed_images(one)),
    ("images", lambda client, one: client.classify_images(one, ["dog"])),
    ("labels", lambda client, one: client.classify_images([PICTURE], one)),
    ("templates", lambda client, one: client.classify_images([PICTURE], ["dog"], templates=one)),
    ("texts", lambda client, one: client.embed_texts(one)),
    ("labels", lambda client, one: client.classify(PICTURE, one)),
    ("templates", lambda client, one: client.classify(PICTURE, ["dog"], templates=one)),
    ("prompts", lambda client, one: client.explain(PICTURE, one)),
    ("templates", lambda client, one: client.explain(PICTURE, ["dog"], templates=one)),
    ("background", lambda client, one: client.explain(PICTURE, ["dog"], background=one)),
    ("crops", lambda client, one: client.fit_teams(crops=one)),
    ("roles", lambda client, one: client.fit_teams(crops=[PICTURE], roles=one)),
    ("boxes", lambda client, one: client.fit_teams(frame=PICTURE, boxes=one)),
    ("crops", lambda client, one: client.classify_teams(state=b"", crops=one)),
    ("boxes", lambda client, one: client.classify_teams(state=b"", frame=PICTURE, boxes=one)),
]
ONE = ["photo.jpg", b"photo", bytearray(b"photo"), Path("photo.jpg")]
ONE_IMAGE = [
    Image.new("RGB", (8, 8)),
    np.zeros((8, 9, 3), np.uint8),
    np.zeros((8, 9), np.uint8),
    np.zeros((8, 9, 1), np.uint8),
]


def ask(call: Callable[[Any, Any], Any], one: object) -> None:
    with Client(NOBODY, timeout=1) as client:
        answer = call(client, one)
        if isinstance(answer, Iterator):
            list(answer)


def ask_asynchronously(call: Callable[[Any, Any], Any], one: object) -> None:
    async def run() -> None:
        async with AsyncClient(NOBODY, timeout=1) as client:
            answer = call(client, one)
            if isinstance(answer, AsyncIterator):
                async for _ in answer:
                    pass
            else:
                await answer

    asyncio.run(run())


@pytest.mark.parametrize("one", ONE, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize(("argument", "call"), CALLS)
def test_refuses_one_value_where_several_are_expected(
    argument: str, call: Callable[[Any, Any], Any], one: object
) -> None:
    expected = f"^{argument}: one {type(one).__name__}, expected several"
    with pytest.raises(TypeError, match=expected):
        ask(call, one)
    with pytest.raises(TypeError, match=expected):
        ask_asynchronously(call, one)


@pytest.mark.parametrize("one", ONE_IMAGE, ids=lambda one: f"{type(one).__name__} {np.shape(one)}")
@pytest.mark.parametrize(("argument", "call"), [case for case in CALLS if case[0] in ("images", "crops")])
def test_refuses_one_image_where_several_are_expected(
    argument: str, call: Callable[[Any, Any], Any], one: object
) -> None:
    expected = f"^{argument}: one {type(one).__name__}, expected several images$"
    with pytest.raises(TypeError, match=expected):
        ask(call, one)
    with pytest.raises(TypeError, match=expected):
        ask_asynchronously(call, one)


def test_methods_that_give_an_iterator_refuse_when_they_are_called() -> None:
    with Client(NOBODY) as client, pytest.raises(TypeError, match=r"^images: one str"):
        client.embed_images("photo.jpg")


def test_an_array_of_images_is_several() -> None:
    frames = np.zeros((2, 8, 9, 3), np.uint8)
    with Client(NOBODY, timeout=1) as client:
        outcomes = list(client.embed_images(frames, color_order="RGB"))
    assert [type(outcome).__name__ for outcome in outcomes] == ["UnreachableError"] * 2


MISSPELT: list[tuple[Callable[[Any], Any], str]] = [
    (
        lambda client: client.explain(b"x", ["a"], sise=(3, 3)),
        "explain() has no argument 'sise'; did you mean 'size'?",
    ),
    (
        lambda client: client.fit_teams(crop=[b"x"]),
        "fit_teams() has no argument 'crop'; did you mean 'crops'?",
    ),
    (
        lambda client: client.classify_teams(state=b"x", crops=[], colour_order="RGB"),
        "classify_teams() has no argument 'colour_order'; did you mean 'color_order'?",
    ),
    (lambda client: client.fit_teams(crops=[], zzz=1), "fit_teams() has no argument 'zzz'"),
]


@pytest.mark.parametrize(("call", "message"), MISSPELT)
def test_names_a_misspelt_keyword(call: Callable[[Any], Any], message: str) -> None:
    with Client(NOBODY) as client, pytest.raises(TypeError) as refused:
        call(client)
    assert str(refused.value) == message

    async def run() -> None:
        async with AsyncClient(NOBODY) as asynchronous:
            await call(asynchronous)

    with pytest.raises(TypeError) as refused:
        asyncio.run(run())
    assert str(refused.value) == message
