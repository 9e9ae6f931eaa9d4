"""Players drawn as soft-edged shapes, back to front, in linear light.

All shapes are distance functions on the pixel grid, so that edges are smooth at any size.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from training.jerseys.colours import decode
from training.jerseys.figure import Players, Poses, Skeleton
from training.jerseys.kits import Kits, Part, textures
from training.scenes import Random

__all__ = ["Crops", "Figure", "Frame", "Wardrobe", "draw"]

DIGITS = (
    "111101101101111", "010110010010111", "111001111100111", "111001011001111", "101101111001001",
    "111100111001111", "111100111101111", "111001010010010", "111101111101111", "111101111001111",
)  # fmt: skip
GLYPH = 6  # pixels a cell of a digit

# Radii at both ends: sleeve, upper arm, forearm, thigh, shin, sock, foot, shorts, and the pelvis.
LIMBS = (
    (0.046, 0.042), (0.032, 0.027), (0.026, 0.019), (0.05, 0.036), (0.035, 0.023), (0.037, 0.026),
    (0.023, 0.018), (0.064, 0.062), (0.066, 0.066),
)  # fmt: skip
CHEST, DEPTH = 0.1, 0.066  # the torso's semi-axes, to its side and forward


@dataclass(frozen=True)
class Frame:
    """The pixels of B crops: boxes in body units, and the part of them that is drawn.

    Attributes:
        box: [B, 4]: left, top, width, height.
        size: rows and columns of the part.
        window: the part's top, bottom, left and right in 0..1 of the box.
    """

    box: Tensor
    size: tuple[int, int]
    window: tuple[float, float, float, float] = (0.0, 1.0, 0.0, 1.0)

    def axes(self) -> tuple[Tensor, Tensor]:
        """Middles of pixels: x [B, 1, 1, W] and y [B, 1, H, 1]."""
        top, bottom, left, right = self.window
        rows, columns = self.size
        down = top + (bottom - top) * (torch.arange(rows, device=self.box.device) + 0.5) / rows
        across = left + (right - left) * (torch.arange(columns, device=self.box.device) + 0.5) / columns
        x = self.box[:, :1] + self.box[:, 2:3] * across
        y = self.box[:, 1:2] + self.box[:, 3:] * down
        return x[:, None, None, :], y[:, None, :, None]

    def pixel(self) -> Tensor:
        """A pixel's height: [B, 1, 1, 1]."""
        top, bottom, _, _ = self.window
        return (self.box[:, 3] * (bottom - top) / self.size[0])[:, None, None, None]


@dataclass(frozen=True)
class Figure:
    """Drawn players.

    Attributes:
        light: [B, 3, H, W], premultiplied.
        alpha: [B, 1, H, W] in 0..1.
        shirt: [B, 1, H, W], the visible part of the shirt.
    """

    light: Tensor
    alpha: Tensor
    shirt: Tensor


@dataclass(frozen=True)
class Crops:
    """B crops: players and poses, one a crop, their joints, and their pixels."""

    players: Players
    poses: Poses
    bones: Skeleton
    frame: Frame


class Wardrobe:
    """Kits and their cloth, an atlas [1, 3, K * rows, columns] in light."""

    def __init__(self, kits: Kits) -> None:
        self.kits = kits
        cloth = textures(kits)
        self.cloth = cloth.transpose(0, 1).reshape(1, 3, -1, cloth.shape[3])


@cache
def _numbers(device: torch.device) -> Tensor:
    """The numbers 0..99, one below the other, 0 or 1: [1, 1, 100 * rows, columns]."""
    drawn = []
    for number in range(100):
        digits = [
            torch.tensor([int(cell) for cell in DIGITS[int(digit)]]).view(5, 3) for digit in str(number)
        ]
        gap = torch.zeros(5, 1, dtype=torch.long)
        cells = torch.cat([digits[0], gap, digits[1]], 1) if len(digits) == 2 else F.pad(digits[0], (2, 2))
        drawn.append(F.pad(cells.repeat_interleave(GLYPH, 0).repeat_interleave(GLYPH, 1), (GLYPH,) * 4))
    return torch.cat(drawn).float()[None, None].to(device)


