"""The kinds of cases, how often each comes, and a case by its name."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from tests.chaos.cases import http, images, parameters, protocol, teams, tensors, texts
from tests.chaos.cases.base import Case, Sent, World, chance
from tests.chaos.messages import Infer, grpc_bytes, http_bytes

__all__ = ["SHARES", "case", "kind_of_number"]

_Maker: TypeAlias = Callable[[random.Random, World], tuple[str, Infer | Sent]]

_MAKERS: Mapping[str, _Maker] = {
    "picture": images.changed_picture,
    "batch": images.batch,
    "costly": images.costly,
    "text": texts.texts,
    "labels": texts.labels,
    "prompts": texts.prompts,
    "fit": teams.fits,
    "state": teams.states,
    "parameter": parameters.parameters,
    "tensor": tensors.lying_tensor,
    "step": tensors.step,
    "json": protocol.broken_json,
    "http": http.broken_http,
    "protobuf": protocol.broken_protobuf,
    "raw": protocol.raw_bytes,
}
# Of 1,000 cases. Costly files and fits take a server the longest.
SHARES: Mapping[str, int] = {
    "picture": 340,
    "batch": 20,
    "costly": 1,
    "text": 110,
    "labels": 30,
    "prompts": 30,
    "fit": 10,
    "state": 100,
    "parameter": 80,
    "tensor": 80,
    "step": 70,
    "json": 50,
    "http": 29,
    "protobuf": 40,
    "raw": 10,
}


def kind_of_number(seed: int, number: int, kinds: Iterable[str] = ()) -> str:
    """Choose the kind of a numbered case."""
    chosen = list(kinds) or list(SHARES)
    rng = random.Random(f"{seed}:{number}")
    return rng.choices(chosen, [SHARES[kind] for kind in chosen])[0]


def case(kind: str, seed: int, number: int, world: World) -> Case:
    """Make a case. Equal arguments make equal bytes."""
    rng = random.Random(f"{kind}:{seed}:{number}")
    about, made = _MAKERS[kind](rng, world)
    if isinstance(made, Infer):
        over_http = chance(rng, 0.3)
        made = Sent("http", http_bytes(made)) if over_http else Sent("grpc", grpc_bytes(made))
    return Case(f"{kind}:{seed}:{number}", kind, f"{about} over {made.via}", made)
