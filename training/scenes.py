"""A drawing becomes a picture: placing, which benchmark and training share, and what training adds.

Art is premultiplied RGBA in 0..1, [B, 4, S, S]. Pictures are RGB in 0..1, [B, 3, C, C]. Every random choice
comes from one generator, so that a seed repeats a picture.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Placement",
    "Random",
    "art_brightness",
    "backgrounds",
    "compose",
    "degrade",
    "ink_colour",
    "inked",
    "place",
    "restyle",
    "sample_art",
    "sample_placement",
    "with_brightness",
]

LUMA = (0.299, 0.587, 0.114)


class Random:
    """Random tensors of one device and type from one generator."""

    def __init__(
        self, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device, self.dtype = torch.device(device), dtype

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform numbers of `shape`."""
        drawn = torch.rand(shape, generator=self.generator, device=self.device)
        return (low + (high - low) * drawn).to(self.dtype)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers of `shape`."""
        return torch.randn(shape, generator=self.generator, device=self.device).to(self.dtype)

    def chance(self, probability: float, count: int) -> Tensor:
        """bool [count], each True with `probability`."""
        return torch.rand(count, generator=self.generator, device=self.device) < probability


@dataclass(frozen=True)
class Placement:
    """Places and grounds of drawings.

    Attributes:
        theta: [B, 2, 3], canvas coordinates to art coordinates, as `affine_grid` takes it.
        ink: [B, 3], the colour that one-ink drawings get.
        background: [B, 3, C, C].
        tint: [B, 3], gains of the finished picture.
    """

    theta: Tensor
    ink: Tensor
    background: Tensor
    tint: Tensor


def _luma(rgb: Tensor) -> Tensor:
    """[B, 3, ...] -> [B, ...]."""
    red, green, blue = rgb.unbind(1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def art_brightness(art: Tensor) -> Tensor:
    """Mean luminance of the visible part: [B]."""
    return _luma(art[:, :3]).mean((1, 2)) / art[:, 3].mean((1, 2)).clamp(min=1e-3)


def with_brightness(colour: Tensor, brightness: Tensor) -> Tensor:
    """Shift colours [B, 3] to a luminance [B]. Clipping leaves a little less."""
    return (colour + (brightness - _luma(colour))[:, None]).clamp(0, 1)


def _smooth(coarse: Tensor, size: int) -> Tensor:
    """Interpolate a coarse grid with cosine weights: [..., k, k] -> [..., size, size]."""
    knots = coarse.shape[-1]
    at = torch.linspace(0, knots - 1, size, device=coarse.device)
    distance = (at[:, None] - torch.arange(knots, device=coarse.device)).abs().clamp(max=1)
    weight = (0.5 + 0.5 * torch.cos(torch.pi * distance)).to(coarse.dtype)  # [size, k], rows sum to 1
    return weight @ coarse @ weight.T


def backgrounds(mean: Tensor, canvas: int, random: Random) -> Tensor:
    """Plain, with a gradient, or cloudy around the mean colours [B, 3]: [B, 3, canvas, canvas]."""
    count = len(mean)
    slope = random.normal(count, 3, 2) * 0.16 * random.chance(0.4, count)[:, None, None]
    axis = torch.linspace(-1, 1, canvas, device=random.device, dtype=random.dtype)
    background = mean[:, :, None, None] + slope[:, :, :1, None] * axis + slope[:, :, 1:, None] * axis[:, None]
    clouds = random.normal(count, 3, 4, 4) * 0.12 * random.chance(0.25, count)[:, None, None, None]
    background = background + _smooth(clouds, canvas)
    return background.clamp(0, 1)


def sample_placement(
    brightness: Tensor, mono: Tensor, canvas: int, random: Random, rotation: float = 0.0
) -> Placement:
    """Random scale .55-1.25, position, background, ink and tint.

    Backgrounds differ from the drawing's own brightness, because white on white shows nothing.

    Args:
        brightness: [B], mean luminance of the art.
        mono: bool [B], drawings that get a random ink.
        canvas: pixels per side.
        random: the source of every choice.
        rotation: largest angle in radians either way.
    """
    count = len(brightness)
    scale = random.uniform(count, low=0.55, high=1.25)
    room = (1 - scale).abs()
    shift = random.uniform(count, 2, low=-1, high=1) * (room[:, None] + 0.06)
    angle = random.uniform(count, low=-1, high=1) * rotation
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    linear = torch.stack([cos, -sin, sin, cos], 1).view(count, 2, 2)
    theta = torch.cat([linear, -(linear @ shift[..., None])], 2)

    light = random.chance(0.5, count)
    ground = torch.where(
        light, random.uniform(count, low=0.75, high=1.0), random.uniform(count, low=0.05, high=1.0)
    )
    ink = ink_colour(ground, random)
    too_close = ~mono & ((ground - brightness).abs() < 0.15)
    away = torch.where(brightness > 0.5, brightness - 0.3, brightness + 0.3)
    ground = torch.where(too_close, away, ground)
    saturation = random.uniform(count, 1) * random.chance(0.75, count)[:, None]
    mean = with_brightness(0.5 + (random.uniform(count, 3) - 0.5) * saturation, ground)
    tint = 1 + random.uniform(count, 3, low=-0.07, high=0.07) + random.uniform(count, 1, low=-0.08, high=0.05)
    return Placement(theta, ink, backgrounds(mean, canvas, random), tint)


def ink_colour(ground: Tensor, random: Random) -> Tensor:
    """Random colours [B, 3] that stand out from grounds of brightness [B]."""
    count = len(ground)
    brightness = torch.where(
        ground > random.uniform(count, low=0.4, high=0.6),
        ground * random.uniform(count, low=0.0, high=0.55),
        1 - (1 - ground) * random.uniform(count, low=0.0, high=0.55),
    )
    return with_brightness(random.uniform(count, 3) * random.chance(0.6, count)[:, None], brightness)


def sample_art(art: Tensor, theta: Tensor, canvas: int, warp: Tensor | None = None) -> Tensor:
    """Art [B, 4, S, S] as it lies on a canvas: [B, 4, canvas, canvas]. The arguments are those of `place`."""
    grid = F.affine_grid(theta, [len(art), 4, canvas, canvas], align_corners=False)
    grid = grid if warp is None else grid + warp
    return F.grid_sample(art, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def inked(art: Tensor, mono: Tensor, ink: Tensor) -> Tensor:
    """Premultiplied RGBA [B, 4, ...] with the drawings marked in `mono` [B] in their ink [B, 3]."""
    colour = torch.where(mono[:, None, None, None], ink[:, :, None, None] * art[:, 3:], art[:, :3])
    return torch.cat([colour, art[:, 3:]], 1)


def place(art: Tensor, mono: Tensor, placement: Placement, warp: Tensor | None = None) -> Tensor:
    """Draw art onto its background: [B, 4, S, S] -> RGB [B, 3, C, C] in 0..1.

    Args:
        art: premultiplied RGBA.
        mono: bool [B]; these drawings are recoloured with the placement's ink.
        placement: for the same B drawings.
        warp: [B, C, C, 2], added to the sampling grid.
    """
    canvas = placement.background.shape[-1]
    drawn = inked(sample_art(art, placement.theta, canvas, warp), mono, placement.ink)
    picture = drawn[:, :3] + placement.background * (1 - drawn[:, 3:])
    return (picture * placement.tint[:, :, None, None]).clamp(0, 1)


def compose(art: Tensor, mono: Tensor, canvas: int, random: Random) -> Tensor:
    """The benchmark's picture of each drawing: placed, nothing else. RGB [B, 3, canvas, canvas] in 0..1."""
    return place(art, mono, sample_placement(art_brightness(art), mono, canvas, random))


