"""From light to a picture: a camera's grade, its resolution and noise, and JPEG.

Light is [B, 3, H, W] from 0 with 1 for white in full sun. Pictures are display values in 0..1.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from training.jerseys.colours import GAMMA
from training.scenes import LUMA, Random

__all__ = ["Cameras", "Conditions", "expose", "jpeg", "sample_cameras", "sense"]

Range = tuple[float, float]


@dataclass(frozen=True)
class Conditions:
    """Difficulty of a picture.

    Attributes:
        heights: least and greatest height of a crop in pixels.
        gain: of the light, drawn evenly in its logarithm.
        shadow: light in a shadow as a part of the sun's, likewise.
        shaded, crossed: the part of the crops in shadow, and of those with the edge of one inside.
        warmth: spread of the colour temperature, as the logarithm of red over blue.
        grade: strength of cameras' grades; at 0 all cameras are alike, 1 is two broadcasters.
        noise: deviation of the sensor's noise in display values.
        blur: the strongest, in pixels of the crop.
        quality: of the JPEG.
        subsampled: part of the JPEGs whose colour is stored at half the resolution.
        jitter: deviation of the box's edges in parts of its width and height.
        overlap, clutter: parts of the crops with another player, and with something else than pitch behind.
    """

    heights: tuple[int, int] = (36, 130)
    gain: Range = (0.75, 1.05)
    shadow: Range = (0.45, 0.6)
    shaded: float = 0.0
    crossed: float = 0.0
    warmth: float = 0.03
    grade: float = 0.05
    noise: Range = (0.005, 0.02)
    blur: float = 0.8
    quality: tuple[int, int] = (45, 92)
    subsampled: float = 1.0
    jitter: float = 0.03
    overlap: float = 0.1
    clutter: float = 0.12


@dataclass(frozen=True)
class Cameras:
    """C cameras: matrix [C, 3, 3] in linear light, gamma, saturation and exposure [C]."""

    matrix: Tensor
    gamma: Tensor
    saturation: Tensor
    exposure: Tensor


def sample_cameras(count: int, strength: Tensor, random: Random) -> Cameras:
    """Random cameras, `strength` [count] off the neutral one."""
    mix = random.normal(count, 3, 3) * 0.07 * strength[:, None, None]
    # Cross-talk keeps white, which is then balanced a little wrongly.
    mix = mix - mix.mean(2, keepdim=True)
    balance = torch.exp(random.normal(count, 3) * 0.12 * strength[:, None])
    matrix = (torch.eye(3, device=random.device) + mix) * balance[:, :, None]

    def about_one(width: float) -> Tensor:
        return torch.exp(random.uniform(count, low=-1, high=1) * width * strength)

    return Cameras(matrix, GAMMA * about_one(0.22), about_one(0.4), about_one(0.35))


def expose(light: Tensor, cameras: Cameras, camera: Tensor) -> Tensor:
    """Display values 0..1 of light through cameras, int64 [B]."""
    matrix = cameras.matrix[camera] * cameras.exposure[camera][:, None, None]
    seen = (matrix @ light.flatten(2)).view_as(light)
    bright = (seen - 0.8).clamp(min=0)  # highlights are rolled off instead of cut
    seen = (seen - bright + 0.2 * torch.tanh(bright * 4)).clamp(1e-5, 1)
    display = seen ** (1 / cameras.gamma[camera])[:, None, None, None]
    grey = (display * torch.tensor(LUMA, device=light.device)[:, None, None]).sum(1, keepdim=True)
    return torch.lerp(
        grey.expand_as(display), display, cameras.saturation[camera][:, None, None, None]
    ).clamp(0, 1)


def _mean3(x: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)


def sense(pictures: Tensor, size: tuple[int, int], conditions: Conditions, random: Random) -> Tensor:
    """Scale display values to a crop's rows and columns, soften or sharpen, move and add noise: 0..1."""
    count = len(pictures)
    amounts = random.uniform(5, count, 1, 1, 1)
    once, twice = min(conditions.blur, 1.0), min(max(conditions.blur - 1, 0.0), 1.0)
    softness, more, motion, sharpness = (amounts[:4] ** 2).unbind(0)
    x = F.interpolate(pictures, size, mode="bilinear", antialias=True)
    x = torch.lerp(x, _mean3(x), softness * once)
    if twice:
        x = torch.lerp(x, _mean3(x), more * twice)
    moved = F.avg_pool2d(F.pad(x, (2, 2, 0, 0), mode="replicate"), (1, 5), 1)
    x = torch.lerp(x, moved, motion * once)
    # Broadcast cameras sharpen edges.
    x = torch.lerp(x, _mean3(x), -0.7 * sharpness)
    low, high = conditions.noise
    return (x + random.normal(*x.shape) * (low + (high - low) * amounts[4])).clamp(0, 1)


