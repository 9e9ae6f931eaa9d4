"""Kits: which patterns there are, random ones, and the cloth as a texture.

A shirt is a cylinder: x is the angle around the body in -pi..pi with 0 at the middle of the chest, y runs
from the neck (0) to the hem (1). Every pattern is a scalar field on it, cut at the level that gives the
second colour its share of the area. Patterns of equal shares have equal areas, whatever their kind.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from training.jerseys.colours import decode, distinct, integers, palette, shifted
from training.scenes import Random

__all__ = ["BENCHMARK", "TEXTURE", "TRAINING", "Kind", "Kits", "Part", "hard_kits", "sample_kits", "textures"]

TEXTURE = (64, 128)  # rows and columns of a shirt's cloth
DETAIL = 2  # it is drawn this much finer, then averaged
ASPECT = 3.6  # the shirt's length in radians of its circumference
COLLAR = 0.06  # where it ends


class Kind(IntEnum):
    """Pattern that a shirt's two colours form."""

    PLAIN = 0
    STRIPES = 1
    HOOPS = 2
    HALVES = 3
    CHECKS = 4
    HARLEQUIN = 5
    DOTS = 6
    SASH = 7
    CHEST_BAND = 8
    QUARTERS = 9
    PINSTRIPES = 10
    YOKE = 11
    SIDES = 12
    CENTRE = 13
    GRADIENT = 14
    RINGS = 15
    CHEVRONS = 16
    DIAGONAL = 17
    CELLS = 18
    CLOUDS = 19
    WAVES = 20


BENCHMARK = (Kind.PLAIN, Kind.STRIPES, Kind.HOOPS, Kind.HALVES, Kind.CHECKS, Kind.HARLEQUIN, Kind.DOTS)
TRAINING = (Kind.PLAIN, *(kind for kind in Kind if kind not in BENCHMARK))


class Part(IntEnum):
    """Rows of `Kits.colours`."""

    FIRST = 0
    SECOND = 1
    SLEEVE = 2
    COLLAR = 3
    SHORTS = 4
    SOCKS = 5
    NUMBER = 6
    SPONSOR = 7


@dataclass(frozen=True)
class Kits:
    """K kits.

    Attributes:
        kind: int64 [K], values of `Kind`.
        colours: float [K, 8, 3], display values 0..1, rows as in `Part`.
        share: [K], the second colour's part of the shirt's area.
        across, down: int64 [K], repetitions around the body and along it.
        slope: [K] in -1..1, of slanting patterns.
        phase: [K] in 0..1.
        waves: [K, 16, 4], random numbers of the irregular patterns.
        patterned_sleeves: bool [K]; else sleeves are in the sleeves' colour.
        sponsor: [K, 4]: half its width in radians and its height, its middle along y, its letters' frequency.
    """

    kind: Tensor
    colours: Tensor
    share: Tensor
    across: Tensor
    down: Tensor
    slope: Tensor
    phase: Tensor
    waves: Tensor
    patterned_sleeves: Tensor
    sponsor: Tensor

    def __len__(self) -> int:
        return len(self.kind)

    def take(self, rows: Tensor | slice) -> "Kits":
        """These rows."""
        return Kits(*(getattr(self, field.name)[rows] for field in fields(self)))

    def to(self, device: torch.device) -> "Kits":
        """Copy of the kits on a device."""
        return Kits(*(getattr(self, field.name).to(device) for field in fields(self)))

    @staticmethod
    def join(parts: Sequence["Kits"]) -> "Kits":
        """One after the other."""
        return Kits(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Kits)))


# The share of the second colour; half where none is given.
SHARES = {
    Kind.DOTS: (0.35, 0.5), Kind.SASH: (0.14, 0.3), Kind.CHEST_BAND: (0.14, 0.3),
    Kind.PINSTRIPES: (0.14, 0.3),
    Kind.YOKE: (0.2, 0.5), Kind.SIDES: (0.2, 0.4), Kind.CENTRE: (0.15, 0.35), Kind.CELLS: (0.25, 0.5),
    Kind.RINGS: (0.3, 0.5), Kind.CHEVRONS: (0.25, 0.5), Kind.CLOUDS: (0.25, 0.5), Kind.WAVES: (0.25, 0.5),
    Kind.DIAGONAL: (0.3, 0.5),
}  # fmt: skip
ACROSS = {Kind.PINSTRIPES: (14, 25), Kind.DIAGONAL: (2, 5)}
DOWN = {Kind.CHEVRONS: (1, 4), Kind.DIAGONAL: (1, 4)}


def _of_kind(kind: Tensor, table: dict[Kind, tuple[float, float]], default: tuple[float, float]) -> Tensor:
    """Each row's range out of a table of ranges: [K, 2]."""
    rows = [table.get(each, default) for each in Kind]
    return torch.tensor(rows, device=kind.device, dtype=torch.float32)[kind]


