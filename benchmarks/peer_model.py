"""SigLIP by transformers, as the peers of this project serve it: images and texts become embeddings.

It imports nothing of this project, so that it runs in environments that hold only a peer.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from transformers.utils import is_torchvision_available

__all__ = ["DTYPES", "TransformersModel", "server_parser"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def server_parser(description: str | None, port: int) -> argparse.ArgumentParser:
    """Make the parser of a server's options, with those that all have.

    Args:
        description: the text of `--help`.
        port: that is taken by default.
    """
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="Hugging Face directory")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="default %(default)s")
    add("--dtype", choices=list(DTYPES), default="float32", help="default %(default)s")
    add("--batch", type=int, default=32, help="largest batch, default %(default)s")
    add("--wait", type=float, default=0.003, help="seconds to wait for company, default %(default)s")
    add("--port", type=int, default=port, help="on 127.0.0.1, default %(default)s")
    return parser


class TransformersModel:
    """Both towers and what comes before them. Calls from several threads do not disturb each other.

    Args:
        checkpoint: Hugging Face directory.
        device: `cpu` or `cuda`.
        dtype: a key of `DTYPES`.
    """

    def __init__(self, checkpoint: Path, device: str = "cpu", dtype: str = "float32") -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.device, self.dtype = device, dtype
        self.processor = _image_processor_class().from_pretrained(checkpoint)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
        model = transformers.AutoModel.from_pretrained(checkpoint, dtype=DTYPES[dtype])
        self.model = model.eval().requires_grad_(False).to(device)
        self._length = self.model.config.text_config.max_position_embeddings

    def decode(self, data: bytes) -> Image.Image:
        """Decode an image file to RGB."""
        return Image.open(io.BytesIO(data)).convert("RGB")

    def pixels(self, images: Sequence[Image.Image], device: str = "cpu") -> torch.Tensor:
        """Resize and normalise n images to [n, 3, S, S] float32, on a device."""
        found: torch.Tensor = self.processor(images=list(images), return_tensors="pt", device=device)[
            "pixel_values"
        ]
        return found

    @torch.inference_mode()
    def embed_pixels(self, pixels: torch.Tensor) -> NDArray[np.float32]:
        """Embed [n, 3, S, S] as [n, D]."""
        moved = pixels.to(self.device, DTYPES[self.dtype], non_blocking=True)
        return _array(self.model.vision_model(pixel_values=moved).pooler_output)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed n texts as [n, D]. They are padded to the full length, as SigLIP was trained."""
        ids = self._tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self._length,
            return_tensors="pt",
        )["input_ids"]
        return _array(self.model.text_model(input_ids=ids.to(self.device)).pooler_output)


def _array(tensor: torch.Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = tensor.float().cpu().numpy()
    return found


def _image_processor_class() -> Any:
    """The torchvision processor where torchvision is, else the one of Pillow."""
    return (
        transformers.SiglipImageProcessor
        if is_torchvision_available()
        else transformers.SiglipImageProcessorPil
    )
