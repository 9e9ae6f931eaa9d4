"""JPEG files to pixels on NVIDIA GPUs with a JPEG decoder in hardware (A100, H100, H200 and newer).

The decoder gives the planes as they are stored. A kernel brings colour to full size and to RGB with
libjpeg's own arithmetic, and two matrix products resize as `preprocess.py` does on CPUs: so that pixels
differ from its `fast` mode by little more than the rounding of the inverse cosine transform. What the
hardware does not take, and what has to be judged (rotated, progressive, truncated files), is left to the CPU.
"""

from __future__ import annotations

import ctypes
import io
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from siglip_serve.checkpoint import ImageConfig
from siglip_serve.errors import ImageError, SettingsError
from siglip_serve.preprocess import ImageLimits, Pixels, plain_jpeg

__all__ = ["GpuJpegReader", "resize", "resize_weights"]

_HARDWARE = 3  # NVJPEG_BACKEND_HARDWARE
_PLANES = 1  # NVJPEG_OUTPUT_YUV
_MOST_PIXELS = 8_000_000  # of a file; larger ones go to the CPU
_PIXELS_AT_ONCE = 16_000_000
_SMALLEST = 64  # pixels a side; of a picture to warm up with
_BATCHES = (32, 16, 8, 4, 2, 1)
_STATES = 4  # for a number of files: decodings that may be under way
_SIZES_KEPT = 256


class _Planes(ctypes.Structure):
    _fields_ = (("channel", ctypes.c_void_p * 4), ("pitch", ctypes.c_size_t * 4))


class _State(NamedTuple):
    pointer: ctypes.c_void_p
    done: torch.cuda.Event


