"""Clips to measure team clustering on: crops as JPEG files, and the truth about each.

A clip follows from its tier and seed. Its frames lie seconds apart. The first half is for fitting, the rest
is held out. Tiers:

    T0  two plain colours that differ clearly
    T1  similar colours, at a CIELAB difference that the seed chooses
    T2  sun and hard shadow: one team in shadow has nearly the colour of the other in the sun
    T3  the same two colours with equal areas, arranged differently
    T4  several cameras' grades, one of which is seen in held-out frames only
    T5  T1 to T4 together
    T6  players 8 to 16 pixels high
    T7  one team only
    T8  tracks whose numbers are swapped between two players at some frame
"""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from training.jerseys.camera import Conditions, sample_cameras, sense
from training.jerseys.colours import decode, delta_e, distinct, encode, integers, palette, shifted
from training.jerseys.drawing import Wardrobe
from training.jerseys.figure import Poses, sample_players
from training.jerseys.kits import BENCHMARK, Kind, Kits, Part, sample_kits, with_kind
from training.jerseys.stage import Studio, Views, render, sample_light, sample_views
from training.scenes import Random

__all__ = ["DIFFERENCES", "TIERS", "Cast", "Clip", "Role", "clip", "contact_sheet", "pair_of_kits"]

SHADOW = (0.36, 0.46)
TIERS = {
    "T0": Conditions(),
    "T1": Conditions(noise=(0.01, 0.03), quality=(45, 85)),
    "T2": Conditions(shadow=SHADOW, shaded=0.5, crossed=0.08, warmth=0.06),
    "T3": Conditions(),
    "T4": Conditions(grade=1.2),
    "T5": Conditions(
        shadow=(0.45, 0.6), shaded=0.5, crossed=0.08, warmth=0.06, grade=0.6, noise=(0.01, 0.03)
    ),
    "T6": Conditions(heights=(8, 16), blur=0.4, noise=(0.005, 0.015)),
    "T7": Conditions(),
    "T8": Conditions(),
}
DIFFERENCES = (8.0, 12.0, 16.0, 20.0, 25.0)
ARRANGEMENTS = tuple(
    (one, other)
    for place, one in enumerate(BENCHMARK[1:6])
    for other in BENCHMARK[2 + place : 6]
    if (one, other) != (Kind.CHECKS, Kind.HARLEQUIN)  # these look alike on few pixels
)
CANVAS = (160, 96)
CHUNK = 32  # crops drawn at a time, which bounds the memory
CHUNK = 32  # crops drawn at a time, which bounds the memory
HOMES = 3  # cameras at fit, where there are several; one more comes later
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class Role(IntEnum):
    """Role of a person on the pitch."""

    PLAYER = 0
    GOALKEEPER = 1
    REFEREE = 2


@dataclass(frozen=True)
class Cast:
    """Outfield players and goalkeepers per team, the most referees, and the number of frames."""

    players: int = 10
    keepers: int = 1
    referees: int = 3
    frames: int = 12


@dataclass(frozen=True)
class Clip:
    """N crops and the truth about them, ordered by frame.

    Attributes:
        tier, seed: its origin.
        crops: N JPEG files.
        team: int64 [N], 0 or 1, and -1 for referees.
        role: int64 [N], values of `Role`.
        track: int64 [N], as a tracker numbers them.
        player: int64 [N], who it really is.
        frame, camera, height: int64 [N]; heights in pixels.
        lit: bool [N], in the sun rather than in shadow.
        held_out: bool [N], not to be fitted on.
        kits: the teams', the goalkeepers', and the referees'.
        difference: of the teams' first colours in CIELAB.
    """

    tier: str
    seed: int
    crops: list[bytes]
    team: Ints
    role: Ints
    track: Ints
    player: Ints
    frame: Ints
    camera: Ints
    height: Ints
    lit: Bools
    held_out: Bools
    kits: Kits
    difference: float


