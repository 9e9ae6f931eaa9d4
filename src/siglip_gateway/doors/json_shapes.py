"""Refuse shapes in JSON whose number of elements overflows, without parsing the JSON."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from siglip_gateway.doors.length_prefixes import TensorError, check_shape
from siglip_gateway.doors.refusal import RefusedError

__all__ = ["refuse_huge_shapes"]

_SPACE = b" \t\r\n"
# The member "shape", each letter of which may be escaped, and its list of whole numbers.
_KEY = "".join(rf"(?:{letter}|\\u00{ord(letter):x})" for letter in "shape").encode()
_SHAPE = re.compile(rb'"%b":\[(-?[0-9]+(?:,-?[0-9]+)*)\]' % _KEY)
# Bytes of a member that matters: eight numbers of 64 bits. No model has tensors of as many sides.
_LONGEST = 512


async def refuse_huge_shapes(pieces: AsyncIterator[bytes]) -> None:
    """Check the shapes of a text of JSON that arrives in pieces.

    Raises:
        RefusedError: 400, one has too many elements.
    """
    rest = b""
    async for piece in pieces:
        text = rest + piece.translate(None, _SPACE)
        for found in _SHAPE.finditer(text):
            sides = found[1].split(b",")
            if max(map(len, sides)) > _LONGEST:
                continue  # Triton takes numbers of 64 bits
            try:
                check_shape("inputs", [int(side) for side in sides])
            except TensorError as error:
                raise RefusedError(400, str(error)) from error
        rest = text[-_LONGEST:]