def sample_kits(count: int, random: Random, kinds: Sequence[Kind], uniform: float = 0.0) -> Kits:
    """Independent random kits.

    Args:
        count: how many.
        random: the source of every choice.
        kinds: patterns to choose from, all equally often.
        uniform: share of colours drawn from the whole RGB cube instead of clubs' colours.
    """
    kind = torch.tensor(list(kinds), device=random.device)[integers(count, 0, len(kinds), random)]
    return with_kind(_uncut(count, random, uniform), kind, random)


def _uncut(count: int, random: Random, uniform: float) -> Kits:
    """Kits without a pattern."""
    first = palette(count, random, uniform)
    second = distinct(first[:, None], 35, random, uniform)
    third = palette(count, random, uniform)
    own, other = random.chance(0.45, count)[:, None], random.chance(0.4, count)[:, None]
    shorts = torch.where(own, first, torch.where(other, second, third))
    socks = torch.where(random.chance(0.5, count)[:, None], shorts, first)
    sleeve = torch.where(random.chance(0.7, count)[:, None], first, second)
    collar = torch.where(random.chance(0.5, count)[:, None], first, second)
    number = distinct(torch.stack([first, second], 1), 45, random)
    lettering = torch.where(random.chance(0.7, count)[:, None], number, palette(count, random))
    colours = torch.stack([first, second, sleeve, collar, shorts, socks, number, lettering], 1)
    extent = random.uniform(count, 4)
    low, high = (
        torch.tensor(values, device=random.device)
        for values in ((0.25, 0.02, 0.3, 9), (0.75, 0.07, 0.48, 26))
    )
    sponsor = low + (high - low) * extent
    sponsor[:, :2] *= random.chance(0.75, count)[:, None]
    nothing = torch.zeros(count, device=random.device)
    return Kits(
        kind=nothing.long(), colours=colours, share=nothing, across=nothing.long(), down=nothing.long(),
        slope=random.uniform(count, low=0.4, high=1.0) * (1 - 2 * random.chance(0.5, count).float()),
        phase=random.uniform(count), waves=random.uniform(count, 16, 4),
        patterned_sleeves=random.chance(0.4, count), sponsor=sponsor,
    )  # fmt: skip


def with_kind(kits: Kits, kind: Tensor, random: Random) -> Kits:
    """The kits with patterns of these kinds, int64 [K], their shares and repetitions drawn anew."""
    count = len(kits)
    values: dict[str, Tensor] = {}
    for name, table, default in (
        ("share", SHARES, (0.5, 0.5)),
        ("across", ACROSS, (4, 8)),
        ("down", DOWN, (2, 5)),
    ):
        low, high = _of_kind(kind, dict(table), default).unbind(1)
        drawn = low + (high - low) * random.uniform(count)
        values[name] = drawn if name == "share" else drawn.long()
    return replace(kits, kind=kind, **values)


def hard_kits(count: int, random: Random, kinds: Sequence[Kind], similar: tuple[float, float]) -> Kits:
    """Kits of which some differ only in their arrangement, and some only a little in their colours.

    Kits come in groups of four, of three sorts at random: four independent kits, four that share all colours
    but are of different kinds, or four of one pattern in colours `similar` apart in CIELAB.

    Args:
        count: how many.
        random: the source of every choice.
        kinds: patterns to choose from, at least five.
        similar: least and greatest colour difference within a group of the third sort.
    """
    kits = sample_kits(count, random, kinds, uniform=0.25)
    row = torch.arange(count, device=random.device)
    anchor, place = row - row % 4, row % 4
    mode = random.uniform(count)[anchor]
    same_colours, same_pattern = (mode > 0.33) & (mode <= 0.67), mode > 0.67

    patterns = [kind for kind in kinds if kind is not Kind.PLAIN]
    order = random.uniform(len(patterns)).argsort()  # neighbours in it are different kinds
    chosen = order[(integers(count, 0, len(patterns), random)[anchor] + place) % len(patterns)]
    arranged = with_kind(kits, torch.tensor(patterns, device=random.device)[chosen], random)
    shared = kits.take(anchor)
    arranged = replace(
        arranged,
        colours=shared.colours,
        patterned_sleeves=shared.patterned_sleeves,
        sponsor=shared.sponsor,
    )

    copies = kits.take(anchor)
    amount = random.uniform(count, low=similar[0], high=similar[1])[anchor]
    near = _spread(copies.colours, place, amount, random, anchor)
    copies = replace(copies, colours=near)
    return _choose(same_pattern, copies, _choose(same_colours, arranged, kits))


def _choose(where: Tensor, first: Kits, second: Kits) -> Kits:
    """Row by row: the first where bool [K] holds."""
    chosen = []
    for field in fields(Kits):
        one, other = getattr(first, field.name), getattr(second, field.name)
        chosen.append(torch.where(where.view(-1, *[1] * (one.ndim - 1)), one, other))
    return Kits(*chosen)


