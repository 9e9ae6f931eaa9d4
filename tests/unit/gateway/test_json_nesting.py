"""The depth of JSON, read in pieces of any size."""

from __future__ import annotations

import asyncio
import json
import random

import pytest

from siglip_gateway.doors.json_nesting import MOST_LEVELS, NestingScanner, refuse_deep_json
from siglip_gateway.doors.refusal import RefusedError

DEEP = b"[" * (MOST_LEVELS + 1) + b"]" * (MOST_LEVELS + 1)
ALLOWED = DEEP[1:-1]


def deepest(text: bytes, size: int) -> int:
    scanner = NestingScanner()
    for begin in range(0, len(text), size):
        scanner.feed(text[begin : begin + size])
    return scanner.deepest


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        (b"", 0),
        (b'{"a": [1, [2, {}]]}', 4),
        (b"[[],[],[[]]]", 3),
        (b'["[[[[", {"}}]": 1}]', 2),
        (rb'["\"[[", [1]]', 2),  # an escaped quote does not end the string
        (rb'["\\", [[1]]]', 3),  # an escaped backslash before the quote that ends it
        (rb'["\\\"[[[", 1]', 1),
        (b"[[[[", 4),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_counts_levels_outside_strings(text: bytes, levels: int, size: int) -> None:
    assert deepest(text, size) == levels


def test_agrees_with_the_depth_of_random_json() -> None:
    random.seed(7)

    def grow(levels: int) -> object:
        if levels == 0:
            return random.choice(['"[', "\\", "\\\\", '\\"', "]}", "plain", 1.5, None])
        children = [grow(random.randrange(levels)) for _ in range(random.randrange(3))]
        children.insert(random.randrange(len(children) + 1), grow(levels - 1))
        return (
            children
            if random.random() < 0.5
            else {f'{{"\\{key}': child for key, child in enumerate(children)}
        )

    for _ in range(200):
        levels = random.randrange(1, 9)
        text = json.dumps(grow(levels)).encode()
        assert deepest(text, random.randrange(1, 40)) == levels, text


@pytest.mark.parametrize("parts", [[DEEP], [DEEP[:40], DEEP[40:]], [b"[" * 160_000], [b"{" * 99, b'"']])
def test_refuses_more_levels_than_allowed(parts: list[bytes]) -> None:
    with pytest.raises(RefusedError, match="nested deeper than 64 levels") as refused:
        asyncio.run(refuse_deep_json(parts))
    assert refused.value.status == 400


@pytest.mark.parametrize("text", [ALLOWED, b"[" + b"[1]," * 9999 + b"1]", b'["' + DEEP + b'"]'])
def test_allows_wide_json_and_brackets_in_strings(text: bytes) -> None:
    asyncio.run(refuse_deep_json([text]))
    asyncio.run(refuse_deep_json([text[:7], text[7:]]))


def test_does_not_hold_up_the_event_loop() -> None:
    async def longest_pause() -> float:
        loop = asyncio.get_running_loop()
        work = asyncio.create_task(refuse_deep_json([b"[]," * 2_000_000]))
        longest, last = 0.0, loop.time()
        while not work.done():
            await asyncio.sleep(0)
            now = loop.time()
            longest, last = max(longest, now - last), now
        return longest

    assert asyncio.run(longest_pause()) < 0.2