def plain(art: Tensor, mono: Tensor, canvas: int) -> Tensor:
    """Centred on white at full size, one-ink drawings black: RGB [B, 3, canvas, canvas] in 0..1."""
    drawn = (
        F.interpolate(art, (canvas, canvas), mode="bilinear", antialias=True)
        if canvas != art.shape[-1]
        else art
    )
    colour = drawn[:, :3] * (~mono[:, None, None, None])
    return (colour + 1 - drawn[:, 3:]).clamp(0, 1)


def _blur(x: Tensor, radius: int) -> Tensor:
    """Two box filters: close to a Gaussian."""
    for _ in range(2):
        x = F.avg_pool2d(x, 2 * radius + 1, 1, radius, count_include_pad=False)
    return x


def _edges(art: Tensor, gain: Tensor) -> Tensor:
    """Strength of the strongest colour or outline edge, 0..1: [B, 1, S, S]."""
    high, low = F.max_pool2d(art, 3, 1, 1), -F.max_pool2d(-art, 3, 1, 1)
    return ((high - low).amax(1, keepdim=True) * gain).clamp(0, 1)


def _one_ink(art: Tensor, random: Random) -> Tensor:
    """Colour art to black on transparent in three ways: lines, a silhouette with cut lines, a threshold."""
    count = len(art)
    edges = _edges(art, random.uniform(count, 1, 1, 1, low=1.0, high=2.5))
    alpha = art[:, 3:]
    luma = _luma(art[:, :3])[:, None] / alpha.clamp(min=0.05)
    level = (luma * alpha).mean((2, 3), keepdim=True) / alpha.mean((2, 3), keepdim=True).clamp(min=1e-3)
    level = level + random.uniform(count, 1, 1, 1, low=-0.12, high=0.12)
    dark = ((level - luma) * 10 + 0.5).clamp(0, 1) * alpha
    inverse = random.chance(0.35, count)[:, None, None, None]
    dark = torch.where(inverse, alpha - dark, dark)
    way = random.uniform(count, 1, 1, 1)
    lined = torch.maximum(dark, edges)
    ink = torch.where(
        way < 0.3, edges, torch.where(way < 0.55, alpha * (1 - edges), torch.where(way < 0.8, lined, dark))
    )
    return torch.cat([torch.zeros_like(art[:, :3]), ink], 1)


