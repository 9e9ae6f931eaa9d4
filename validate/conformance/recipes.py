"""Ways to turn a picture into pixels and a text into token ids: the right one, and the known faults.

A recipe is a set of choices, each with the right one as its default. A fault is another choice. Faults can
be combined, since they concern different steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["IMAGE_FAULTS", "TEXT_FAULTS", "Fault", "ImageRecipe", "Recipe", "TextRecipe", "with_fault"]


@dataclass(frozen=True)
class ImageRecipe:
    """Choices on the way from a file to pixels.

    Attributes:
        upright: EXIF's orientation is applied.
        alpha: ground under transparent pixels. `dropped` takes the colours as they are stored.
        palette: `indices` takes the numbers of a palette's colours for grey.
        cmyk: `inverted` takes ink for light.
        fit: `own` is the checkpoint's: SigLIP stretches to the square, CLIP cuts out the centre.
        resample: filter of the resize.
        order: of the colours.
        scale: mean and standard deviation. `unit` is 0 to 1, and `bytes` 0 to 255.
    """

    upright: bool = True
    alpha: Literal["white", "black", "dropped"] = "white"
    palette: Literal["colours", "indices"] = "colours"
    cmyk: Literal["ink", "inverted"] = "ink"
    fit: Literal["own", "stretched", "cropped", "letterbox"] = "own"
    resample: Literal["own", "nearest", "aliased"] = "own"
    order: Literal["rgb", "bgr"] = "rgb"
    scale: Literal["own", "imagenet", "clip", "half", "unit", "bytes"] = "own"


@dataclass(frozen=True)
class TextRecipe:
    """Choices on the way from a text to a vector.

    Attributes:
        lower: capitals become small letters where the checkpoint wants it.
        punctuation: it is removed where the checkpoint wants it.
        specials: special tokens written in a text are such tokens.
        template: the text is put into a prompt.
        limit: tokens that a text is cut to, 0 for the length of the tower.
        end: a text that is cut keeps its end token.
        padding: `full` is to the length of the tower, `longest` to the longest text of a request, `left`
            before the text, and `zeros` with token 0.
        masked: the tower does not see the padding.
        pooled: `mean` is over all tokens, and `end` takes the end token instead of the last position.
    """

    lower: bool = True
    punctuation: Literal["own", "kept"] = "own"
    specials: Literal["tokens", "text"] = "tokens"
    template: Literal["", "a photo of a {}.", "This is a photo of {}."] = ""
    limit: int = 0
    end: Literal["kept", "cut"] = "kept"
    padding: Literal["full", "longest", "left", "zeros"] = "full"
    masked: bool = False
    pooled: Literal["own", "mean", "end"] = "own"


Recipe = ImageRecipe | TextRecipe


@dataclass(frozen=True)
class Fault:
    """A wrong choice.

    Attributes:
        check: the question that it answers.
        field, value: the choice in the recipe.
        told: the fault in words.
    """

    check: str
    field: str
    value: object
    told: str


IMAGE_FAULTS = (
    Fault("EXIF", "upright", False, "the EXIF orientation is ignored"),
    Fault("aspect", "fit", "cropped", "the centre is cut out"),
    Fault("aspect", "fit", "stretched", "the picture is stretched to the square"),
    Fault("aspect", "fit", "letterbox", "bars are put beside the picture"),
    Fault("resize", "resample", "nearest", "the nearest pixels are taken"),
    Fault("resize", "resample", "aliased", "bilinear without antialiasing"),
    Fault("colour order", "order", "bgr", "red and blue are swapped"),
    Fault("pixel scale", "scale", "imagenet", "mean and deviation are ImageNet's"),
    Fault("pixel scale", "scale", "clip", "mean and deviation are CLIP's"),
    Fault("pixel scale", "scale", "half", "mean and deviation are 0.5"),
    Fault("pixel scale", "scale", "unit", "pixels are 0 to 1"),
    Fault("pixel scale", "scale", "bytes", "pixels are 0 to 255"),
    Fault("transparency", "alpha", "black", "transparent pixels are put on black"),
    Fault("transparency", "alpha", "dropped", "transparency is dropped"),
    Fault("palette", "palette", "indices", "palette indices are taken for grey"),
    Fault("CMYK", "cmyk", "inverted", "CMYK is inverted"),
)
TEXT_FAULTS = (
    Fault("padding", "padding", "longest", "texts are not padded to the full length"),
    Fault("padding", "padding", "left", "padding stands before the text"),
    Fault("padding", "padding", "zeros", "padding is token 0"),
    Fault("padding mask", "masked", True, "the padding is masked"),
    Fault("case", "lower", False, "capitals are kept"),
    Fault("punctuation", "punctuation", "kept", "punctuation is kept"),
    Fault("special tokens", "specials", "text", "special tokens are read as text"),
    Fault("length limit", "limit", 16, "texts are cut to 16 tokens"),
    Fault("length limit", "limit", 20, "texts are cut to 20 tokens"),
    Fault("length limit", "limit", 32, "texts are cut to 32 tokens"),
    Fault("end token", "end", "cut", "a text that is cut loses its end token"),
    Fault("prompt", "template", "a photo of a {}.", "texts are put into 'a photo of a {}.'"),
    Fault("prompt", "template", "This is a photo of {}.", "texts are put into 'This is a photo of {}.'"),
    Fault("pooling", "pooled", "mean", "the mean of all tokens is taken"),
    Fault("pooling", "pooled", "end", "the end token is taken instead of the last position"),
)


def with_fault(recipe: Recipe, fault: Fault) -> Recipe:
    """Change one choice of a recipe."""
    choice: Mapping[str, object] = {fault.field: fault.value}
    return replace(recipe, **choice)  # type: ignore[arg-type]
