"""Cases of tensors: shapes, types and byte counts that lie, and steps that are called out of turn."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from tests.chaos.cases.base import World, chance, edge, small_photo
from tests.chaos.cases.parameters import good_requests
from tests.chaos.messages import Infer, Tensor, of_array, of_rows

__all__ = ["lying_tensor", "step"]

Numbers: TypeAlias = np.ndarray[Any, np.dtype[Any]]
_DATATYPES = (
    "BOOL",
    "UINT8",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
    "BF16",
    "BYTES",
    "UINT64",
    "",
    "XX",
    "STRING",
)
_FLOATS = (0.0, 1.0, -1.0, 1e-45, 1e30, 3.4e38, float("nan"), float("inf"), -float("inf"))


def lying_tensor(rng: random.Random, world: World) -> tuple[str, Infer]:
    """Make a good request and let its tensors contradict themselves."""
    good = good_requests(world)
    weights = [1 if name.endswith("teams") or name == "explain_image" else 5 for name in good]
    request = good[rng.choices(list(good), weights)[0]] if chance(rng, 0.5) else step(rng, world)[1]
    tensors, done = list(request.inputs), []
    for _ in range(rng.choice((1, 1, 2))):
        if tensors:
            at = rng.randrange(len(tensors))
            how, new = _changed(rng, tensors[at])
            tensors[at : at + 1] = new
            done.append(how)
    outputs = rng.choice(((), (), (), ("NONE",), ("EMBEDDING",) * 2, ("PIXEL_VALUES",), ("",)))
    about = f"{request.model}: {'; '.join(done)}{f', outputs {list(outputs)}' if outputs else ''}"
    return about, Infer(request.model, tensors, request.parameters, outputs)


def _changed(rng: random.Random, tensor: Tensor) -> tuple[str, list[Tensor]]:
    name, datatype, shape, data = tensor.name, tensor.datatype, tensor.shape, tensor.data
    match rng.randrange(9):
        case 0:
            shape = _shape(rng, shape)
            return f"{name} of shape {list(shape)}", [Tensor(name, datatype, shape, data)]
        case 1:
            other = rng.choice(_DATATYPES)
            return f"{name} of type {other!r}", [Tensor(name, other, shape, data)]
        case 2:
            cut = rng.choice((0, 1, 3, 4, len(data) // 2, max(len(data) - 1, 0)))
            return f"{name} of {cut} bytes", [Tensor(name, datatype, shape, data[:cut])]
        case 3:
            return f"{name} with more bytes", [
                Tensor(name, datatype, shape, data + bytes(rng.choice((1, 4, 1000))))
            ]
        case 4:
            at = rng.choice((0, 0, max(len(data) - 8, 0)))
            length = struct.pack("<I", edge(rng) & 0xFFFFFFFF)
            return f"{name} with a length that lies", [
                Tensor(name, datatype, shape, data[:at] + length + data[at + 4 :])
            ]
        case 5:
            return f"{name} twice", [tensor, tensor]
        case 6:
            return f"without {name}", []
        case 7:
            other = rng.choice(("", "INPUT_IMAGE", "STATE", "x" * 5000, "INPUT\0", "größe"))
            return f"{name} named {other[:20]!r}", [Tensor(other, datatype, shape, data)]
        case _:
            filled = rng.randbytes(len(data))
            return f"{name} of random bytes", [Tensor(name, datatype, shape, filled)]


def _shape(rng: random.Random, shape: Sequence[int]) -> tuple[int, ...]:
    sides = list(shape) or [1]
    match rng.randrange(5):
        case 0:
            sides[rng.randrange(len(sides))] = max(min(edge(rng), 2**63 - 1), -(2**63))
        case 1:
            sides.append(rng.choice((1, 0, -1, 2)))
        case 2:
            del sides[rng.randrange(len(sides))]
        case 3:
            sides = [rng.choice((0, 1, 2, 2**32, 2**33)) for _ in range(rng.choice((1, 2, 3, 40)))]
        case _:
            sides = [2**21, 2**21, 2**22] if chance(rng, 0.5) else [-1] * len(sides)
    return tuple(sides)


def step(rng: random.Random, world: World) -> tuple[str, Infer]:
    """Call a step directly with tensors that no other step would hand it."""
    steps = _steps(rng, world)
    name = rng.choice(list(steps))
    request = Infer(name.strip(), steps[name]())
    told = ", ".join(f"{tensor.name} {tensor.datatype}{list(tensor.shape)}" for tensor in request.inputs)
    return f"{request.model}: {told}", request


def _floats(rng: random.Random, *shape: int) -> Numbers:
    numbers = np.array([rng.gauss(0, 1) for _ in range(64)], np.float32)
    array = np.resize(numbers, shape).copy()
    if array.size and chance(rng, 0.6):
        for _ in range(rng.choice((1, 4))):
            array.reshape(-1)[rng.randrange(array.size)] = rng.choice(_FLOATS)
    return array


def _integers(rng: random.Random, shape: Sequence[int], dtype: type[np.integer[Any]], usual: int) -> Numbers:
    limits = np.iinfo(dtype)
    count = int(np.prod(shape))
    values = [rng.randrange(usual) if chance(rng, 0.8) else edge(rng) for _ in range(count)]
    return np.array([min(max(value, int(limits.min)), int(limits.max)) for value in values], dtype).reshape(
        shape
    )


def _pixels(rng: random.Random, side: int) -> Tensor:
    rows = rng.choice((1, 1, 2, 0))
    sides = (
        rows,
        *rng.choice(((side, side, 3), (side, side, 3), (side + 1, side, 3), (side, side, 4), (1, 1, 3))),
    )
    return of_array("PIXEL_VALUES", np.resize(np.frombuffer(rng.randbytes(256), np.uint8), sides))


def _steps(rng: random.Random, world: World) -> Mapping[str, Callable[[], Sequence[Tensor]]]:
    """The tensors of each step, made when they are asked for."""
    few = _Few(rng, world)
    return {
        "siglip_text_model": lambda: [of_array("INPUT_IDS", _ids(rng))],
        "siglip_vision_model": lambda: [_pixels(rng, world.side)],
        "siglip_vision_model ": lambda: [_pixels(rng, world.side), few.vectors()],
        "siglip_base_model": lambda: [_pixels(rng, world.team_side)],
        "label_prompts": lambda: [few.words("LABELS")],
        "label_scores": few.scores,
        "explain_prompts": lambda: [few.size(), few.words("PROMPTS")],
        "explain_vectors": lambda: [few.texts(), few.plan()],
        "explain_maps": few.maps,
        "explain_overlays": few.overlays,
        "jersey_process": lambda: [of_rows("CROPS", list(world.crops[: few.queries]), [few.queries])],
        "team_fit": lambda: [few.rows(), few.count()] if chance(rng, 0.5) else [few.rows()],
        "team_predict": lambda: [few.rows(), few.count(), of_rows("STATE", [world.state], [1])],
    }


class _Few:
    """Tensors of one request, which agree with each other in most sizes."""

    def __init__(self, rng: random.Random, world: World) -> None:
        self._rng = rng
        self._width = world.width if chance(rng, 0.8) else rng.choice((0, 1, world.width + 1, 4096))
        self._patches = rng.choice((144, 144, 1, 0, 143))
        self.queries = rng.choice((0, 1, 2, 5))

    def words(self, name: str) -> Tensor:
        return of_rows(name, [b"dog"] * self.queries, [self.queries])

    def size(self) -> Tensor:
        return of_array("IMAGE_SIZE", _integers(self._rng, (1, 2), np.int32, 500))

    def plan(self) -> Tensor:
        return of_array("PLAN", _integers(self._rng, (6,), np.int32, 4))

    def count(self) -> Tensor:
        return of_array("CROP_COUNT", _integers(self._rng, (1,), np.int32, 50))

    def numbers(self, name: str, *shape: int) -> Tensor:
        return of_array(name, _floats(self._rng, *shape))

    def rows(self) -> Tensor:
        return self.numbers("EMBEDDING", self._rng.choice((8, 9, 40, 0)), self._width)

    def texts(self) -> Tensor:
        return self.numbers("TEXT_EMBEDDING", self.queries + self._rng.choice((0, 1, 14)), self._width)

    def vectors(self) -> Tensor:
        return self.numbers("PROMPT_VECTORS", 1, self.queries, self._width)

    def prompts(self) -> Tensor:
        return self.numbers("PROMPT_EMBEDDING", self.queries, self._width)

    def maps(self) -> list[Tensor]:
        found = [self.numbers("FOUND_MAPS", 1, self.queries, self._patches)]
        found += [
            self.numbers("FOUND_UNATTRIBUTED", 1, self.queries),
            self.numbers("EMBEDDING", 1, self._width),
        ]
        return [*found, self.vectors(), self.prompts(), self.size(), self.plan()]

    def scores(self) -> list[Tensor]:
        templates = of_array("TEMPLATE_COUNT", _integers(self._rng, (1,), np.int32, 4))
        return [self.numbers("IMAGE_EMBEDDING", 2, self._width), self.prompts(), templates]

    def overlays(self) -> list[Tensor]:
        heat = self.numbers("HEAT", self.queries, self._rng.choice((12, 1, 0)), 12)
        return [heat, self.size(), self.plan(), of_rows("INPUT_IMAGE", [small_photo()])]


def _ids(rng: random.Random) -> Numbers:
    return _integers(rng, (rng.choice((1, 2, 9)), rng.choice((64, 64, 64, 1, 0, 65))), np.int64, 1000)