def _spread(colours: Tensor, place: Tensor, amount: Tensor, random: Random, anchor: Tensor) -> Tensor:
    """Four nearby versions of equal colours [K, 8, 3]: the middle, and three steps in opposed directions."""
    inner = 0.5 + (colours - 0.5) * 0.8  # room within the gamut on every side
    step = shifted(inner[:, 0], amount, random)[anchor] - inner[:, 0]
    turned = shifted(inner[:, 0], amount, random)[anchor] - inner[:, 0]
    change = torch.stack([torch.zeros_like(step), step, -step, turned - 0.5 * step])
    moved = change[place, torch.arange(len(place), device=place.device)]
    # The second colour moves in some groups only, and only on the shirt.
    share = (random.uniform(len(place))[anchor] < 0.5).to(moved.dtype)
    first = (inner[:, 0] + moved).clamp(0.02, 0.98)
    second = (inner[:, 1] + moved * share[:, None]).clamp(0.02, 0.98)
    sleeve = (inner[:, 2] + moved).clamp(0.02, 0.98)
    return torch.cat([torch.stack([first, second, sleeve], 1), inner[:, 3:]], 1)


Field = Callable[[Tensor, Tensor, Kits], Tensor]


def _wide(values: Tensor) -> Tensor:
    return values.float()[:, None, None]


def _turns(y: Tensor, kits: Kits) -> Tensor:
    return 2 * math.pi * _wide(kits.down) * (y - COLLAR) / (1 - COLLAR)


def _checks(x: Tensor, y: Tensor, kits: Kits) -> Tensor:
    return torch.sin(_wide(kits.across) * x) * torch.sin(_turns(y, kits))


def _harlequin(x: Tensor, y: Tensor, kits: Kits) -> Tensor:
    across, along = _wide(kits.across) / 2 * x, _turns(y, kits) / 2
    return torch.sin(across + along) * torch.sin(across - along)


def _dots(x: Tensor, y: Tensor, kits: Kits) -> Tensor:
    across, along = _wide(kits.across) * x, _turns(y, kits) * 1.5
    return torch.cos(across) * torch.cos(along) + torch.cos(across).abs() * 0.2


def _sash(x: Tensor, y: Tensor, kits: Kits) -> Tensor:
    return -((y - 0.5) * 2 - _wide(kits.slope) * 1.3 * torch.sin(x)).abs()


def _rings(x: Tensor, y: Tensor, kits: Kits) -> Tensor:
    from_middle = torch.sqrt(torch.sin(x) ** 2 + ((y - 0.3 - 0.3 * _wide(kits.phase)) * 2) ** 2)
    return torch.cos(from_middle * 2.2 * _wide(kits.down) + 6.28 * _wide(kits.phase))


def _chevrons(x: Tensor, y: Tensor, kits: Kits) -> Tensor:
    bent = y - 0.35 * _wide(kits.slope) * torch.sin(x).abs()
    return torch.sin(2 * math.pi * (_wide(kits.down) * bent + _wide(kits.phase)))


def _diagonal(x: Tensor, y: Tensor, kits: Kits) -> Tensor:
    along = _wide(kits.across) * ASPECT * y * torch.sign(_wide(kits.slope))
    return torch.sin(_wide(kits.across) * x + along * (0.6 + 0.8 * _wide(kits.phase)) + _wide(kits.phase) * 9)


def _cells(x: Tensor, y: Tensor, kits: Kits) -> Tensor:
    """Each place takes the value of its nearest of 16 random points."""
    at_x, at_y, value, _ = (part[:, :, None, None] for part in kits.waves.unbind(-1))
    # The distance around the body, in which both edges of the cloth meet.
    around = 2 - 2 * torch.cos(x[:, None] - at_x * 2 * math.pi)
    distance = around + ((y[:, None] - at_y) * ASPECT) ** 2
    nearest = distance.argmin(1, keepdim=True)
    return value.expand(-1, -1, *distance.shape[2:]).gather(1, nearest)[:, 0]


def _waves(x: Tensor, y: Tensor, kits: Kits, low: int, high: int) -> Tensor:
    """Ten waves in random directions, none along an axis alone."""
    size, phase, around, along = (part[:, :10, None, None] for part in kits.waves.unbind(-1))
    frequency = low + torch.floor(around * (high - low))
    slope = torch.sign(phase - 0.5) * (low + along * (high - low)) * ASPECT
    angle = frequency * x[:, None] + (slope * y[:, None] + phase * 40)
    return ((0.4 + size) * torch.sin(angle)).sum(1)


