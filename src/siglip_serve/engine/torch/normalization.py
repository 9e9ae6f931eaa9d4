"""Pixels become the numbers that a tower takes."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from siglip_serve.checkpoint.model_config import ImageConfig, NaflexImageConfig

__all__ = ["Normalization", "PatchNormalization"]


class Normalization:
    """Normalise uint8 pixels [n, S, S, 3] on the tower's device, into what it takes, [n, 3, S, S].

    Args:
        image: the checkpoint's rescale factor, mean and standard deviation.
        device: where the pixels are computed.
        dtype: of the result. The arithmetic is float32.
    """

    def __init__(self, image: ImageConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        # x * rescale, then (x - mean) / std, in the reference's order, so that float32 rounds alike.
        self._rescale = image.rescale
        self._mean = torch.tensor(image.mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(image.std, device=device).view(3, 1, 1)

    def __call__(self, pixels: NDArray[np.uint8]) -> Tensor:
        """uint8 pixels [n, S, S, 3] -> [n, 3, S, S]"""
        x = torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2)
        return ((x * self._rescale - self._mean) / self._std).to(self._dtype)


class PatchNormalization:
    """Normalise uint8 patches [n, T, 3 P P] on the tower's device. Arguments as for `Normalization`."""

    def __init__(self, image: NaflexImageConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._rescale = image.rescale  # in the order of `Normalization`
        pixels = image.patch_size**2
        self._mean = torch.tensor(image.mean, device=device).repeat(pixels)
        self._std = torch.tensor(image.std, device=device).repeat(pixels)

    def __call__(self, patches: NDArray[np.uint8]) -> Tensor:
        """uint8 patches [n, T, 3 P P] -> [n, T, 3 P P]"""
        x = torch.from_numpy(patches).to(self._device)
        return ((x * self._rescale - self._mean) / self._std).to(self._dtype)