def _relief(art: Tensor, random: Random) -> Tensor:
    """Light falling on a puffed-up drawing, as in 3D art. Colours stay within 0..alpha."""
    count = len(art)
    alpha = art[:, 3:]
    share = random.uniform(count, 1, 1, 1, low=0.0, high=0.6)
    bumps = alpha * (1 - share) + _luma(art[:, :3])[:, None] * share
    height = _blur(bumps, 2) + 2 * _blur(bumps, 5)
    down = F.pad(height[:, :, 2:] - height[:, :, :-2], (0, 0, 1, 1))
    right = F.pad(height[:, :, :, 2:] - height[:, :, :, :-2], (1, 1, 0, 0))
    angle = random.uniform(count, 1, 1, 1, low=0.0, high=6.283)
    lit = (torch.cos(angle) * right + torch.sin(angle) * down) * random.uniform(
        count, 1, 1, 1, low=1.0, high=4.0
    )
    axis = torch.linspace(-0.25, 0.25, art.shape[-1], device=art.device, dtype=art.dtype)
    lit = lit + random.uniform(count, 1, 1, 1, low=-1, high=1) * axis[:, None]
    shade, shine = 1 + lit.clamp(-0.6, 0), lit.clamp(0, 0.6)
    colour = art[:, :3] * shade
    return torch.cat([colour + (alpha - colour) * shine, alpha], 1)


def _recolour(art: Tensor, random: Random, strength: float) -> Tensor:
    """A colour matrix near the identity, contrast and brightness, for each drawing."""
    count = len(art)
    identity = torch.eye(3, device=art.device, dtype=art.dtype)
    grey = torch.tensor(LUMA, device=art.device, dtype=art.dtype).expand(3, 3)
    saturation = random.uniform(count, 1, 1, low=1 - 2 * strength, high=1 + 2 * strength)
    matrix = identity * saturation + grey * (1 - saturation) + random.normal(count, 3, 3) * 0.4 * strength
    contrast = random.uniform(count, 1, 1, low=1 - strength, high=1 + strength)
    bias = 0.5 * (1 - contrast) + random.uniform(count, 3, 1, low=-0.4, high=0.4) * strength
    alpha = art[:, 3:]
    flat = contrast * (matrix @ art[:, :3].flatten(2)) + bias * alpha.flatten(2)
    colour = torch.minimum(flat.view_as(art[:, :3]).clamp(min=0), alpha)
    return torch.cat([colour, alpha], 1)