# The example tables of the JPEG standard, which encoders scale by their quality.
LUMA_STEPS = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
CHROMA_STEPS = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99,
    47, 66, 99, 99, 99, 99, 99, 99, *[99] * 32,
)  # fmt: skip
YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


@cache
def _constants(device: torch.device) -> tuple[Tensor, ...]:
    """The cosine transform [8, 8], both tables [8, 8], and the colour matrix and its inverse [3, 3]."""
    row = torch.arange(8.0)
    cosine = torch.cos(torch.pi * (2 * row + 1) * row[:, None] / 16) / 2
    cosine[0] *= 0.5**0.5
    tables = (torch.tensor(steps, dtype=torch.float32).view(8, 8) for steps in (LUMA_STEPS, CHROMA_STEPS))
    matrix = torch.tensor(YCC)
    return tuple(constant.to(device) for constant in (cosine, *tables, matrix, torch.linalg.inv(matrix)))


def _quantised(planes: Tensor, steps: Tensor) -> Tensor:
    """Through 8 x 8 blocks and back: planes [B, C, 8h, 8w], steps [B, 8, 8]."""
    cosine = _constants(planes.device)[0]
    count, channels, height, width = planes.shape
    blocks = planes.view(count, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    steps = steps[:, None, None, None]
    levels = torch.round(cosine @ blocks @ cosine.T / steps) * steps
    return (cosine.T @ levels @ cosine).transpose(3, 4).reshape(planes.shape)


def jpeg(pictures: Tensor, quality: Tensor, subsampled: Tensor) -> Tensor:
    """Pictures of one size after JPEG, computed on their device.

    Args:
        pictures: [B, 3, H, W] in 0..1.
        quality: [B] in 1..100.
        subsampled: bool [B], colour at half the resolution.

    Returns:
        [B, 3, H, W] in whole steps of 1/255.
    """
    height, width = pictures.shape[2:]
    _, luma, chroma, matrix, inverse = _constants(pictures.device)
    scale = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)[:, None, None]
    luma_steps, chroma_steps = (
        ((table * scale + 50) / 100).floor().clamp(1, 255) for table in (luma, chroma)
    )
    padded = F.pad(pictures, (0, -width % 16, 0, -height % 16), mode="replicate")
    ycc = (matrix @ (padded * 255).round().flatten(2)).view_as(padded)
    grey = _quantised(ycc[:, :1] - 128, luma_steps) + 128
    colour = ycc[:, 1:]
    small = F.interpolate(
        _quantised(F.avg_pool2d(colour, 2), chroma_steps),
        scale_factor=2,
        mode="bilinear",
        align_corners=False,
    )
    colour = torch.where(subsampled[:, None, None, None], small, _quantised(colour, chroma_steps))
    rgb = (inverse @ torch.cat([grey, colour], 1).flatten(2)).view_as(padded)[:, :, :height, :width]
    return rgb.round().clamp(0, 255) / 255
