"""Pictures of requests: spellings of base64, and what is taken for a picture."""

from __future__ import annotations

import base64
import random

import pytest
from gateways import PNG, URI

from siglip_gateway.inputs import File, Picture
from siglip_gateway.pictures import file_of, looks_like_a_picture, picture_of, read_header, standard_base64
from siglip_gateway.refusals import Refusal


@pytest.mark.parametrize("length", range(1, 20))
def test_every_spelling_of_base64_becomes_the_standard_one(length: int) -> None:
    data = random.Random(length).randbytes(length)
    standard = base64.b64encode(data).decode()
    safe = base64.urlsafe_b64encode(data).decode()
    broken = "\r\n".join(standard[index : index + 4] for index in range(0, len(standard), 4))
    for text in (standard, safe, standard.rstrip("="), safe.rstrip("="), broken, f" {safe}\t\n"):
        assert standard_base64(text, "x") == standard.encode()


@pytest.mark.parametrize("text", ["", "=", " ", "A", "AAAAA", "AA*A", "AA=A", "AA==AAAA", "\x00AAA", "ÄAAA"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(Refusal, match=r"x: ") as caught:
        standard_base64(text, "x")
    assert caught.value.status == 400


def test_a_picture_is_told_from_a_text() -> None:
    long = base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(100)).decode()
    assert all(map(looks_like_a_picture, (URI, long, "https://a.example/b.jpg", "data:;base64,AAAA")))
    assert not any(
        map(
            looks_like_a_picture,
            ("", "a dog", "/9j/ is how JPEG begins", "data: a word", "data:text/x,a", "A" * 200),
        )
    )


def test_a_data_uri_may_have_parameters() -> None:
    found = picture_of(URI.replace(";base64", ";charset=utf-8;base64"), "x")
    assert isinstance(found, Picture)
    assert file_of(found) == PNG


def test_headers_are_read() -> None:
    header = read_header(File("x", PNG))
    assert (header.width, header.height, header.format, header.bit_depth) == (5, 4, "png", 24)
    with pytest.raises(Refusal, match="x: the header"):
        read_header(File("x", b"nothing"))
