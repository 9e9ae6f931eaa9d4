"""NVIDIA's library nvJPEG: JPEG files to planes in a GPU's memory, by its decoder, a unit of its own."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from siglip_serve.errors import SettingsError
from siglip_serve.images.jpeg import PlainFrame, Sampling

__all__ = ["Decoder", "Picture"]

_HARDWARE = 3  # NVJPEG_BACKEND_HARDWARE
_PLANES = 1  # NVJPEG_OUTPUT_YUV
_MOST_PLANES = 4
_SUBSAMPLINGS: dict[Sampling, int] = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2, "gray": 6}
_SYSTEM = ("libnvjpeg.so.13", "libnvjpeg.so.12", "/usr/local/cuda/lib64/libnvjpeg.so")


class Picture(NamedTuple):
    """Destination of a picture: the address of each plane, and the bytes from one of its rows to the next."""

    addresses: tuple[int, ...]
    pitches: tuple[int, ...]


class _Image(ctypes.Structure):
    _fields_ = (("channel", ctypes.c_void_p * _MOST_PLANES), ("pitch", ctypes.c_size_t * _MOST_PLANES))


class Decoder:
    """The GPU's JPEG decoder, for one thread.

    Args:
        device: of CUDA.

    Raises:
        SettingsError: no library, or a GPU without the decoder.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise SettingsError(
                "preprocess gpu: this model runs on the CPU; fast, scaled and pil do without a GPU"
            )
        self._device = device
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # nvJPEG uses the context that torch makes
        self._library = _load()
        self._handle = ctypes.c_void_p()
        status = self._library.nvjpegCreateEx(_HARDWARE, None, None, 0, ctypes.byref(self._handle))
        if status:
            raise SettingsError(
                f"preprocess gpu: {torch.cuda.get_device_name(device)} has no JPEG decoder that nvJPEG "
                f"can use (status {status}); fast, scaled and pil do without"
            )
        # One for each size of a batch, since preparing one takes longer than decoding by it.
        self._states: dict[int, ctypes.c_void_p] = {}
        self._idle = torch.cuda.Event(blocking=True)  # a thread that spins while it waits takes a core

    def agrees(self, data: bytes, frame: PlainFrame) -> bool:
        """True if the library reads the same size and sampling out of a file, so that the memory fits."""
        components, subsampling = ctypes.c_int(), ctypes.c_int()
        widths, heights = (ctypes.c_int * _MOST_PLANES)(), (ctypes.c_int * _MOST_PLANES)()
        status = self._library.nvjpegGetImageInfo(
            self._handle,
            data,
            ctypes.c_size_t(len(data)),
            ctypes.byref(components),
            ctypes.byref(subsampling),
            widths,
            heights,
        )
        found = (components.value, subsampling.value, heights[0], widths[0])
        planes = 1 if frame.sampling == "gray" else 3
        return not status and found == (planes, _SUBSAMPLINGS[frame.sampling], frame.height, frame.width)

    def decode(self, files: Sequence[bytes], pictures: Sequence[Picture]) -> bool:
        """Decode into the places given. On return all is written, and nothing is read any more.

        Returns:
            False if the library refused a file. The pixels written are then undefined.

        Raises:
            RuntimeError: the device failed.
        """
        data = (ctypes.c_char_p * len(files))(*files)
        lengths = (ctypes.c_size_t * len(files))(*map(len, files))
        images = (_Image * len(files))()
        for image, picture in zip(images, pictures, strict=True):
            for plane, (address, pitch) in enumerate(zip(*picture, strict=True)):
                image.channel[plane], image.pitch[plane] = address, pitch
        state = self._state(len(files))
        # The decoder is not ordered by streams on every GPU: it writes as soon as it is called, whatever has
        # been launched before. Only the host can make it wait for kernels that still read that memory, and
        # kernels, and the end of the arrays above, for it.
        self.wait()
        stream = torch.cuda.current_stream(self._device)
        status = self._library.nvjpegDecodeBatched(
            self._handle, state, data, lengths, images, ctypes.c_void_p(stream.cuda_stream)
        )
        self.wait()
        if status:  # what the refused batch has left in the state concerns no other one
            self._library.nvjpegJpegStateDestroy(self._states.pop(len(files)))
        return not status

    def wait(self) -> None:
        """Return when the device does nothing any more for this process."""
        self._idle.record(torch.cuda.current_stream(self._device))
        self._idle.synchronize()
        torch.cuda.synchronize(self._device)  # streams of the library's own too

    def _state(self, batch: int) -> ctypes.c_void_p:
        state = self._states.get(batch)
        if state is None:
            state = ctypes.c_void_p()
            status = self._library.nvjpegJpegStateCreate(self._handle, ctypes.byref(state))
            status = status or self._library.nvjpegDecodeBatchedInitialize(
                self._handle, state, batch, 1, _PLANES
            )
            if status:
                raise RuntimeError(f"nvJPEG cannot prepare a batch of {batch}: status {status}")
            self._states[batch] = state
        return state


def _load() -> Any:
    """The library: of the system's CUDA, or of the package nvidia-nvjpeg."""
    found = find_spec("nvidia")
    folders = [Path(folder) for folder in (found.submodule_search_locations or ())] if found else []
    installed = [str(file) for folder in folders for file in sorted(folder.glob("*/lib/libnvjpeg.so.*"))]
    for name in (*_SYSTEM, *installed):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise SettingsError("preprocess gpu: no libnvjpeg; it comes with CUDA, or with pip install nvidia-nvjpeg")