def restyle(art: Tensor, mono: Tensor, strength: float, random: Random) -> tuple[Tensor, Tensor]:
    """Change how a drawing is drawn, to bridge the styles that training has not seen.

    The batch must be in random order: parts of it are taken by position.

    Args:
        art: premultiplied RGBA [B, 4, S, S].
        mono: bool [B].
        strength: 0 leaves everything, 1 restyles about 60% of the colour drawings.
        random: the source of every choice.

    Returns:
        The art and the new `mono`.
    """
    count = len(art)
    one_ink, relief, strong = (int(count * share * strength) for share in (0.25, 0.25, 0.12))
    inked, lit, vivid, rest = art.split([one_ink, relief, strong, count - one_ink - relief - strong])
    was = mono[:one_ink, None, None, None]
    inked = torch.where(was, inked, _one_ink(inked, random))
    lit = _recolour(_relief(lit, random), random, 0.15)
    changed = torch.cat([inked, lit, _recolour(vivid, random, 0.5), _recolour(rest, random, 0.12)])
    # A lit one-ink drawing keeps its shading only if it is coloured before.
    now = torch.cat([torch.ones_like(mono[:one_ink]), mono[one_ink:]])
    return changed, now


def ink_first(art: Tensor, mono: Tensor, random: Random) -> tuple[Tensor, Tensor]:
    """Give a third of the one-ink drawings a colour of their own, to be restyled as colour art."""
    count = len(art)
    chosen = mono & random.chance(0.33, count)
    ink = random.uniform(count, 3)[:, :, None, None] * art[:, 3:]
    colour = torch.where(chosen[:, None, None, None], ink, art[:, :3])
    return torch.cat([colour, art[:, 3:]], 1), mono & ~chosen


def elastic(count: int, canvas: int, amount: float, random: Random) -> Tensor:
    """Smooth random displacements in units of half a canvas: [count, canvas, canvas, 2]."""
    coarse = random.normal(count, 2, 5, 5) * random.uniform(count, 1, 1, 1) * amount
    return _smooth(coarse, canvas).permute(0, 2, 3, 1)


def deform(placement: Placement, amount: float, random: Random) -> Placement:
    """Stretch and shear each placement a little."""
    count = len(placement.theta)
    change = random.normal(count, 2, 2) * amount + torch.eye(2, device=random.device, dtype=random.dtype)
    return Placement(change @ placement.theta, placement.ink, placement.background, placement.tint)


def degrade(pictures: Tensor, random: Random) -> Tensor:
    """Soften, speckle and cover parts of some pictures. The batch must be in random order."""
    count, _, size, _ = pictures.shape
    part = count // 8
    soft, noisy, covered, rest = pictures.split([part, part, part, count - 3 * part])
    small = F.interpolate(soft, scale_factor=0.5, mode="bilinear", antialias=False)
    soft = F.interpolate(small, (size, size), mode="bilinear", align_corners=False)
    noisy = noisy + random.normal(*noisy.shape) * random.uniform(part, 1, 1, 1, high=0.06)
    axis = torch.arange(size, device=random.device, dtype=random.dtype)
    corner = random.uniform(part, 2, 1, low=-0.1, high=0.9) * size
    extent = random.uniform(part, 2, 1, low=0.1, high=0.4) * size
    inside = (axis >= corner) & (axis < corner + extent)  # [part, 2, size]
    box = (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]
    covered = torch.where(box, random.uniform(part, 3, 1, 1), covered)
    return torch.cat([soft, noisy, covered, rest]).clamp(0, 1)
