"""Seeded pictures of football players as a detector cuts them out, to train and to measure team clustering.

`clip` makes a benchmark's clip of JPEG files with the truth; `training_batch` makes batches on any device.
They share no pattern of shirts but the plain one: `BENCHMARK`, `TRAINING`. `render` draws any crops.
"""

from training.jerseys.batches import REGION, WIDE, training_batch
from training.jerseys.camera import Cameras, Conditions, jpeg, sample_cameras, sense
from training.jerseys.clips import DIFFERENCES, TIERS, Cast, Clip, Role, clip, contact_sheet, pair_of_kits
from training.jerseys.drawing import Wardrobe
from training.jerseys.figure import Players, Poses, sample_players, sample_poses
from training.jerseys.kits import BENCHMARK, TRAINING, Kind, Kits, Part, hard_kits, sample_kits, textures
from training.jerseys.stage import Light, Rendered, Studio, Views, render, sample_light, sample_views

__all__ = [
    "BENCHMARK",
    "DIFFERENCES",
    "REGION",
    "TIERS",
    "TRAINING",
    "WIDE",
    "Cameras",
    "Cast",
    "Clip",
    "Conditions",
    "Kind",
    "Kits",
    "Light",
    "Part",
    "Players",
    "Poses",
    "Rendered",
    "Role",
    "Studio",
    "Views",
    "Wardrobe",
    "clip",
    "contact_sheet",
    "hard_kits",
    "jpeg",
    "pair_of_kits",
    "render",
    "sample_cameras",
    "sample_kits",
    "sample_light",
    "sample_players",
    "sample_poses",
    "sample_views",
    "sense",
    "textures",
    "training_batch",
]