def _painted(kits: Kits, **colours: Tensor) -> Kits:
    """The kits with some of the parts' colours [K, 3] replaced, by the names in `Part`."""
    changed = kits.colours.clone()
    for name, colour in colours.items():
        changed[:, Part[name]] = colour
    return replace(kits, colours=changed)


def _shared(kits: Kits) -> Kits:
    """Two kits that are both the first."""
    return kits.take(torch.zeros(2, dtype=torch.int64, device=kits.kind.device))


def _similar(first: Tensor, difference: float, random: Random) -> Tensor:
    """A colour [1, 3] and another one at a CIELAB difference from it: [2, 3]."""
    other = shifted(first, torch.full((1,), difference, device=random.device), random)
    return torch.cat([first, other])


def _similar_pair(difference: float, random: Random) -> Kits:
    """One kit whose first colour differs a little between the teams."""
    kits = _shared(sample_kits(1, random, BENCHMARK[:4]))
    pair = _similar(kits.colours[:1, Part.FIRST], difference, random)
    return _painted(kits, FIRST=pair, SLEEVE=pair, SHORTS=kits.colours[:, Part.SECOND])


def _shaded_pair(random: Random) -> Kits:
    """Plain kits of one hue, of which the darker is about the lighter in shadow."""
    kits = _shared(sample_kits(1, random, [Kind.PLAIN]))
    bright = palette(12, random)
    bright = bright[bright.amax(1).argmax()][None]
    low, high = SHADOW
    dark = encode(decode(bright) * random.uniform(1, 1, low=low, high=high))
    dark = _similar(dark, 10.0, random)[1:]
    pair = torch.cat([bright, dark])[random.uniform(2).argsort()]
    return _painted(kits, FIRST=pair, SLEEVE=pair, SHORTS=kits.colours[:, Part.SECOND])


def _arranged_pair(random: Random) -> Kits:
    """Kits of the same colours with equal areas in two arrangements."""
    kits = _shared(sample_kits(1, random, [Kind.PLAIN]))
    pick = int(integers(1, 0, len(ARRANGEMENTS), random))
    pair = torch.tensor(ARRANGEMENTS[pick], device=random.device)[random.uniform(2).argsort()]
    kits = with_kind(kits, pair, random)
    return replace(kits, patterned_sleeves=torch.zeros_like(kits.patterned_sleeves))


def pair_of_kits(tier: str, random: Random, difference: float = 16.0) -> Kits:
    """The two teams' kits of a tier.

    Args:
        tier: a key of `TIERS`.
        random: the source of every choice.
        difference: of the first colours in CIELAB; T1 only.
    """
    if tier == "T1":
        return _similar_pair(difference, random)
    if tier == "T2":
        return _shaded_pair(random)
    if tier == "T3":
        return _arranged_pair(random)
    if tier == "T5":
        kits = _arranged_pair(random)
        return _painted(kits, FIRST=_similar(kits.colours[:1, Part.FIRST], 14.0, random))
    kits = sample_kits(2, random, BENCHMARK[:1] if tier in {"T0", "T7", "T8"} else BENCHMARK)
    first = kits.colours[:1, Part.FIRST]
    if tier in {"T4", "T6"}:
        pair = _similar(first, float(random.uniform(1, low=20, high=34)), random)
    else:
        pair = torch.cat([first, distinct(first[:, None], 65, random)])
    return _painted(kits, FIRST=pair, SLEEVE=pair, NUMBER=distinct(pair[:, None], 50, random))


def _all_kits(tier: str, random: Random, difference: float) -> Kits:
    """Both teams', both goalkeepers' and the referees' kits."""
    teams = pair_of_kits(tier, random, difference)
    others = sample_kits(3, random, [Kind.PLAIN])
    worn = teams.colours[:, Part.FIRST].expand(3, 2, 3)
    own = distinct(worn, 45, random)
    return Kits.join([teams, _painted(others, FIRST=own, SLEEVE=own)])


