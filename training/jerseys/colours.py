"""Colours: display values and light, CIELAB differences, and the colours that kits and players wear."""

import torch
from torch import Tensor

from training.scenes import Random

__all__ = [
    "decode",
    "delta_e",
    "distinct",
    "encode",
    "integers",
    "lab",
    "palette",
    "rgb_of_lab",
    "shifted",
    "skin_and_hair",
]

GAMMA = 2.2
# Colours that clubs wear, as display values.
KIT_COLOURS = (
    (0.80, 0.07, 0.11), (0.62, 0.04, 0.10), (0.42, 0.05, 0.16), (0.91, 0.30, 0.10), (0.96, 0.52, 0.08),
    (0.98, 0.80, 0.10), (0.93, 0.92, 0.40), (0.10, 0.52, 0.22), (0.04, 0.30, 0.16), (0.45, 0.80, 0.25),
    (0.05, 0.15, 0.50), (0.08, 0.27, 0.72), (0.05, 0.08, 0.22), (0.42, 0.70, 0.92), (0.10, 0.55, 0.60),
    (0.35, 0.15, 0.50), (0.60, 0.35, 0.70), (0.93, 0.45, 0.62), (0.95, 0.95, 0.95), (0.92, 0.92, 0.86),
    (0.08, 0.08, 0.09), (0.25, 0.26, 0.28), (0.60, 0.62, 0.64), (0.55, 0.36, 0.20),
)  # fmt: skip
SKIN = ((0.96, 0.80, 0.69), (0.88, 0.67, 0.53), (0.76, 0.54, 0.40), (0.55, 0.36, 0.25), (0.32, 0.20, 0.15))
HAIR = ((0.09, 0.07, 0.06), (0.23, 0.15, 0.10), (0.45, 0.30, 0.18), (0.78, 0.62, 0.36), (0.55, 0.53, 0.50))
XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
WHITE = (0.9505, 1.0, 1.089)
BEND = 6 / 29


def integers(count: int, low: int, high: int, random: Random) -> Tensor:
    """int64 [count] in low..high - 1."""
    return (random.uniform(count) * (high - low)).long().clamp(max=high - low - 1) + low


def decode(display: Tensor) -> Tensor:
    """Display values to light, both 0..1."""
    return display.clamp(min=0) ** GAMMA


def encode(light: Tensor) -> Tensor:
    """Light to display values, both 0..1."""
    return light.clamp(min=1e-6) ** (1 / GAMMA)


def lab(rgb: Tensor) -> Tensor:
    """CIELAB of display values [..., 3] in 0..1: L 0..100."""
    white = torch.tensor(WHITE, device=rgb.device)
    xyz = decode(rgb.float()) @ torch.tensor(XYZ, device=rgb.device).T / white
    root = torch.where(xyz > BEND**3, xyz.clamp(min=1e-6) ** (1 / 3), xyz / (3 * BEND**2) + 4 / 29)
    x, y, z = root.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def rgb_of_lab(colour: Tensor) -> Tensor:
    """Display values [..., 3] of CIELAB colours, clipped to 0..1."""
    light, a, b = colour.unbind(-1)
    y = (light + 16) / 116
    root = torch.stack([y + a / 500, y, y - b / 200], -1)
    xyz = torch.where(root > BEND, root**3, 3 * BEND**2 * (root - 4 / 29))
    white = torch.tensor(WHITE, device=colour.device)
    inverse = torch.tensor(XYZ, device=colour.device).double().inverse().float()
    return encode((xyz * white) @ inverse.T).clamp(0, 1)


def delta_e(first: Tensor, second: Tensor) -> Tensor:
    """CIE 1976 colour difference of display values [..., 3]: [...]."""
    return (lab(first) - lab(second)).norm(dim=-1)


def palette(count: int, random: Random, uniform: float = 0.0) -> Tensor:
    """Kit colours [count, 3], display values: a club's colour with some variation, or any at all.

    Args:
        count: colours.
        random: the source of every choice.
        uniform: share that is drawn from the whole RGB cube.
    """
    table = torch.tensor(KIT_COLOURS, device=random.device)
    chosen = table[integers(count, 0, len(table), random)]
    varied = chosen + random.normal(count, 3) * 0.035 + random.normal(count, 1) * 0.02
    anything = random.uniform(count, 3)
    return torch.where(random.chance(uniform, count)[:, None], anything, varied).clamp(0.03, 0.97)


def distinct(others: Tensor, least: float, random: Random, uniform: float = 0.0) -> Tensor:
    """A kit colour for each row, `least` away from `others` [count, n, 3] if 16 tries allow it."""
    count = len(others)
    tries = palette(count * 16, random, uniform).view(count, 16, 3)
    nearest = delta_e(tries[:, :, None], others[:, None]).amin(2)  # [count, 16]
    # Beyond the limit all are equal, and the earliest is taken.
    order = torch.linspace(0, 1e-3, 16, device=random.device)
    best = (nearest.clamp(max=least) - order).argmax(1)
    return tries[torch.arange(count, device=random.device), best]


def shifted(colour: Tensor, difference: Tensor, random: Random) -> Tensor:
    """Colours at a CIELAB distance of `difference` [count] from `colour` [count, 3], within the gamut."""
    count = len(colour)
    direction = random.normal(count, 64, 3)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    tries = rgb_of_lab(lab(colour)[:, None] + direction * difference[:, None, None])
    # Clipping to the gamut shortens a shift.
    error = (delta_e(tries, colour[:, None]) - difference[:, None]).abs()
    return tries[torch.arange(count, device=random.device), error.argmin(1)]


def skin_and_hair(count: int, random: Random) -> tuple[Tensor, Tensor]:
    """Display values [count, 3] of skin and of hair."""
    skins, hairs = (torch.tensor(table, device=random.device) for table in (SKIN, HAIR))
    place = random.uniform(count) * (len(skins) - 1.001)
    low = place.long()
    share = (place - low)[:, None]
    skin = skins[low] * (1 - share) + skins[low + 1] * share
    # Dark skin comes with dark hair.
    limit = torch.where(place > 2, 2, len(hairs)).float()
    hair = hairs[(random.uniform(count) * limit).long().clamp(max=len(hairs) - 1)]
    return skin, (hair + random.normal(count, 3) * 0.02).clamp(0.02, 0.95)