FIELDS: dict[Kind, Field] = {
    Kind.PLAIN: lambda x, y, _: x + y,
    Kind.STRIPES: lambda x, _, kits: torch.sin(_wide(kits.across) * x),
    Kind.HOOPS: lambda _, y, kits: torch.sin(_turns(y, kits)),
    Kind.HALVES: lambda x, _, __: torch.sin(x),
    Kind.CHECKS: _checks,
    Kind.HARLEQUIN: _harlequin,
    Kind.DOTS: _dots,
    Kind.SASH: _sash,
    Kind.CHEST_BAND: lambda _, y, kits: -(y - 0.2 - 0.4 * _wide(kits.phase)).abs(),
    Kind.QUARTERS: lambda x, y, _: torch.sin(x) * (0.5 - y),
    Kind.PINSTRIPES: lambda x, _, kits: torch.cos(_wide(kits.across) * x),
    Kind.YOKE: lambda x, y, kits: -y - 0.3 * (_wide(kits.phase) - 0.5) * torch.cos(2 * x),
    Kind.SIDES: lambda x, y, kits: -torch.cos(2 * x) + (_wide(kits.phase) - 0.5) * 0.8 * y,
    Kind.CENTRE: lambda x, _, __: -torch.sin(x).abs(),
    Kind.GRADIENT: lambda x, y, _: y + 0 * x,
    Kind.RINGS: _rings,
    Kind.CHEVRONS: _chevrons,
    Kind.DIAGONAL: _diagonal,
    Kind.CELLS: _cells,
    Kind.CLOUDS: lambda x, y, kits: _waves(x, y, kits, 1, 3),
    Kind.WAVES: lambda x, y, kits: _waves(x, y, kits, 2, 6),
}


def _cut(field: Tensor, kits: Kits) -> Tensor:
    """Mask of the second colour, 0 or 1, over a share of the area: [K, H, W]."""
    # Below the collar, every second row and column are enough to find the level.
    ordered = field[:, round(COLLAR * field.shape[1]) :: 2, ::2].flatten(1).sort(1).values
    place = ((1 - kits.share) * ordered.shape[1]).long().clamp(max=ordered.shape[1] - 1)
    return (field >= ordered.gather(1, place[:, None])[:, :, None]).to(field.dtype)


def _masks(kits: Kits, x: Tensor, y: Tensor) -> Tensor:
    """The second colour's weight, 0..1: [K, *TEXTURE]."""
    kinds = kits.kind.tolist()
    order = torch.tensor(sorted(range(len(kinds)), key=kinds.__getitem__), device=x.device)
    grouped = kits.take(order)  # by kind, so that each kind's rows are a slice
    field = torch.zeros(len(kinds), y.shape[1], x.shape[2], device=x.device)
    rows, start = {}, 0
    for kind in Kind:
        rows[kind] = slice(start, start + kinds.count(kind))
        start = rows[kind].stop
        if start > rows[kind].start:
            field[rows[kind]] = FIELDS[kind](x, y, grouped.take(rows[kind]))
    masks = _cut(field, grouped)
    masks[rows[Kind.PLAIN]] = 0
    masks[rows[Kind.GRADIENT]] = ((field[rows[Kind.GRADIENT]] - 0.15) / 0.7).clamp(0, 1)
    return torch.empty(len(kinds), *TEXTURE, device=x.device).index_copy_(
        0, order, F.avg_pool2d(masks, DETAIL)
    )


def textures(kits: Kits) -> Tensor:
    """The cloth of each shirt with collar, sponsor and crest, in light 0..1: [K, 3, *TEXTURE]."""
    device = kits.colours.device
    rows, columns = TEXTURE

    def axes(scale: int) -> tuple[Tensor, Tensor]:
        x = (torch.arange(columns * scale, device=device) + 0.5) / (columns * scale) * 2 * math.pi - math.pi
        y = (torch.arange(rows * scale, device=device) + 0.5) / (rows * scale)
        return x[None, None], y[None, :, None]

    mask = _masks(kits, *axes(DETAIL))[:, None]
    colours = decode(kits.colours)[..., None, None]
    cloth = colours[:, Part.FIRST] * (1 - mask) + colours[:, Part.SECOND] * mask
    x, y = axes(1)
    wide, high, middle, letters = (part[:, None, None] for part in kits.sponsor.unbind(1))
    block = ((x.abs() < wide) & ((y - middle).abs() < high) & (torch.sin(letters * x + 7 * middle) > -0.6))[
        :, None
    ]
    crest = ((x - 0.45) ** 2 + ((y - 0.2) * ASPECT) ** 2 < 0.02)[:, None]
    cloth = torch.where(block | (crest & (wide > 0)[:, None]), colours[:, Part.SPONSOR], cloth)
    collar = (y + 0.05 * torch.sin(x).abs() < COLLAR)[:, None]
    return torch.where(collar, colours[:, Part.COLLAR], cloth)