@dataclass(frozen=True)
class _Roll:
    """People in the clip: kit, team and role of each player, and players and frames of each crop."""

    kit: Tensor
    team: Tensor
    role: Tensor
    player: Tensor
    frame: Tensor


def _roll(tier: str, cast: Cast, random: Random) -> _Roll:
    referees = int(integers(1, min(1, cast.referees), cast.referees + 1, random))
    second = 0 if tier == "T7" else 1
    rows = [(0, 0, Role.PLAYER)] * cast.players + [(second, second, Role.PLAYER)] * cast.players
    rows += [(2, 0, Role.GOALKEEPER)] * cast.keepers + [(2 + second, second, Role.GOALKEEPER)] * cast.keepers
    rows += [(4, -1, Role.REFEREE)] * referees
    kit, team, role = torch.tensor(rows)[random.uniform(len(rows)).argsort()].T
    # Goalkeepers and referees are often out of the picture, but not in all of a half.
    seen = random.uniform(len(rows), cast.frames) < torch.where(role == Role.PLAYER, 1.1, 0.4)[:, None]
    seen[:, :: max(cast.frames // 2, 1)] = True
    frame, player = seen.T.nonzero().T
    return _Roll(kit, team, role, player, frame)


def _views(roll: _Roll, tier: str, conditions: Conditions, random: Random) -> tuple[Views, Tensor]:
    """Views of all crops, and bool [N], in the sun."""
    people, count = len(roll.kit), len(roll.player)
    home_lit = ~random.chance(conditions.shaded, people)
    stray = random.chance(0.1 if conditions.shaded else 0.0, count)
    lit = home_lit[roll.player] ^ stray
    views = sample_views(roll.player, conditions, random, lit)
    # Light and grass change little within a clip.
    ground = views.ground.mean(0, keepdim=True) * (1 + 0.06 * random.normal(count, 1))
    camera = torch.zeros(count, dtype=torch.int64)
    if tier in {"T4", "T5"}:
        home = integers(people, 0, HOMES, random)[roll.player]
        camera = torch.where(random.chance(0.2, count), integers(count, 0, HOMES, random), home)
        late = roll.frame >= (int(roll.frame.max()) + 1) // 2
        camera = torch.where(late & random.chance(0.5, count), HOMES, camera)
    return replace(views, ground=ground, camera=camera, light=sample_light(lit, conditions, random)), lit


def _rows(views: Views, rows: slice) -> Views:
    """Some crops of the views."""
    poses = Poses(*(getattr(views.poses, field.name)[rows] for field in fields(Poses)))
    light = replace(views.light, **{f.name: getattr(views.light, f.name)[rows] for f in fields(views.light)})
    return Views(views.player[rows], poses, views.jitter[rows], light, views.camera[rows], views.ground[rows])


def _encode(picture: Tensor, quality: int, subsampled: bool) -> bytes:
    """A picture [3, H, W] in 0..1 as a JPEG file."""
    pixels = (picture * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=2 if subsampled else 0)
    return file.getvalue()


def _files(
    studio: Studio, views: Views, heights: Tensor, conditions: Conditions, random: Random
) -> list[bytes]:
    """Render and encode crops of these heights."""
    files = []
    count = len(heights)
    low, high = conditions.quality
    quality = integers(count, low, high + 1, random).tolist()
    subsampled = random.chance(conditions.subsampled, count).tolist()
    for start in range(0, count, CHUNK):
        drawn = render(studio, _rows(views, slice(start, start + CHUNK)), conditions, random, CANVAS)
        for row, (picture, aspect) in enumerate(
            zip(drawn.pictures, drawn.aspect.tolist(), strict=True), start
        ):
            height = int(heights[row])
            size = height, max(round(height * aspect), 2)
            seen = sense(picture[None], size, conditions, random)[0]
            files.append(_encode(seen, quality[row], subsampled[row]))
    return files


def _heights(roll: _Roll, conditions: Conditions, random: Random) -> Tensor:
    """Pixels, int64 [N]: everyone at a distance of their own."""
    low, high = (math.log(height) for height in conditions.heights)
    own = random.uniform(len(roll.kit), low=low, high=high)[roll.player]
    height = torch.exp(own + random.normal(len(roll.player)) * 0.1).round().long()
    return height.clamp(*conditions.heights)


def _tracks(roll: _Roll, tier: str, frames: int, random: Random) -> Tensor:
    """The tracker's numbers, int64 [N]. In T8 every fifth player swaps with one of the other team."""
    track = roll.player.clone()
    if tier != "T8":
        return track
    sides = [((roll.team == team) & (roll.role == Role.PLAYER)).nonzero()[:, 0] for team in (0, 1)]
    pairs = max(len(sides[0]) // 5, 1)
    when = integers(pairs, 1, max(frames, 2), random)
    for one, other, frame in zip(sides[0][:pairs], sides[1][:pairs], when, strict=True):
        late = roll.frame >= frame
        track[late & (roll.player == one)] = other
        track[late & (roll.player == other)] = one
    return track


@contextmanager
def _one_thread() -> Iterator[None]:
    """Bytes must not depend on the number of cores, and crops are too small to be worth sharing out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def clip(
    tier: str,
    seed: int,
    cast: Cast | None = None,
    conditions: Conditions | None = None,
    difference: float | None = None,
) -> Clip:
    """Make a clip on the CPU. The same arguments give the same bytes.

    Args:
        tier: a key of `TIERS`.
        seed: of every random choice.
        cast: who appears how often; 10 + 1 players a team, up to 3 referees and 12 frames if absent.
        conditions: instead of the tier's own.
        difference: of the first colours in CIELAB for T1; if absent, seeds go through `DIFFERENCES` in turn.
    """
    cast, conditions = cast or Cast(), conditions or TIERS[tier]
    random = Random(1000 * seed + list(TIERS).index(tier))
    kits = _all_kits(tier, random, difference or DIFFERENCES[seed % len(DIFFERENCES)])
    roll = _roll(tier, cast, random)
    grades = torch.full((HOMES + 1,), conditions.grade)
    studio = Studio(
        Wardrobe(kits), sample_players(roll.kit, random), sample_cameras(HOMES + 1, grades, random)
    )
    views, lit = _views(roll, tier, conditions, random)
    heights = _heights(roll, conditions, random)
    track = _tracks(roll, tier, cast.frames, random)
    return Clip(
        tier, seed, _files(studio, views, heights, conditions, random),
        team=roll.team[roll.player].numpy(), role=roll.role[roll.player].numpy(), track=track.numpy(),
        player=roll.player.numpy(), frame=roll.frame.numpy(), camera=views.camera.numpy(),
        height=heights.numpy(), lit=lit.numpy(), held_out=(roll.frame >= cast.frames // 2).numpy(), kits=kits,
        difference=float(delta_e(kits.colours[0, Part.FIRST], kits.colours[1, Part.FIRST])),
    )  # fmt: skip


def contact_sheet(made: Clip, cell: tuple[int, int] = (56, 104)) -> Image.Image:
    """All crops, a row per track and a column per frame, scaled to cells of this width and height."""
    tracks, frames = np.unique(made.track), np.unique(made.frame)
    sheet = Image.new("RGB", (len(frames) * cell[0], len(tracks) * cell[1]), (30, 30, 30))
    for data, track, frame in zip(made.crops, made.track, made.frame, strict=True):
        with Image.open(io.BytesIO(data)) as picture:
            scale = min((cell[0] - 2) / picture.width, (cell[1] - 2) / picture.height)
            size = max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)
            place = int(np.searchsorted(frames, frame)), int(np.searchsorted(tracks, track))
            sheet.paste(
                picture.resize(size, Image.Resampling.NEAREST), (place[0] * cell[0], place[1] * cell[1])
            )
    return sheet
