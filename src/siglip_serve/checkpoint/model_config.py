"""Types of what a checkpoint's JSON files say: shapes of the towers and the preprocessing of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from siglip_serve.errors import CheckpointError

__all__ = [
    "ClipTextConfig",
    "ClipVisionConfig",
    "Family",
    "ImageConfig",
    "ModelConfig",
    "NaflexImageConfig",
    "NaflexVisionConfig",
    "TextConfig",
    "VisionConfig",
]

Family = Literal["siglip", "naflex", "clip"]
_TEXT_ALONE = "a text tower alone, without an image tower; it serves --models embed_text"
_VISION_ALONE = (
    "an image tower alone, without a text tower; "
    "it serves --models embed_image,fit_teams,classify_teams, or as --teams-checkpoint"
)


@dataclass(frozen=True)
class VisionConfig:
    """Shape of the vision tower, with the names of `config.json`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    hidden_act: str

    @property
    def grid_size(self) -> int:
        """Patches along one side. Pixels beyond the last whole patch are ignored."""
        return self.image_size // self.patch_size

    @property
    def embedding_size(self) -> int:
        """Width of the image embeddings."""
        return self.hidden_size


@dataclass(frozen=True)
class ClipVisionConfig(VisionConfig):
    """Shape of CLIP's vision tower, which projects its embeddings to another width if it is `projected`."""

    projection_size: int
    projected: bool

    @property
    def embedding_size(self) -> int:
        """Width of the image embeddings."""
        return self.projection_size


@dataclass(frozen=True)
class NaflexVisionConfig(VisionConfig):
    """Shape of a NaFlex vision tower. `image_size` is that of the square on which positions were learned."""


@dataclass(frozen=True)
class TextConfig:
    """Shape of the text tower, with the names of `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    projection_size: int
    layer_norm_eps: float
    hidden_act: str


@dataclass(frozen=True)
class ClipTextConfig(TextConfig):
    """Shape of CLIP's text tower, and the token whose output is the embedding.

    It is the first end token, or with `pools_largest_id` the first token of the largest id.
    """

    eos_token_id: int
    pools_largest_id: bool
    projected: bool


@dataclass(frozen=True)
class ImageConfig:
    """Preprocessing of the checkpoint's images: fit to `size` x `size`, then `(x * rescale - mean) / std`.

    Attributes:
        size: side of the square that the tower takes, in pixels.
        resample: filter of the resize.
        rescale: factor from 8-bit values to the range of `mean` and `std`, usually 1 / 255.
        mean: per channel, red, green, blue.
        std: per channel, red, green, blue.
        shortest_edge: length of the shortest side, in pixels, before the central square is cut out; None: the
            image is stretched to the square.
        round_crop: the square's place is rounded to the nearest pixel, and to the even one of two, instead of
            down.
    """

    size: int
    resample: Literal["bilinear", "bicubic"]
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shortest_edge: int | None = None
    round_crop: bool = False


@dataclass(frozen=True, kw_only=True)
class NaflexImageConfig(ImageConfig):
    """Preprocessing of NaFlex images: resized to whole patches at their own aspect ratio, then cut.

    Attributes:
        patch_size: side of a patch, in pixels.
        max_patches: most patches of one image.
    """

    patch_size: int
    max_patches: int


@dataclass(frozen=True)
class ModelConfig:
    """Contents of a checkpoint's JSON files.

    Attributes:
        path: directory of the checkpoint.
        family: architecture of the towers.
        multilingual: the texts of a CLIP are cut by a SentencePiece vocabulary (MetaCLIP 2).
        note: limits of the checkpoint for its users, a clause that follows its name; empty: none. It is the
            value of `siglip_serve_note` in `config.json`.
    """

    path: Path
    family: Family
    _vision: VisionConfig | None
    _image: ImageConfig | None
    _text: TextConfig | None
    multilingual: bool = False
    note: str = ""

    @property
    def vision_only(self) -> bool:
        """True for a checkpoint without a text tower."""
        return self._text is None

    @property
    def text_only(self) -> bool:
        """True for a checkpoint without an image tower."""
        return self._vision is None

    @property
    def vision(self) -> VisionConfig:
        """Shape of the vision tower.

        Raises:
            CheckpointError: the checkpoint has no image tower.
        """
        if self._vision is None:
            raise CheckpointError(f"{self.path}: {_TEXT_ALONE}")
        return self._vision

    @property
    def image(self) -> ImageConfig:
        """Preprocessing of the images.

        Raises:
            CheckpointError: the checkpoint has no image tower.
        """
        if self._image is None:
            raise CheckpointError(f"{self.path}: {_TEXT_ALONE}")
        return self._image

    @property
    def text(self) -> TextConfig:
        """Shape of the text tower.

        Raises:
            CheckpointError: the checkpoint has no text tower.
        """
        if self._text is None:
            raise CheckpointError(f"{self.path}: {_VISION_ALONE}")
        return self._text
