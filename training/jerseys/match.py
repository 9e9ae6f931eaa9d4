"""Draw the sample of the gateway's page: a frame of a match, with the boxes and tracks of its players.

python -m training.jerseys.match --out src/siglip_gateway/page/static/samples
"""

import io
import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from training.jerseys.clips import pair_of_kits
from training.jerseys.colours import decode, distinct, encode
from training.jerseys.drawing import Crops, Frame, Wardrobe, draw
from training.jerseys.figure import boxes, sample_players, sample_poses, skeleton
from training.jerseys.kits import Kind, Kits, Part, sample_kits
from training.scenes import Random

__all__ = ["main", "picture"]

_SIZE = 1280, 720
_DRAWN = 256, 144  # rows and columns in which a player is drawn, then made smaller
_ROWS, _COLUMNS = 4, 8  # places on the pitch
_PLAYERS = 15  # of each team
_HORIZON = 0.1
_GRASS = (0.30, 0.50, 0.22)
_SEED = 7


def picture(seed: int) -> tuple[Image.Image, list[list[int]]]:
    """A frame with two teams and two referees, and the boxes x0, y0, x1, y1 of all of them."""
    random = Random(seed)
    kit = torch.tensor([0] * _PLAYERS + [1] * _PLAYERS + [2, 2])
    kit = kit[random.uniform(len(kit)).argsort()]
    wardrobe = Wardrobe(_kits(random))
    players, poses = sample_players(kit, random), sample_poses(len(kit), random)
    bones = skeleton(poses, players)
    corners = boxes(bones, torch.full((len(kit), 4), 0.03))
    crops = Crops(players, poses, bones, Frame(corners, _DRAWN))
    figure = draw(wardrobe, crops, torch.full((len(kit),), 0.5), random)
    drawn = torch.cat([figure.light, figure.alpha], 1)
    feet = _feet(random)
    scene = _pitch(random)
    found = []
    for row in range(len(kit)):
        x, y = feet[row].tolist()
        height = round(70 + 75 * (y - _HORIZON) / (1 - _HORIZON))
        width = max(round(height * float(corners[row, 2] / corners[row, 3])), 8)
        seen = F.interpolate(drawn[row : row + 1], (height, width), mode="bilinear", antialias=True)
        left, top = round(x * _SIZE[0] - width / 2), round(y * _SIZE[1]) - height
        scene = _shadow(scene, left + width / 2, top + height, width)
        place = scene[:, :, top : top + height, left : left + width]
        place.copy_(seen[:, :3] + place * (1 - seen[:, 3:]))
        found.append([left, top, left + width, top + height])
    frame = encode(scene) + random.normal(*scene.shape) * 0.008
    pixels = (frame[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels), found


def _kits(random: Random) -> Kits:
    """The kits of both teams and of the referees."""
    teams = pair_of_kits("T0", random)
    other = sample_kits(1, random, [Kind.PLAIN])
    colours = other.colours.clone()
    own = distinct(teams.colours[:, Part.FIRST].expand(1, 2, 3), 60, random)
    colours[:, Part.FIRST] = colours[:, Part.SLEEVE] = own
    return Kits.join([teams, Kits(**{**vars(other), "colours": colours})])


def _feet(random: Random) -> Tensor:
    """Places of the players' feet [N, 2], x and y as shares of the frame, from far to near."""
    count = _ROWS * _COLUMNS
    row, column = torch.arange(count) // _COLUMNS, torch.arange(count) % _COLUMNS
    x = (column + 0.5 + random.uniform(count, low=-0.28, high=0.28)) / _COLUMNS
    y = _HORIZON + 0.15 + (row + random.uniform(count, low=-0.2, high=0.2)) / _ROWS * 0.8
    order = y.argsort()
    return torch.stack([x, y], 1)[order]


def _pitch(random: Random) -> Tensor:
    """Light [1, 3, H, W]: grass with mown bands and lines, below a dark stand."""
    width, height = _SIZE
    v = ((torch.arange(height) + 0.5) / height)[:, None]
    u = ((torch.arange(width) + 0.5) / width - 0.5)[None]
    depth = 1 / (v - _HORIZON + 0.35)  # of the ground that a row shows
    across = u * depth
    bands = torch.tanh(6 * torch.sin(9 * across)) * 0.07
    blades = random.normal(height, width) * 0.05
    grass = decode(torch.tensor(_GRASS))[:, None, None] * (1 + bands + blades)
    lines = (across.abs() < 0.006 * depth.sqrt()) | ((v - _HORIZON - 0.035).abs() < 0.003)
    ring = torch.hypot(across, (depth - 1.45) * 1.1)
    lines |= (ring - 0.42).abs() < 0.007 * depth.sqrt()
    light = torch.where(lines, torch.lerp(grass, torch.tensor(0.8), 0.75), grass)
    stand = torch.tensor([0.02, 0.025, 0.035])[:, None, None] * (1 + 0.3 * random.normal(height, width))
    return torch.where(v < _HORIZON, stand.clamp(min=0), light)[None]


def _shadow(scene: Tensor, x: float, y: float, width: float) -> Tensor:
    rows = torch.arange(scene.shape[2])[:, None] - y + 3
    columns = torch.arange(scene.shape[3])[None] - x - width * 0.2
    cast = (1 - torch.hypot(columns / (0.8 * width), rows / (0.14 * width))).clamp(0, 0.5)
    return scene * (1 - cast)


def main(argv: Sequence[str] | None = None) -> None:
    """Write `match.jpg` and `match.json`."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    options = parser.parse_args(argv)
    image, found = picture(_SEED)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=86)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "match.jpg").write_bytes(file.getvalue())
    (options.out / "match.json").write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