def _pick(atlas: Tensor, row: Tensor, items: int, x: Tensor, y: Tensor) -> Tensor:
    """Look up one of the `items` pictures that are stacked in an atlas [1, C, items * h, w].

    Args:
        atlas: the pictures.
        row: int64 [B], the picture of each crop.
        items: how many pictures.
        x, y: [B, 1, H, W] in 0..1 within the picture; beyond it, its edge.

    Returns:
        [B, C, H, W].
    """
    count, _, height, width = x.shape
    half = 0.5 * items / atlas.shape[2]  # half a pixel, lest the next picture shows
    down = (row[:, None, None, None] + y.clamp(half, 1 - half)) / items
    grid = torch.cat([x, down], 1).permute(0, 2, 3, 1).reshape(1, count * height, width, 2) * 2 - 1
    found = F.grid_sample(atlas, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return found.view(-1, count, height, width).transpose(0, 1)


class Canvas:
    """Distances and cover on one frame's pixels."""

    def __init__(self, frame: Frame) -> None:
        self.x, self.y = frame.axes()
        self.pixel = frame.pixel()

    def along(self, origin: Tensor, axis: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates along unit axes and to their side, from origins, both [B, L, 2]: [B, L, H, W] each."""
        dx, dy = self.x - origin[..., :1, None], self.y - origin[..., 1:, None]
        ax, ay = axis[..., :1, None], axis[..., 1:, None]
        return dx * ax + dy * ay, dx * ay - dy * ax

    def capsules(self, start: Tensor, end: Tensor, radii: Tensor) -> Tensor:
        """Distance from tapered limbs, negative inside: [B, L, H, W].

        Args:
            start, end: [B, L, 2].
            radii: [..., L, 2], at the start and the end.
        """
        bone = end - start
        length = bone.norm(dim=-1, keepdim=True).clamp(min=1e-3)
        along, aside = self.along(start, bone / length)
        length, radii = length[..., None], radii[..., None, :, None]
        part = (along / length).clamp(0, 1)
        grown = radii[..., 0, :] + (radii[..., 1, :] - radii[..., 0, :]) * part
        return torch.hypot(along - part * length, aside) - grown

    def cover(self, distance: Tensor) -> Tensor:
        """Share of each pixel that is inside, 0..1."""
        return (0.5 - distance / self.pixel).clamp(0, 1)


def _over(below: Tensor, colour: Tensor, cover: Tensor, shirt: float = 0.0) -> Tensor:
    """Lay light [B, 3, 1, 1] or [B, 3, H, W] over planes of light, alpha and shirt [B, 5, H, W]."""
    light = torch.lerp(below[:, :3], colour.expand_as(below[:, :3]), cover)
    alpha = below[:, 3:4] + cover - below[:, 3:4] * cover
    return torch.cat([light, alpha, torch.lerp(below[:, 4:], cover * 0 + shirt, cover)], 1)


def _grow(knots: int, size: int, like: Tensor) -> Tensor:
    """Weights [size, knots] that interpolate smoothly."""
    at = torch.linspace(0, knots - 1, size, device=like.device)
    distance = (at[:, None] - torch.arange(knots, device=like.device)).abs().clamp(max=1)
    return (0.5 + 0.5 * torch.cos(torch.pi * distance)).to(like.dtype)


def _folds(crops: Crops, random: Random) -> Tensor:
    """Smooth noise, about -1..1, that bends and shades cloth: [B, 2, H, W]."""
    top, bottom, left, right = crops.frame.window
    coarse = random.normal(
        len(crops.players), 2, 3 + round(14 * (bottom - top)), 3 + round(6 * (right - left))
    )
    down, across = (_grow(*sizes, coarse) for sizes in zip(coarse.shape[2:], crops.frame.size, strict=True))
    return 0.7 * (down @ coarse @ across.T)


class _Painter:
    """Drawer of one batch. Each method lays one part over the planes."""

    def __init__(self, wardrobe: Wardrobe, crops: Crops, sun: Tensor, random: Random) -> None:
        self.players, self.poses, self.sun = crops.players, crops.poses, sun[:, None, None, None]
        self.canvas = Canvas(crops.frame)
        self.colours = decode(wardrobe.kits.colours[crops.players.kit])[..., None, None]
        self.folds = _folds(crops, random)
        bones, wide = crops.bones, crops.players.width[:, None, None]
        self.middle, arms, legs = bones.middle[..., :2], bones.arms[..., :2], bones.legs[..., :2]
        cuff = arms[:, :, 0] + 0.72 * (arms[:, :, 1] - arms[:, :, 0])
        sock = legs[:, :, 1] + 0.25 * (legs[:, :, 2] - legs[:, :, 1])
        seam = legs[:, :, 0] + 0.6 * (legs[:, :, 1] - legs[:, :, 0])
        start = torch.cat(
            [arms[:, :, 0], arms[:, :, 0], arms[:, :, 1], legs[:, :, 0], legs[:, :, 1], sock], 1
        )
        end = torch.cat([cuff, arms[:, :, 1], arms[:, :, 2], legs[:, :, 1], legs[:, :, 2], legs[:, :, 2]], 1)
        start = torch.cat([start, legs[:, :, 2], legs[:, :, 0], legs[:, :1, 0]], 1)
        end = torch.cat([end, legs[:, :, 3], seam, legs[:, 1:, 0]], 1)
        radii = torch.tensor(LIMBS, device=sun.device).repeat_interleave(2, 0)[:-1] * wide
        distances = self.canvas.capsules(start, end, radii)
        (self.sleeve, self.upper, self.fore, self.thigh, self.shin, self.sock, self.foot, self.shorts) = (
            distances[:, 2 * part : 2 * part + 2] for part in range(8)
        )
        self.pelvis = distances[:, 16:]
        self.cuffs = (arms[:, :, 0], cuff)
        self.cloth, self.torso = self._shirt(wardrobe, crops)

    def _torso(self) -> tuple[Tensor, Tensor, Tensor]:
        """Distance from the torso, and places on it, -1..1 across and 0..1 down: [B, 1, H, W] each."""
        neck, hips = self.middle[:, :1], self.middle[:, 2:]
        spine = hips - neck
        length = spine.norm(dim=-1, keepdim=True)
        along, aside = self.canvas.along(neck, spine / length)
        length = length[..., None] * 1.05
        down = along / length
        yaw, wide = self.poses.yaw[:, None, None, None], self.players.width[:, None, None, None]
        half = torch.hypot(CHEST * torch.cos(yaw), DEPTH * torch.sin(yaw)) * wide
        half = half * (1 - 0.12 * torch.sin(math.pi * down.clamp(0, 1)) + 0.05 * self.folds[:, :1] * down)
        across = (aside / half).clamp(-1.2, 1.2)
        top = 0.13 * across**2 - 0.01
        distance = torch.maximum(aside.abs() - half, torch.maximum(top - down, down - 1) * length)
        return distance, across, down

    def _shirt(self, wardrobe: Wardrobe, crops: Crops) -> tuple[Tensor, Tensor]:
        """Light of the cloth [B, 3, H, W], and the distance from the torso [B, 1, H, W]."""
        torso, across, down = self._torso()
        bend, slip = self.folds[:, :1], self.folds[:, 1:]
        yaw = self.poses.yaw[:, None, None, None]
        angle = torch.asin(across.clamp(-0.97, 0.97)) - yaw + 0.12 * bend
        y = down + 0.02 * slip
        shade = 1 - 0.14 * across.clamp(-1, 1) ** 2 + 0.25 * self.sun * across.clamp(-1, 1) + 0.13 * bend
        near = self.sleeve[:, 1:]
        # An arm before the body darkens the cloth around it.
        shade = shade * (1 - 0.3 * (1 - near / 0.025).clamp(0, 1) * (near > 0))
        behind, before = (torso > self.canvas.pixel) & (self.sleeve[:, :1] < near), near < 0
        sleeves = behind | before
        far = (behind & ~before).expand_as(torso)
        along, aside = self.canvas.along(self.cuffs[0], F.normalize(self.cuffs[1] - self.cuffs[0], dim=-1))
        along, aside = (torch.where(far, part[:, :1], part[:, 1:]) for part in (along, aside))
        angle = torch.where(sleeves, aside * 10 - yaw + torch.where(far, -1.5, 1.5), angle)
        y = torch.where(sleeves, 0.1 + along * 3, y)
        shade = torch.where(sleeves, 0.97 + 0.1 * slip + 4 * self.sun * aside, shade)
        number, kit = crops.players.number, crops.players.kit
        found = _pick(
            wardrobe.cloth, kit, len(wardrobe.kits), torch.remainder(angle / (2 * math.pi) + 0.5, 1), y
        )
        plain = sleeves & ~wardrobe.kits.patterned_sleeves[kit][:, None, None, None]
        found = torch.where(plain, self.colours[:, Part.SLEEVE], found)
        back = torch.remainder(angle, 2 * math.pi) - math.pi
        digits = _pick(_numbers(angle.device), number, 100, (back / 1.5 + 0.5).clamp(0, 1), (y - 0.2) / 0.45)
        digits = digits * ((back.abs() < 0.75) & (y > 0.2) & (y < 0.65) & ~sleeves)
        found = torch.lerp(found, self.colours[:, Part.NUMBER].expand_as(found), digits)
        return found * shade.clamp(min=0.3), torso

    def arm(self, planes: Tensor, side: int) -> Tensor:
        """The far (0) or near (1) arm and its sleeve."""
        cover = self.canvas.cover
        part = slice(side, side + 1)
        skin, long = self.players.skin[..., None, None], self.players.long_sleeves[:, None, None, None]
        arm = torch.where(long, self.cloth, skin.expand_as(self.cloth))
        planes = _over(planes, arm, cover(torch.minimum(self.upper[:, part], self.fore[:, part])))
        return _over(planes, self.cloth, cover(self.sleeve[:, part]), 1.0)

    def leg(self, planes: Tensor, side: int) -> Tensor:
        """The far (0) or near (1) leg: skin, sock and boot."""
        cover, part = self.canvas.cover, slice(side, side + 1)
        dim = 0.8 + 0.2 * side + 0.12 * self.folds[:, 1:]
        skin, boots = (colour[..., None, None] for colour in (self.players.skin, self.players.boots))
        planes = _over(planes, skin * dim, cover(torch.minimum(self.thigh[:, part], self.shin[:, part])))
        planes = _over(planes, self.colours[:, Part.SOCKS] * dim, cover(self.sock[:, part]))
        return _over(planes, boots * dim, cover(self.foot[:, part]))

    def hips(self, planes: Tensor) -> Tensor:
        """The shorts."""
        shape = torch.minimum(self.shorts.amin(1, keepdim=True), self.pelvis)
        # Cloth between the legs lies in shadow.
        crease = (1 - (self.shorts[:, :1] - self.shorts[:, 1:]).abs() / 0.02).clamp(0, 1) * (self.pelvis > 0)
        shade = 1 + 0.15 * self.folds[:, :1] - 0.25 * crease
        return _over(planes, self.colours[:, Part.SHORTS] * shade, self.canvas.cover(shape))

    def body(self, planes: Tensor) -> Tensor:
        """The shirt without sleeves."""
        return _over(planes, self.cloth, self.canvas.cover(self.torso), 1.0)

    def head(self, planes: Tensor) -> Tensor:
        """Neck, face and hair."""
        skin, hair = self.players.skin[..., None, None], self.players.hair[..., None, None]
        neck, centre = self.middle[:, :1], self.middle[:, 1:2]
        radii = torch.tensor([[0.03, 0.028]], device=neck.device)
        planes = _over(planes, skin * 0.8, self.canvas.cover(self.canvas.capsules(neck, centre, radii)))
        u = (self.canvas.x - centre[..., :1, None]) / 0.044
        v = (self.canvas.y - centre[..., 1:, None]) / 0.064
        yaw = self.poses.yaw[:, None, None, None]
        shape = self.canvas.cover((torch.hypot(u, v) - 1) * 0.05)
        planes = _over(planes, skin * (1 + 0.2 * self.sun * u.clamp(-1, 1)), shape)
        line = -0.3 + 0.45 * (1 - torch.cos(yaw)) - 0.5 * torch.sin(yaw) * u
        return _over(planes, hair, shape * self.canvas.cover((v - line) * 0.064))


def draw(wardrobe: Wardrobe, crops: Crops, sun: Tensor, random: Random) -> Figure:
    """Draw players under even light.

    Args:
        wardrobe: what the players' `kit` counts.
        crops: who stands how in which pixels.
        sun: [B] in -1..1, how much brighter the right side is than the left.
        random: the source of the cloth's folds.
    """
    painter = _Painter(wardrobe, crops, sun, random)
    planes = torch.zeros(len(crops.players), 5, *crops.frame.size, device=sun.device)
    planes = painter.leg(painter.arm(planes, 0), 0)
    planes = painter.body(painter.hips(painter.leg(planes, 1)))
    planes = painter.arm(painter.head(planes), 1)
    return Figure(planes[:, :3], planes[:, 3:4], planes[:, 4:])