class Layout(NamedTuple):
    """What files must share to be decoded together: size in pixels, and how colour is subsampled."""

    height: int
    width: int
    sampling: Literal["gray", "4:4:4", "4:2:2", "4:2:0"]

    @property
    def chroma(self) -> tuple[int, int]:
        """Height and width of the colour planes."""
        down, across = self.sampling == "4:2:0", self.sampling in ("4:2:0", "4:2:2")
        return -(-self.height // (1 + down)), -(-self.width // (1 + across))


class GpuJpegReader:
    """Decodes and resizes many files at once.

    Args:
        image: the checkpoint's.
        device: `cuda:<index>`.
        limits: files beyond them are left to the CPU, which refuses them.

    Raises:
        SettingsError: no nvJPEG library, or a GPU without the decoder.
    """

    def __init__(self, image: ImageConfig, device: str, limits: ImageLimits) -> None:
        if not device.startswith("cuda"):
            raise SettingsError("preprocess gpu: this model runs on the CPU; fast and pil do without a GPU")
        self._device = torch.device(device)
        torch.cuda.set_device(self._device)
        torch.zeros(1, device=self._device)  # nvJPEG uses the context that torch makes
        self._nvjpeg = _load_nvjpeg()
        self._handle = ctypes.c_void_p()
        status = self._nvjpeg.nvjpegCreateEx(_HARDWARE, None, None, 0, ctypes.byref(self._handle))
        if status:
            raise SettingsError(
                f"preprocess gpu: {torch.cuda.get_device_name(self._device)} has no JPEG decoder that nvJPEG "
                f"can use (status {status}); fast and pil do without"
            )
        self._states: dict[int, deque[_State]] = defaultdict(deque)
        self._size, self._resample, self._limits = image.size, image.resample, limits
        self._warm_up()

    @torch.inference_mode()
    def __call__(self, files: Sequence[bytes]) -> list[Pixels | None]:
        """uint8 `[S, S, 3]` of each file; None for those that are left to the CPU."""
        groups: dict[Layout, list[int]] = defaultdict(list)
        for index, data in enumerate(files):
            layout = self._layout(data)
            if layout is not None:
                groups[layout].append(index)
        pixels: list[Pixels | None] = [None] * len(files)
        decoded: list[tuple[Sequence[int], Tensor, Layout]] = []
        # All are decoded before the first kernel runs: the decoder, a unit of its own, need not wait for
        # kernels that still read memory which has been handed out again.
        for layout, indices in groups.items():
            for part in _batches(indices, _PIXELS_AT_ONCE // (layout.height * layout.width)):
                planes = self._decode([files[index] for index in part], layout)
                if planes is not None:
                    decoded.append((part, planes, layout))
        resized = [
            (part, resize(to_rgb(planes, layout), self._size, self._resample))
            for part, planes, layout in decoded
        ]
        for part, tensor in resized:
            for index, row in zip(part, tensor.cpu().numpy(), strict=True):
                pixels[index] = row
        torch.cuda.current_stream(self._device).synchronize()
        return pixels

    def _warm_up(self) -> None:
        """Compile, and prepare decoders for all numbers of files: not at a caller's expense."""
        picture = Image.new("RGB", (_SMALLEST, _SMALLEST))
        for sampling in range(3):
            file = io.BytesIO()
            picture.save(file, "JPEG", subsampling=sampling)
            for _ in range(_STATES):
                self([file.getvalue()] * sum(_BATCHES))
        file = io.BytesIO()
        picture.convert("L").save(file, "JPEG")
        self([file.getvalue()])

    def _layout(self, data: bytes) -> Layout | None:
        try:
            frame = plain_jpeg(data, self._limits)
        except ImageError:  # the CPU says why
            return None
        if frame is None or frame.height * frame.width > _MOST_PIXELS:
            return None
        return Layout(frame.height, frame.width, frame.sampling)

    def _decode(self, files: Sequence[bytes], layout: Layout) -> Tensor | None:
        """uint8 [n, bytes]: the planes of each file one after the other; None if one cannot be decoded."""
        luma, chroma = layout.height * layout.width, layout.chroma[0] * layout.chroma[1]
        planes = torch.empty(len(files), luma + 2 * chroma, dtype=torch.uint8, device=self._device)
        images = (_Planes * len(files))()
        for image, row in zip(images, planes, strict=True):
            start = row.data_ptr()
            image.channel[0], image.pitch[0] = start, layout.width
            if layout.sampling != "gray":
                image.channel[1], image.pitch[1] = start + luma, layout.chroma[1]
                image.channel[2], image.pitch[2] = start + luma + chroma, layout.chroma[1]
        stream = torch.cuda.current_stream(self._device)
        state = self._state(len(files))
        status = self._nvjpeg.nvjpegDecodeBatched(
            self._handle,
            state.pointer,
            (ctypes.c_char_p * len(files))(*files),
            (ctypes.c_size_t * len(files))(*map(len, files)),
            images,
            ctypes.c_void_p(stream.cuda_stream),
        )
        state.done.record(stream)
        return None if status else planes

    def _state(self, batch: int) -> _State:
        """A state that no decoding under way uses: its buffers hold the files."""
        states = self._states[batch]
        if len(states) == _STATES and not states[0].done.query():
            states[0].done.synchronize()
        if len(states) == _STATES or (states and states[0].done.query()):
            state = states.popleft()
        else:
            state = _State(ctypes.c_void_p(), torch.cuda.Event())
            status = self._nvjpeg.nvjpegJpegStateCreate(self._handle, ctypes.byref(state.pointer))
            status = status or self._nvjpeg.nvjpegDecodeBatchedInitialize(
                self._handle, state.pointer, batch, 1, _PLANES
            )
            if status:
                raise RuntimeError(f"nvJPEG cannot prepare a batch of {batch}: status {status}")
        states.append(state)
        return state


def _batches(indices: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    """Parts whose lengths are among `_BATCHES`, at most `most`, the longest first."""
    start = 0
    while start < len(indices):
        count = next(size for size in _BATCHES if size <= max(1, min(most, len(indices) - start)))
        yield indices[start : start + count]
        start += count


def _load_nvjpeg() -> Any:
    """The nvJPEG library: of the system's CUDA, or of the package nvidia-nvjpeg."""
    found = find_spec("nvidia")
    folders = [Path(folder) for folder in (found.submodule_search_locations or ())] if found else []
    installed = [str(file) for folder in folders for file in sorted(folder.glob("*/lib/libnvjpeg.so.*"))]
    for name in ("libnvjpeg.so.13", "libnvjpeg.so.12", *installed):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise SettingsError("preprocess gpu: no libnvjpeg; it comes with CUDA, or with pip install nvidia-nvjpeg")


def to_rgb(planes: Tensor, layout: Layout) -> Tensor:
    """Planes [n, bytes] uint8 -> [n, 3, H, W] float32, whole numbers from 0 to 255."""
    from siglip_serve import _jpeg_kernel  # needs the package triton, which machines without a GPU lack

    return _jpeg_kernel.to_rgb(planes, layout.height, layout.width, layout.chroma, layout.sampling)


def resize(pixels: Tensor, size: int, resample: Literal["bilinear", "bicubic"]) -> Tensor:
    """[n, 3, H, W] float32 -> [n, size, size, 3] uint8, antialiased; rounded after each pass, like Pillow."""
    height, width = pixels.shape[-2:]
    down = resize_weights(height, size, resample, str(pixels.device)).t()  # [size, H]
    across = resize_weights(width, size, resample, str(pixels.device))  # [W, size]
    if height > max(size, 2 * width - size):  # the cheaper pass first, as `preprocess.py` does
        pixels = _round(down @ pixels) @ across
    else:
        pixels = down @ _round(pixels @ across)
    return _round(pixels).permute(0, 2, 3, 1).to(torch.uint8).contiguous()


def _round(pixels: Tensor) -> Tensor:
    return pixels.round_().clamp_(0, 255)


@lru_cache(maxsize=_SIZES_KEPT)
def resize_weights(length: int, size: int, resample: Literal["bilinear", "bicubic"], device: str) -> Tensor:
    """What each of `length` pixels of a line gives to each of `size`: [length, size] float32."""
    scale = length / size
    stretch = max(scale, 1.0)  # the filter widens when pixels become fewer
    centers = (np.arange(size) + 0.5) * scale
    support = (2.0 if resample == "bicubic" else 1.0) * stretch
    position = np.arange(length)[:, None]
    first, end = np.floor(centers - support + 0.5), np.floor(centers + support + 0.5)
    distance = np.abs(position + 0.5 - centers) / stretch
    weights = _cubic(distance) if resample == "bicubic" else np.clip(1 - distance, 0, None)
    weights = np.where((position >= first) & (position < end), weights, 0)
    weights /= weights.sum(0)
    return torch.from_numpy(weights.astype(np.float32)).to(device)


def _cubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic with a = -0.5."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return np.where(distance < 1, near, np.where(distance < 2, far, 0))
