"""The checkpoint in this process through transformers, with pixels and token ids made by any recipe."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageOps

from validate.conformance.recipes import ImageRecipe, Recipe, TextRecipe
from validate.reference import Reference

__all__ = ["Towers"]

Floats = NDArray[np.float32]
_STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
_BATCH = 16


class Towers(Reference):
    """transformers' SigLIP or CLIP in float32. The same pixels and ids are computed once.

    Attributes:
        clip: the checkpoint is of CLIP, which cuts out the centre of pictures.
    """

    def __init__(self, checkpoint: str, device: str = "auto") -> None:
        super().__init__(checkpoint, device)
        self.clip = self._model.config.model_type == "clip"
        self._kept: dict[Any, Floats] = {}  # vectors by pixels or ids
        self._made: dict[Any, Any] = {}  # pixels or ids by recipe and input

    def vectors(self, recipe: Recipe, requests: Sequence[Sequence[Any]]) -> Floats:
        """The vectors [N, D] of the texts, or of the pictures, of all requests, not normalised."""
        if isinstance(recipe, TextRecipe):
            return self.texts(recipe, requests)
        return self.images(recipe, [picture.data for request in requests for picture in request])

    def images(self, recipe: ImageRecipe, files: Sequence[bytes]) -> Floats:
        """The vectors [N, D] of picture files, not normalised."""
        pixels = [self._once(self._pixels, recipe, data) for data in files]
        return self._embed([array.tobytes() for array in pixels], pixels, self._vision)

    def texts(self, recipe: TextRecipe, requests: Sequence[Sequence[str]]) -> Floats:
        """The vectors [N, D] of the texts of all requests, not normalised.

        Padding to the longest text depends on the others of a request.
        """
        keys = []
        for request in requests:
            ids = [self._once(self._ids, recipe, text) for text in request]
            length = max(map(len, ids)) if recipe.padding == "longest" else self._context
            keys += [(*self._padded(recipe, row, length), recipe.masked, recipe.pooled) for row in ids]
        return self._embed(keys, keys, self._text)

    def _once(self, make: Callable[[Any, Any], Any], recipe: Recipe, given: str | bytes) -> Any:
        if (recipe, given) not in self._made:
            self._made[recipe, given] = make(recipe, given)
        return self._made[recipe, given]

    def _embed(self, keys: Sequence[Any], rows: Sequence[Any], run: Callable[[list[Any]], Floats]) -> Floats:
        missing = [index for index, key in enumerate(keys) if key not in self._kept]
        groups: dict[Any, list[int]] = {}
        for index in {keys[index]: index for index in missing}.values():
            key = keys[index]
            shape = (len(key[0]), key[2], key[3]) if isinstance(key, tuple) else None
            groups.setdefault(shape, []).append(index)
        for group in groups.values():
            for start in range(0, len(group), _BATCH):
                part = group[start : start + _BATCH]
                for index, vector in zip(part, run([rows[index] for index in part]), strict=True):
                    self._kept[keys[index]] = vector
        return np.stack([self._kept[key] for key in keys])

    def _vision(self, pixels: list[Floats]) -> Floats:
        import torch

        with torch.inference_mode():
            return self._features("get_image_features", pixel_values=torch.from_numpy(np.stack(pixels)))

    def _text(self, rows: list[tuple[tuple[int, ...], int, bool, str]]) -> Floats:
        import torch

        ids = torch.tensor([row[0] for row in rows])
        ends = torch.tensor([row[1] for row in rows])
        _, _, masked, pooled = rows[0]
        inputs = {"input_ids": ids.to(self._device)}
        if masked or self.clip:
            inputs["attention_mask"] = (torch.arange(ids.shape[1]) <= ends[:, None]).long().to(self._device)
        with torch.inference_mode():
            if pooled == "own":
                return self._features("get_text_features", **inputs)
            states = self._model.text_model(**inputs).last_hidden_state
            rows_of = torch.arange(len(rows))
            states = states.mean(1) if pooled == "mean" else states[rows_of, ends]
            found: Floats = self._model.text_model.head(states).float().cpu().numpy()
            return found

    def _features(self, method: str, **inputs: Any) -> Floats:
        features = getattr(self._model, method)(
            **{name: value.to(self._device) for name, value in inputs.items()}
        )
        found: Floats = getattr(features, "pooler_output", features).float().cpu().numpy()
        return found

    def _ids(self, recipe: TextRecipe, text: str) -> list[int]:
        text = recipe.template.format(text) if recipe.template else text
        options = {"split_special_tokens": True} if recipe.specials == "text" else {}
        with _changed(self._tokenizer, recipe):
            given = self._lower(text) if recipe.lower else text
            limit = min(recipe.limit or self._context, self._context)
            whole: list[int] = self._tokenizer(given, **options)["input_ids"]
            if recipe.end == "cut" or len(whole) <= limit:
                return whole[:limit]
            cut: list[int] = self._tokenizer(given, truncation=True, max_length=limit, **options)["input_ids"]
            return cut

    def _padded(self, recipe: TextRecipe, ids: list[int], length: int) -> tuple[tuple[int, ...], int]:
        """The ids with their padding, and the place of the last one that is not padding."""
        token = 0 if recipe.padding == "zeros" else self._tokenizer.pad_token_id
        padding = [token] * (length - len(ids))
        left = (self._tokenizer.padding_side == "left") != (recipe.padding == "left")
        return (tuple(padding + ids), length - 1) if left else (tuple(ids + padding), len(ids) - 1)

    def _pixels(self, recipe: ImageRecipe, data: bytes) -> Floats:
        """Pixels [3, S, S] of a file."""
        with Image.open(io.BytesIO(data)) as opened:
            image: Image.Image = ImageOps.exif_transpose(opened) if recipe.upright else opened.copy()
        image = _rgb(image, recipe)
        if recipe.order == "bgr":
            image = Image.merge("RGB", image.split()[::-1])
        options: dict[str, Any] = {}
        if recipe.scale in _STATISTICS:
            options["image_mean"], options["image_std"] = _STATISTICS[recipe.scale]
        elif recipe.scale != "own":
            options |= {"do_normalize": False, "do_rescale": recipe.scale == "unit"}
        if recipe.fit != "own" or recipe.resample != "own":
            options["do_resize"] = False
            image = self._resized(image, recipe)
        made = self._images(images=[image], return_tensors="np", **options)["pixel_values"]
        return np.ascontiguousarray(made[0], dtype=np.float32)

    def _resized(self, image: Image.Image, recipe: ImageRecipe) -> Image.Image:
        size = self._images.size
        side = size["shortest_edge"] if self.clip else size["height"]
        filters = {"nearest": Image.Resampling.NEAREST}
        chosen = filters.get(recipe.resample, Image.Resampling.BICUBIC)
        if recipe.fit == "cropped":
            return ImageOps.fit(image, (side, side), chosen)
        if recipe.fit == "letterbox":
            return ImageOps.pad(image, (side, side), chosen)
        width, height = image.size
        scale = side / min(image.size)
        whole = (side, side)
        if self.clip and recipe.fit == "own":
            whole = (max(side, int(width * scale)), max(side, int(height * scale)))
        return _aliased(image, whole) if recipe.resample == "aliased" else image.resize(whole, chosen)


@contextmanager
def _changed(tokenizer: Any, recipe: TextRecipe) -> Iterator[None]:
    """Change the steps of SigLIP's tokenizer that a recipe leaves out."""
    changes: dict[str, Any] = {}
    if not recipe.lower and hasattr(tokenizer, "do_lower_case"):
        changes["do_lower_case"] = False
    if recipe.punctuation == "kept" and hasattr(tokenizer, "remove_punctuation"):
        changes["remove_punctuation"] = lambda text: text
    kept = {name: getattr(tokenizer, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(tokenizer, name, value)


def _rgb(image: Image.Image, recipe: ImageRecipe) -> Image.Image:
    if image.mode == "P" and recipe.palette == "indices":
        return Image.fromarray(np.asarray(image)).convert("RGB")
    if image.mode == "CMYK" and recipe.cmyk == "inverted":
        return Image.merge("CMYK", [ImageChops.invert(band) for band in image.split()]).convert("RGB")
    if recipe.alpha != "dropped" and (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
        see_through = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, recipe.alpha)
        return Image.alpha_composite(ground, see_through).convert("RGB")
    # A palette's transparency is taken away through RGBA, which Pillow advises.
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def _aliased(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    import torch
    from torch.nn.functional import interpolate

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    made = interpolate(pixels, size=size[::-1], mode="bilinear", align_corners=False)[0]
    return Image.fromarray(made.permute(1, 2, 0).round().clamp(0, 255).byte().numpy())
