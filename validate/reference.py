"""A checkpoint through transformers, in this process, with which the server is compared.

torch and transformers are imported on first use. They are in the `dev` extra. Images go through the
checkpoint's image processor with its Pillow backend, on which the published accuracies rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from validate.errors import ValidationError

__all__ = ["Reference"]


class Reference:
    """transformers' SigLIP or CLIP with float32 weights.

    Args:
        checkpoint: Hugging Face directory or hub id, optionally `id@revision`.
        device: `auto`, `cpu` or `cuda`.
        batch: rows of one pass.

    Raises:
        ValidationError: transformers is not installed, or cannot load the checkpoint.
    """

    def __init__(self, checkpoint: str, device: str = "auto", batch: int = 32) -> None:
        try:
            import torch
            import transformers
        except ImportError as error:
            raise ValidationError(f"the reference needs torch and transformers: {error}") from error
        name, _, revision = checkpoint.partition("@")
        if Path(checkpoint).is_dir():
            name, revision = checkpoint, ""
        pinned: dict[str, Any] = {"revision": revision} if revision else {}
        self._device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self._batch = batch
        auto: Any = transformers
        try:
            model = auto.AutoModel.from_pretrained(name, dtype=torch.float32, **pinned)
            self._model = model.to(self._device).eval()
            self._images = auto.AutoImageProcessor.from_pretrained(name, backend="pil", **pinned)
            self._tokenizer = auto.AutoTokenizer.from_pretrained(name, **pinned)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValidationError(
                f"--checkpoint {checkpoint}: transformers cannot load it ({error})"
            ) from error
        self._context = self._model.config.text_config.max_position_embeddings

    def embed_images(self, files: Sequence[Path]) -> NDArray[np.float32]:
        """The images' embeddings [n, d], not normalised. The file's EXIF rotation is applied first."""
        from PIL import Image, ImageOps

        def pixels(batch: Sequence[Path]) -> Any:
            images = []
            for file in batch:
                try:
                    with Image.open(file) as image:
                        images.append(ImageOps.exif_transpose(image))
                except OSError as error:
                    raise ValidationError(f"{file}: Pillow cannot read it ({error})") from error
            return self._images(images=images, do_convert_rgb=True, return_tensors="pt")["pixel_values"]

        return self._run(
            files, lambda batch: {"pixel_values": pixels(batch)}, "get_image_features", "reference images"
        )

    def embed_texts(self, texts: Sequence[str], padded: bool = True) -> NDArray[np.float32]:
        """The texts' embeddings [n, d], not normalised; `padded=False` shows what forgetting it costs."""

        def ids(batch: Sequence[str]) -> Any:
            padding = "max_length" if padded else False
            return self._tokenizer(
                [self._lower(text) for text in batch],
                padding=padding,
                truncation=True,
                max_length=self._context,
                return_tensors="pt",
            )["input_ids"]

        label = "reference texts" if padded else "texts without padding"
        return self._run(
            texts, lambda batch: {"input_ids": ids(batch)}, "get_text_features", label, 0 if padded else 1
        )

    def _lower(self, text: str) -> str:
        """SigLIP 2 learnt lowercase text. The tokenizer class that its checkpoints name leaves capitals."""
        return text.lower() if "Gemma" in type(self._tokenizer).__name__ else text

    def _run(
        self, rows: Sequence[Any], inputs: Any, method: str, label: str, batch: int = 0
    ) -> NDArray[np.float32]:
        import torch

        size = batch or self._batch
        found = []
        with torch.inference_mode(), tqdm(total=len(rows), desc=label, unit="row") as bar:
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                tensors = {name: value.to(self._device) for name, value in inputs(part).items()}
                features = getattr(self._model, method)(**tensors)
                # An output object from transformers 5 on.
                features = getattr(features, "pooler_output", features)
                found.append(features.float().cpu().numpy())
                bar.update(len(part))
        return np.concatenate(found)
