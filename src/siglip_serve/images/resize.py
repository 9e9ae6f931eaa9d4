"""Pictures of any aspect become the square that a checkpoint's image tower takes.

SigLIP's are stretched to it. CLIP's are resized until the shortest side fits, and the square in the centre is
cut out. `pil` mode gives the pixels of transformers' PIL image processors, rounding of the long side and of
the cut included; `fast` mode gives the same within two levels.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from siglip_serve.checkpoint.model_config import ImageConfig

__all__ = [
    "LONGEST",
    "Extent",
    "Mode",
    "Pixels",
    "Resample",
    "cut_offsets",
    "cut_square",
    "down_first",
    "fit",
    "is_long",
    "resize",
    "shown",
    "target_size",
]

Mode = Literal["fast", "pil"]
Pixels = NDArray[np.uint8]
Resample = Literal["bilinear", "bicubic"]
Extent = tuple[float, float]

# A picture that is longer in proportion is cut before it is resized: a line of 60,000 pixels would become
# millions of columns for the sake of one square.
LONGEST = 16
_SUPPORT = 2  # pixels on each side that a bicubic weighs; a bilinear one weighs fewer


def fit(pixels: Pixels, image: ImageConfig, mode: Mode) -> Pixels:
    """uint8 `[S, S, 3]`, contiguous, of uint8 `[H, W, 3]`.

    Equal to the reference in `pil` mode unless one side is over 16 times the other: then within two levels.
    """
    height, width = pixels.shape[:2]
    if is_long(image, height, width):
        return _cut_and_resize(pixels, image)
    return cut_square(resize(pixels, target_size(image, height, width), image.resample, mode), image)


def is_long(image: ImageConfig, height: int, width: int) -> bool:
    """True for a picture that is cut before it is resized."""
    return max(height, width) > LONGEST * min(height, width) and image.shortest_edge is not None


def cut_square(resized: Pixels, image: ImageConfig) -> Pixels:
    """uint8 `[S, S, 3]`, contiguous, of a picture that has its `target_size`."""
    top, left = cut_offsets(image, (resized.shape[0], resized.shape[1]))
    return np.ascontiguousarray(resized[top : top + image.size, left : left + image.size])


def resize(
    pixels: Pixels, size: tuple[int, int], resample: Resample, mode: Mode, extent: Extent | None = None
) -> Pixels:
    """Resize uint8 `[H, W, 3]` to height and width `size`, antialiased.

    Args:
        pixels: contiguous.
        size: height and width of the result.
        resample: the filter.
        mode: the library.
        extent: height and width of the part that is resized, from the upper left. It may end within a pixel;
            None: all of it. Mode `fast` only.
    """
    if mode == "pil":
        return _resize_with_pil(pixels, size, resample)
    return _resize_with_torch(pixels, size, resample, extent)


def shown(image: ImageConfig, height: int, width: int) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the part of a picture that stays, in its own pixels."""
    rows, columns = target_size(image, height, width)
    top, left = cut_offsets(image, (rows, columns))
    across = (left * width / columns, (left + image.size) * width / columns)
    down = (top * height / rows, (top + image.size) * height / rows)
    return across[0], down[0], across[1], down[1]


def target_size(image: ImageConfig, height: int, width: int) -> tuple[int, int]:
    """Height and width to which a picture is resized before the square is cut out."""
    shortest = image.shortest_edge
    if shortest is None:
        return image.size, image.size
    long = int(shortest * max(height, width) / min(height, width))
    return (long, shortest) if width <= height else (shortest, long)


def cut_offsets(image: ImageConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Top and left of the square in a picture that was resized to this height and width."""
    if image.round_crop:
        return round((size[0] - image.size) / 2), round((size[1] - image.size) / 2)
    return (size[0] - image.size) // 2, (size[1] - image.size) // 2


def down_first(size: tuple[int, int], resized: tuple[int, int]) -> bool:
    """True where Pillow 13 resizes first down, then across, which it does where that saves work.

    Because each pass rounds and clips, the order shows: ten levels at saturated edges.
    """
    (height, width), (rows, columns) = size, resized
    return height > rows + max(0, 2 * (width - columns))


def _cut_and_resize(pixels: Pixels, image: ImageConfig) -> Pixels:
    """Cut out the part that the square is made of, with the pixels around it that weigh in, and resize it."""
    height, width = pixels.shape[:2]
    left, top, right, bottom = shown(image, height, width)
    margin = _SUPPORT * max(1.0, (right - left) / image.size, (bottom - top) / image.size) + 1
    row, column = max(0, int(top - margin)), max(0, int(left - margin))
    part = pixels[row : int(bottom + margin) + 1, column : int(right + margin) + 1]
    # The last bits of the sums above must not put the box outside.
    right, bottom = min(right - column, part.shape[1]), min(bottom - row, part.shape[0])
    across, down = (left - column, right), (top - row, bottom)
    picture, resample = Image.fromarray(part), Image.Resampling[image.resample.upper()]
    if down_first((height, width), target_size(image, height, width)):
        picture = picture.resize((picture.width, image.size), resample, (0, down[0], picture.width, down[1]))
        down = (0, image.size)
    picture = picture.resize(
        (image.size, picture.height), resample, (across[0], 0, across[1], picture.height)
    )
    return np.array(picture.resize((image.size, image.size), resample, (0, down[0], image.size, down[1])))


def _resize_with_pil(pixels: Pixels, size: tuple[int, int], resample: Resample) -> Pixels:
    """uint8 `[*size, 3]` of uint8 `[H, W, 3]`, by the resize that transformers' PIL processors use."""
    return np.array(Image.fromarray(pixels).resize(size[::-1], Image.Resampling[resample.upper()]))


def _resize_with_torch(
    pixels: Pixels, size: tuple[int, int], resample: Resample, extent: Extent | None
) -> Pixels:
    """uint8 `[*size, 3]` of uint8 `[H, W, 3]`, by the antialiased resize that torchvision uses."""
    import torch

    # The batch axis comes before the permutation: only then does torch see channels-last memory and
    # give it back.
    planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # [1, 3, H, W]
    operators = torch.ops.aten
    # What `torch.nn.functional.interpolate` calls, which takes no size together with a scale.
    interpolate = (
        operators._upsample_bicubic2d_aa if resample == "bicubic" else operators._upsample_bilinear2d_aa
    )
    height, width = pixels.shape[:2]
    rows, columns = size
    down = across = None  # the sizes tell
    if extent is not None:
        down, across = rows / extent[0], columns / extent[1]
    if down_first((height, width), size):  # torch resizes across first
        planes = interpolate(planes, [rows, width], False, down, None)  # [1, 3, rows, W]
        down = None
    planes = interpolate(planes, [rows, columns], False, down, across)  # [1, 3, rows, columns]
    result: Pixels = planes[0].permute(1, 2, 0).contiguous().numpy()  # [rows, columns, 3]
    return result
