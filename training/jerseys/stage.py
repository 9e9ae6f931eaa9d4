"""Surroundings of players: the pitch, other things in the box, and the light. `render` draws all of it."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.jerseys.camera import Cameras, Conditions, expose
from training.jerseys.colours import decode, palette
from training.jerseys.drawing import Crops, Figure, Frame, Wardrobe, draw
from training.jerseys.figure import Players, Poses, boxes, sample_poses, skeleton
from training.scenes import Random

__all__ = ["FULL", "Light", "Rendered", "Studio", "Views", "render", "sample_light", "sample_views"]

FULL = (0.0, 1.0, 0.0, 1.0)
GRASS = (0.25, 0.46, 0.18)


@dataclass(frozen=True)
class Light:
    """The light of B crops, of which one side may lie in shadow.

    Attributes:
        sun, shade: gains [B, 3] of both sides.
        edge: [B, 4]: the border's direction (x, y), its place, and its softness, in parts of the box.
        side: [B] in -1..1, how much more light comes from the right.
    """

    sun: Tensor
    shade: Tensor
    edge: Tensor
    side: Tensor

    def share(self, frame: Frame) -> Tensor:
        """Sunlight, 0..1: [B, 1, H, W]."""
        u, v = _within(frame)
        x, y, place, softness = (part[:, None, None, None] for part in self.edge.unbind(1))
        return torch.sigmoid((x * u + y * v - place) / softness)


@dataclass(frozen=True)
class Views:
    """B crops to be drawn.

    Attributes:
        player: int64 [B], rows of the players.
        poses: of the B crops.
        jitter: [B, 4], how far boxes reach beyond the left, top, right and bottom, in parts of their size.
        light: of the B crops.
        camera: int64 [B], rows of the cameras.
        ground: light [B, 3] of the pitch.
    """

    player: Tensor
    poses: Poses
    jitter: Tensor
    light: Light
    camera: Tensor
    ground: Tensor


@dataclass(frozen=True)
class Studio:
    """Things that views show: kits and their cloth, players, cameras."""

    wardrobe: Wardrobe
    players: Players
    cameras: Cameras


@dataclass(frozen=True)
class Rendered:
    """Crops before the camera's sensor.

    Attributes:
        pictures: display values [B, 3, H, W].
        shirt: [B, 1, H, W] in 0..1, where the player's own shirt shows.
        aspect: [B], a box's width over its height.
    """

    pictures: Tensor
    shirt: Tensor
    aspect: Tensor


def _within(frame: Frame) -> tuple[Tensor, Tensor]:
    """Places of pixels in the whole box, 0..1: u [1, 1, 1, W], v [1, 1, H, 1]."""
    unit = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=frame.box.device)
    return Frame(unit, frame.size, frame.window).axes()


def sample_light(lit: Tensor, conditions: Conditions, random: Random) -> Light:
    """Light of crops that lie in the sun where bool [B] says so, apart from shadows' edges inside them."""
    count = len(lit)

    def logarithmic(low: float, high: float) -> Tensor:
        return torch.exp(random.uniform(count, 1, low=math.log(low), high=math.log(high)))

    gain, shadow = logarithmic(*conditions.gain), logarithmic(*conditions.shadow)
    warmth = torch.tensor([0.5, 0.0, -0.5], device=random.device)
    tint = torch.exp(random.normal(count, 1) * conditions.warmth * warmth)
    # Skylight is bluer than the sun.
    sky = torch.exp(-1.5 * conditions.warmth * random.uniform(count, 1, high=2.0) * warmth)
    crossed = random.chance(conditions.crossed, count)
    angle = random.uniform(count, high=2 * math.pi)
    direction = torch.stack([torch.cos(angle), torch.sin(angle)], 1)
    middle = (direction * random.uniform(count, 2, low=0.25, high=0.75)).sum(1)
    place = torch.where(crossed, middle, torch.where(lit, -9.0, 9.0))
    softness = random.uniform(count, low=0.01, high=0.06)
    edge = torch.cat([direction, place[:, None], softness[:, None]], 1)
    side = random.uniform(count, low=-1, high=1) * torch.where(lit, 1.0, 0.3)
    return Light(gain * tint, gain * shadow * tint * sky, edge, side)


def sample_views(player: Tensor, conditions: Conditions, random: Random, lit: Tensor | None = None) -> Views:
    """Views of players, int64 [B], through as many cameras of their own, on grounds of their own.

    Args:
        player: rows of the players.
        conditions: how the views vary.
        random: the source of every choice.
        lit: bool [B], in the sun; drawn if absent.
    """
    count = len(player)
    if lit is None:
        lit = ~random.chance(conditions.shaded, count)
    jitter = random.normal(count, 4) * conditions.jitter + 0.3 * conditions.jitter
    grass = torch.tensor(GRASS, device=random.device) + random.normal(count, 3) * 0.03
    ground = decode(grass * random.uniform(count, 1, low=0.75, high=1.15))
    return Views(
        player=player,
        poses=sample_poses(count, random),
        jitter=jitter,
        light=sample_light(lit, conditions, random),
        camera=torch.arange(count, device=random.device),
        ground=ground,
    )


