"""Cases of the fuzzer, which are bytes with a name, and the valid inputs from which they are made."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from images import encode, image_files, malformed_files, oriented_files, photo, sixteen_bit_files
from players import CROPS

from tests.chaos.messages import INFER, Infer, Tensor, of_rows

__all__ = [
    "EDGES",
    "Case",
    "Sent",
    "Via",
    "World",
    "build_world",
    "chance",
    "edge",
    "image_request",
    "picture",
    "small_photo",
]

Via: TypeAlias = Literal["grpc", "http", "tcp"]

# Whole numbers at which parsers and allocations change their minds.
EDGES: tuple[int, ...] = (
    0,
    1,
    -1,
    2,
    7,
    8,
    127,
    128,
    255,
    256,
    32767,
    32768,
    65535,
    65536,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
)
EDGES += (-(2**31), 2**63 - 1, -(2**63), 2**40)


@dataclass(frozen=True)
class Sent:
    """Bytes for the wire.

    Attributes:
        via: `grpc`: a message; `http`: a whole request; `tcp`: anything, to the port of gRPC.
        body: the bytes.
        method: path of the gRPC method.
        stream: the gRPC method takes a stream.
        framed: a request over HTTP that can be read, so that it has to be answered.
        whole: False if the server has to wait for more bytes.
    """

    via: Via
    body: bytes
    method: str = INFER
    stream: bool = False
    framed: bool = True
    whole: bool = True


@dataclass(frozen=True)
class Case:
    """A case of the fuzzer.

    Attributes:
        name: `kind:seed:number`, which makes the same case again.
        kind: of the generator.
        about: a few words for a person.
        sent: its bytes.
    """

    name: str
    kind: str
    about: str
    sent: Sent


@dataclass(frozen=True)
class World:
    """Valid inputs, from which cases are made.

    Attributes:
        pictures: image files by kind.
        broken: files that are no images, or incomplete ones.
        crops: image files of players.
        state: a team state that the server under test made.
        width: of an embedding.
        side: of the square that the tower sees.
        team_side: of the square that the tower of the teams sees.
    """

    pictures: Mapping[str, bytes]
    broken: Mapping[str, bytes]
    crops: Sequence[bytes]
    state: bytes = b""
    width: int = 128
    side: int = 96
    team_side: int = 96
    names: Sequence[str] = field(default=())


def build_world(state: bytes = b"", width: int = 128, side: int = 96, team_side: int = 96) -> World:
    """Encode the pictures; it takes some seconds."""
    pictures = {**image_files(), **oriented_files(), **{k: v for k, (v, _) in sixteen_bit_files().items()}}
    pictures = {name: data for name, data in pictures.items() if len(data) < 150_000}
    crops = [encode(crop, "JPEG") for crop in CROPS]
    return World(pictures, malformed_files(), crops, state, width, side, team_side, sorted(pictures))


def edge(rng: random.Random) -> int:
    """Choose a number at an edge, or next to one."""
    return rng.choice(EDGES) + rng.choice((0, 0, 0, 1, -1))


def chance(rng: random.Random, probability: float) -> bool:
    """Decide by chance."""
    return rng.random() < probability


def picture(rng: random.Random, world: World) -> tuple[str, bytes]:
    """Choose a valid picture."""
    name = rng.choice(world.names)
    return name, world.pictures[name]


def image_request(rng: random.Random, rows: Sequence[bytes], model: str = "") -> Infer:
    """Ask a model that takes images for the rows; the decoding step alone in half of all cases."""
    models = ("siglip_vision_process", "embed_image")
    tensors: list[Tensor] = [of_rows("INPUT_IMAGE", rows)]
    return Infer(model or rng.choice(models), tensors)


@functools.cache
def small_photo() -> bytes:
    """Encode a small valid JPEG."""
    return encode(photo(80, 60), "JPEG")
