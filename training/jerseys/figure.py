"""Footballers' builds and poses, their joints in the picture, and the box that a detector draws around them.

The unit of length is a standing player's height. A body's coordinates are forward, to its left, and down from
the middle of its hips.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from training.jerseys.colours import decode, integers, palette, skin_and_hair
from training.scenes import Random

__all__ = ["Players", "Poses", "Skeleton", "boxes", "sample_players", "sample_poses", "skeleton"]

TRUNK, UPPER_ARM, FOREARM, THIGH, SHIN, FOOT = 0.335, 0.155, 0.185, 0.235, 0.225, 0.075
SHOULDER, HIP = 0.098, 0.05


@dataclass(frozen=True)
class Players:
    """P players.

    Attributes:
        kit: int64 [P], the row of the kits that each wears.
        skin, hair, boots: light [P, 3].
        number: int64 [P] in 1..99.
        width, stature: [P], factors of the build.
        long_sleeves: bool [P].
    """

    kit: Tensor
    skin: Tensor
    hair: Tensor
    boots: Tensor
    number: Tensor
    width: Tensor
    stature: Tensor
    long_sleeves: Tensor

    def __len__(self) -> int:
        return len(self.kit)

    def take(self, rows: Tensor) -> "Players":
        """These rows."""
        return Players(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class Poses:
    """B poses. Angles are in radians, pairs are left and right, and positive swings go forward.

    Attributes:
        yaw: [B], 0 faces the camera, pi/2 faces right in the picture.
        elevation: [B], the camera's angle above the ground.
        lean, tilt: [B], of the trunk, forward and to its left.
        arm, abduction, elbow, thigh, knee: [B, 2].
        spread: [B], the legs' angle outward.
    """

    yaw: Tensor
    elevation: Tensor
    lean: Tensor
    tilt: Tensor
    arm: Tensor
    abduction: Tensor
    elbow: Tensor
    thigh: Tensor
    knee: Tensor
    spread: Tensor


def sample_players(kit: Tensor, random: Random) -> Players:
    """Players who wear these kits, int64 [P]."""
    count = len(kit)
    skin, hair = skin_and_hair(count, random)
    boots = torch.where(random.chance(0.5, count)[:, None], palette(count, random), random.uniform(count, 1))
    return Players(
        kit, decode(skin), decode(hair), decode(boots), integers(count, 1, 100, random),
        random.uniform(count, low=0.92, high=1.12), random.uniform(count, low=0.95, high=1.05),
        random.chance(0.08, count),
    )  # fmt: skip


def sample_poses(count: int, random: Random) -> Poses:
    """From standing to sprinting, seen from every side."""
    effort = random.uniform(count) ** 1.3  # standing and walking are more common than sprinting
    step = torch.sin(random.uniform(count, high=2 * math.pi))
    alternate = torch.tensor([1.0, -1.0], device=random.device)
    stride = (effort * step)[:, None] * alternate
    thigh = 0.95 * stride + 0.25 * effort[:, None] + random.normal(count, 2) * 0.06
    # The hind leg's heel rises; the front leg bends a little.
    knee = effort[:, None] * (0.35 + 1.1 * (-stride).clamp(min=0)) + random.uniform(count, 2, high=0.25)
    arm = -1.0 * stride + random.normal(count, 2) * 0.2
    lifted = random.chance(0.05, count)[:, None]
    abduction = random.uniform(count, 2, low=0.08, high=0.4) + lifted * random.uniform(count, 2, high=1.8)
    elbow = 0.15 + 1.2 * effort[:, None] + random.uniform(count, 2, high=0.5)
    return Poses(
        yaw=random.uniform(count, low=-math.pi, high=math.pi),
        elevation=random.uniform(count, low=0.08, high=0.42),
        lean=0.04 + 0.28 * effort + random.normal(count) * 0.05,
        tilt=random.normal(count) * 0.06, arm=arm, abduction=abduction, elbow=elbow, thigh=thigh, knee=knee,
        spread=random.uniform(count, low=0.03, high=0.16),
    )  # fmt: skip


def _direction(angle: Tensor, outward: Tensor) -> Tensor:
    """Unit vectors that hang down, swung forward and then to the left: [..., 3]."""
    down = torch.cos(angle) * torch.cos(outward)
    return torch.stack([torch.sin(angle) * torch.cos(outward), torch.sin(outward), down], -1)


@dataclass(frozen=True)
class Skeleton:
    """Joints in the picture: x to the right, y down, z towards the camera.

    Attributes:
        middle: [B, 3, 3]: base of the neck, head, middle of the hips.
        arms: [B, 2, 3, 3]: shoulder, elbow, hand; the arm further from the camera first.
        legs: [B, 2, 4, 3]: hip, knee, ankle, toe; likewise.
    """

    middle: Tensor
    arms: Tensor
    legs: Tensor


def skeleton(poses: Poses, players: Players) -> Skeleton:
    """Joints of B players, one a pose."""
    side = torch.tensor([1.0, -1.0], device=poses.yaw.device)
    trunk = -_direction(-poses.lean, -poses.tilt)
    neck = trunk * TRUNK
    left = torch.tensor([0.0, 1.0, 0.0], device=side.device)
    wide = (side * players.width[:, None])[..., None] * left  # [B, 2, 3]
    shoulder = neck[:, None] + wide * SHOULDER - trunk[:, None] * 0.022
    arm = poses.arm - poses.lean[:, None]
    elbow = shoulder + UPPER_ARM * _direction(arm, side * poses.abduction)
    hand = elbow + FOREARM * _direction(arm + poses.elbow, side * poses.abduction * 0.6)
    hip = wide * HIP
    outward = side * poses.spread[:, None]
    knee = hip + THIGH * _direction(poses.thigh, outward)
    ankle = knee + SHIN * _direction(poses.thigh - poses.knee, outward)
    toe = ankle + FOOT * _direction(poses.thigh - poses.knee + 1.25, outward * 2)
    head = neck + (trunk + 0.15 * torch.tensor([1.0, 0, 0], device=side.device)) * 0.12

    seen = _projection(poses)
    arms, legs = (
        torch.stack([shoulder, elbow, hand], 2) @ seen,
        torch.stack([hip, knee, ankle, toe], 2) @ seen,
    )
    arms = _far_first(arms * players.stature[:, None, None, None])
    legs = _far_first(legs * players.stature[:, None, None, None])
    middle = torch.stack([neck, head, torch.zeros_like(neck)], 1) @ seen[:, 0]
    return Skeleton(middle * players.stature[:, None, None], arms, legs)


def _projection(poses: Poses) -> Tensor:
    """Body coordinates, as rows, times this are x to the right, y down, z to the camera: [B, 1, 3, 3]."""
    cos, sin = torch.cos(poses.yaw), torch.sin(poses.yaw)
    low, high = torch.cos(poses.elevation), torch.sin(poses.elevation)
    nothing = torch.zeros_like(cos)
    forward = torch.stack([sin, cos * high, cos], 1)
    left = torch.stack([cos, -sin * high, -sin], 1)
    return torch.stack([forward, left, torch.stack([nothing, low, nothing], 1)], 1)[:, None]


def _far_first(limbs: Tensor) -> Tensor:
    """Order pairs of limbs [B, 2, n, 3] by their distance from the camera."""
    depth = limbs[..., 2].mean(2)
    swap = (depth[:, 0] > depth[:, 1])[:, None, None, None]
    return torch.where(swap, limbs.flip(1), limbs)


def boxes(bones: Skeleton, jitter: Tensor) -> Tensor:
    """The boxes that a detector draws around figures, off by `jitter` [B, 4] of the height and the width.

    Returns:
        [B, 4]: left, top, width, height in body units.
    """
    points = torch.cat([bones.arms.flatten(1, 2), bones.legs.flatten(1, 2), bones.middle], 1)
    x, y = points[..., 0], points[..., 1]
    left, right = x.amin(1) - 0.035, x.amax(1) + 0.035
    top, bottom = torch.minimum(y[:, -2] - 0.075, y.amin(1)), y.amax(1) + 0.02
    height = bottom - top
    # Detectors' boxes are seldom narrower than a third of their height.
    slack = (0.34 * height - (right - left)).clamp(min=0) / 2
    left, width = left - slack, right - left + 2 * slack
    return torch.stack(
        [
            left - jitter[:, 0] * width,
            top - jitter[:, 1] * height,
            width * (1 + jitter[:, 0] + jitter[:, 2]),
            height * (1 + jitter[:, 1] + jitter[:, 3]),
        ],
        1,
    )