def _pitch(ground: Tensor, frame: Frame, random: Random) -> Tensor:
    """Grass with mown bands, and lines in some crops: light [B, 3, H, W]."""
    count = len(ground)
    u, v = _within(frame)
    angle = random.uniform(count, 1, 1, 1, high=math.pi)
    across = u * torch.cos(angle) + v * torch.sin(angle)
    period = random.uniform(count, 1, 1, 1, low=3, high=12)
    bands = torch.tanh(4 * torch.sin(period * across + random.uniform(count, 1, 1, 1, high=6.3)))
    blades = random.normal(count, 1, *frame.size) * 0.1
    grass = ground[..., None, None] * (1 + 0.14 * random.uniform(count, 1, 1, 1) * bands + blades).clamp(
        min=0.3
    )
    slant = random.uniform(count, 1, 1, 1, low=-1.5, high=1.5)
    place = random.uniform(count, 1, 1, 1, low=-0.3, high=1.3)
    line = (v - place - slant * (u - 0.5)).abs() < random.uniform(count, 1, 1, 1, low=0.008, high=0.025)
    return torch.where(line & random.chance(0.25, count)[:, None, None, None], 0.75, grass)


def _clutter(frame: Frame, random: Random) -> Tensor:
    """Boards, and above them crowds: light [B, 3, H, W]."""
    count, (rows, columns) = len(frame.box), frame.size
    _, v = _within(frame)
    seats = random.uniform(count, 3, max(rows // 4, 1), max(columns // 4, 1)) ** 3
    crowd = F.interpolate(seats, frame.size, mode="bilinear", align_corners=False)
    crowd = crowd * random.uniform(count, 1, 1, 1, low=0.2, high=0.9)
    letters = random.uniform(count, 1, 1, max(columns // 5, 1)).round()
    letters = F.interpolate(letters, (1, columns), mode="bilinear", align_corners=False)
    board = torch.lerp(
        decode(palette(count, random))[..., None, None],
        decode(palette(count, random))[..., None, None],
        letters,
    )
    border = random.uniform(count, 1, 1, 1, low=-0.4, high=0.6)
    return torch.where(v > border, board.expand_as(crowd), crowd)


def _behind(views: Views, frame: Frame, conditions: Conditions, random: Random) -> Tensor:
    """Everything behind the players: light [B, 3, H, W]."""
    count = len(views.player)
    u, v = _within(frame)
    pitch = _pitch(views.ground, frame, random)
    cast = (1 - torch.hypot((u - 0.5) / 0.45, (v - 0.97) / 0.07)).clamp(0, 0.4)
    pitch = pitch * (1 - cast)
    horizon = random.uniform(count, 1, 1, 1, low=0.15, high=1.0)
    cluttered = random.chance(conditions.clutter, count)[:, None, None, None]
    return torch.where(cluttered & (v < horizon), _clutter(frame, random), pitch)


def _neighbours(figure: Figure, part: float, random: Random) -> tuple[Tensor, Tensor, Tensor]:
    """Other crops' players moved to the edge of some boxes.

    Returns:
        Their crops int64 [n], light and alpha [n, 4, H, W], and bool [n], before the crop's own player.
    """
    count = len(figure.alpha)
    chosen = random.uniform(count).argsort()[: int(part * count)]
    other = (chosen + 1 + (random.uniform(len(chosen)) * (count - 1)).long()) % count
    planes = torch.cat([figure.light, figure.alpha], 1)[other]
    theta = torch.zeros(len(chosen), 2, 3, device=random.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1
    side = torch.sign(random.uniform(len(chosen), low=-1, high=1))
    theta[:, 0, 2] = side * random.uniform(len(chosen), low=0.55, high=1.4)
    theta[:, 1, 2] = random.uniform(len(chosen), low=-0.4, high=0.4)
    grid = F.affine_grid(theta, list(planes.shape), align_corners=False)
    moved = F.grid_sample(planes, grid, padding_mode="zeros", align_corners=False)
    return chosen, moved, random.chance(0.4, len(chosen))


def render(
    studio: Studio,
    views: Views,
    conditions: Conditions,
    random: Random,
    size: tuple[int, int] = (128, 64),
    window: tuple[float, float, float, float] = FULL,
) -> Rendered:
    """Draw crops as a camera's lens delivers them, before `camera.sense`.

    Args:
        studio: what the views count.
        views: B crops.
        conditions: of clutter and overlap; the views hold the rest already.
        random: the source of folds and backgrounds.
        size: rows and columns.
        window: the part of the boxes to draw: top, bottom, left and right in 0..1.
    """
    players = studio.players.take(views.player)
    bones = skeleton(views.poses, players)
    frame = Frame(boxes(bones, views.jitter), size, window)
    figure = draw(studio.wardrobe, Crops(players, views.poses, bones, frame), views.light.side, random)
    scene = _behind(views, frame, conditions, random)
    shirt = figure.shirt
    if int(conditions.overlap * len(players)) and len(players) > 1:
        crops, planes, before = _neighbours(figure, conditions.overlap, random)
        front = planes * before[:, None, None, None]
        scene = scene.index_copy(0, crops, planes[:, :3] + scene[crops] * (1 - planes[:, 3:]))
        scene = figure.light + scene * (1 - figure.alpha)
        scene = scene.index_copy(0, crops, front[:, :3] + scene[crops] * (1 - front[:, 3:]))
        shirt = shirt.index_copy(0, crops, shirt[crops] * (1 - front[:, 3:]))
    else:
        scene = figure.light + scene * (1 - figure.alpha)
    share = views.light.share(frame)
    sun, shade = views.light.sun[..., None, None], views.light.shade[..., None, None]
    lit = scene * (shade + (sun - shade) * share)
    return Rendered(expose(lit, studio.cameras, views.camera), shirt, frame.box[:, 2] / frame.box[:, 3])
