"""JPEG files to pixels on NVIDIA GPUs that have a decoder for them (A100, H100, H200 and newer).

The decoder gives the planes as they are stored. A kernel brings colour to full size and to RGB with
libjpeg's own arithmetic, and another resizes as `resize.py` does on CPUs. Pixels differ from its
`fast` mode by little more than the rounding of the inverse cosine transform. Files that are not plain JPEGs
(rotated, progressive, damaged or very large ones, other formats) are left to the CPU.

Planes are decoded into memory that is used for nothing else, and that is overwritten before other planes
come. If the decoder leaves a file out, no other picture is taken for it, and the gap is noticed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from io import BytesIO
from itertools import accumulate, groupby
from math import prod
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from siglip_serve.checkpoint.model_config import ImageConfig
from siglip_serve.errors import SettingsError
from siglip_serve.images.formats import ImageLimits, plain_jpeg
from siglip_serve.images.jpeg import PlainFrame, Sampling
from siglip_serve.images.nvjpeg.library import Decoder, Picture
from siglip_serve.images.resize import LONGEST, Pixels, Resample, cut_offsets, down_first, target_size

__all__ = ["Decoded", "GpuJpegReader", "Layout", "Taps", "lay_out", "resize", "resize_weights", "to_rgb"]

_LONGEST_SIDE = 4096  # pixels; larger pictures are left to the CPU
# Planes that are decoded together: seven photographs of 12 megapixels in 4:2:0. An H200 has seven engines,
# and each decodes one picture at a time, so an eighth photograph would take twice the time. No picture is
# larger: 4096 x 4096 in 4:4:4 is two fifths.
_BYTES_AT_ONCE = 7 * 4032 * 3040 * 3 // 2  # with whole blocks of the halved planes
_PIXELS_CONVERTED = _LONGEST_SIDE**2  # at once, so that RGB needs less memory than the planes of a batch
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)  # few, since the first batch of a size takes long
_MCU = 16  # pixels per side, at most; the decoder may write whole ones
# What memory holds before the decoder writes to it. A picture that ends with a run of it is left to the CPU
# too: it is near black, or of a colour that no screen shows.
_UNWRITTEN = 1
_WEIGHTS_KEPT = 512  # of 70 kB each
_SMALL = PlainFrame(64, 64, "4:2:0")
_SUBSAMPLING: dict[Sampling, int] = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2, "gray": 0}  # Pillow's numbers


class Decoded(NamedTuple):
    """A picture that the GPU has read.

    Attributes:
        pixels: uint8 `[S, S, 3]`, to be used before the reader is called again.
        size: height and width of the file's picture.
    """

    pixels: Pixels
    size: tuple[int, int]


class Layout(NamedTuple):
    """Layout of a picture's planes in memory, with room for whole MCUs.

    Attributes:
        pitches: bytes from row to row, of each plane.
        starts: where each plane begins.
        bytes: of all planes.
    """

    frame: PlainFrame
    pitches: tuple[int, ...]
    starts: tuple[int, ...]
    bytes: int

    def at(self, address: int) -> Picture:
        """The planes of the picture that lies there."""
        return Picture(tuple(address + start for start in self.starts), self.pitches)


class Taps(NamedTuple):
    """Pixels of a line that each pixel of its resized line is made of.

    Attributes:
        starts: [count] int32, the first of them.
        weights: [taps, count] float32, of it and those that follow.
    """

    starts: Tensor
    weights: Tensor


class _File(NamedTuple):
    layout: Layout
    number: int
    data: bytes


class GpuJpegReader:
    """Decoder and resizer of many files at once, for one thread.

    Args:
        image: the checkpoint's.
        device: `cuda:<index>`.
        limits: files beyond them are left to the CPU, which refuses them.

    Raises:
        SettingsError: no nvJPEG library, or a GPU without the decoder.
    """

    def __init__(self, image: ImageConfig, device: str, limits: ImageLimits) -> None:
        self._image, self._limits = image, limits
        self._device = torch.device(device)
        self._decoder = Decoder(self._device)
        self._filler = _File(lay_out(_SMALL), -1, _draw(_SMALL))
        most = _BATCHES[-1]
        room = _BYTES_AT_ONCE + most * self._filler.layout.bytes
        self._planes = torch.full((room,), _UNWRITTEN, dtype=torch.uint8, device=self._device)
        self._pixels, self._written = self._rows(most, self._device)
        self._host, self._host_written = self._rows(most, None)
        self._warm_up()

    @torch.inference_mode()
    def __call__(self, files: Sequence[bytes]) -> list[Decoded | None]:
        """The picture of each file, or None where the CPU has to read it.

        Raises:
            RuntimeError: the device failed; the CPU can still read the files.
        """
        plain = [file for number, data in enumerate(files) if (file := self._plain(number, data))]
        # Equal frames follow each other, and the largest come first. Otherwise a batch might end with one
        # engine at work on a large picture, and the others idle.
        plain.sort(key=lambda file: (file.layout.bytes, file.layout), reverse=True)
        if len(plain) > len(self._host):
            self._host, self._host_written = self._rows(len(plain), None)
        row = 0
        for batch in _batches(plain):
            self._read(batch, row)
            row += len(batch)
        found: list[Decoded | None] = [None] * len(files)
        pixels, written = self._host.numpy(), self._host_written.tolist()
        for row, file in enumerate(plain):
            if written[row]:
                found[file.number] = Decoded(pixels[row], (file.layout.frame.height, file.layout.frame.width))
        return found

    def _plain(self, number: int, data: bytes) -> _File | None:
        frame = plain_jpeg(data, self._limits)
        if frame is None or max(frame.height, frame.width) > _LONGEST_SIDE:
            return None
        stretched = self._image.shortest_edge is None
        if not stretched and max(frame.height, frame.width) > LONGEST * min(frame.height, frame.width):
            return None
        return _File(lay_out(frame), number, data) if self._decoder.agrees(data, frame) else None

    def _read(self, batch: Sequence[_File], row: int) -> None:
        """The files' pixels, and whether the decoder has written them, to the host's rows from `row` on."""
        # Batches have few sizes: a file that takes next to no time fills them up.
        size = next(size for size in _BATCHES if size >= len(batch))
        files = [*batch, *[self._filler] * (size - len(batch))]
        starts = list(accumulate((file.layout.bytes for file in files), initial=0))
        address = self._planes.data_ptr()
        pictures = [file.layout.at(address + start) for file, start in zip(files, starts[:-1], strict=True)]
        self._host_written[row : row + len(batch)] = 0
        try:
            decoded = self._decoder.decode([file.data for file in files], pictures)
            if decoded:
                self._convert(batch, starts, row)
        finally:
            self._planes[: starts[-1]].fill_(_UNWRITTEN)
            # From here on the next batch may be decoded, since no kernel reads the planes any more, and the
            # host's rows hold what was copied to them.
            self._decoder.wait()
        if not decoded and len(batch) > 1:  # it refused one of them, for which the others need not suffer
            half = len(batch) // 2
            self._read(batch[:half], row)
            self._read(batch[half:], row + half)

    def _convert(self, batch: Sequence[_File], starts: Sequence[int], row: int) -> None:
        end = 0
        for layout, group in groupby(batch, key=lambda file: file.layout):
            first, end = end, end + len(list(group))
            at_once = max(1, _PIXELS_CONVERTED // (layout.frame.height * layout.frame.width))
            for begin in range(first, end, at_once):
                self._convert_group(layout, range(begin, min(begin + at_once, end)), starts)
        self._host[row : row + end].copy_(self._pixels[:end], non_blocking=True)
        self._host_written[row : row + end].copy_(self._written[:end], non_blocking=True)

    def _convert_group(self, layout: Layout, rows: range, starts: Sequence[int]) -> None:
        planes = self._planes[starts[rows.start] : starts[rows.stop]].view(len(rows), layout.bytes)
        rgb, written = to_rgb(planes, layout)
        self._pixels[rows.start : rows.stop] = resize(rgb, self._image)
        self._written[rows.start : rows.stop] = written

    def _rows(self, count: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
        """Memory for pixels, and for whether they were written. Without a device it is the host's."""
        pinned = device is None and self._device.type == "cuda"
        shape = (count, self._image.size, self._image.size, 3)
        pixels = torch.zeros(shape, dtype=torch.uint8, device=device, pin_memory=pinned)
        return pixels, torch.zeros(count, dtype=torch.int32, device=device, pin_memory=pinned)

    def _warm_up(self) -> None:
        """Compile, and prepare the decoder for all sizes of a batch: not at a caller's expense."""
        for count in _BATCHES:
            self([self._filler.data] * count)
        for sampling in _SUBSAMPLING:
            if self([_draw(_SMALL._replace(sampling=sampling))]) == [None]:
                raise SettingsError(
                    f"preprocess gpu: the JPEG decoder of {torch.cuda.get_device_name(self._device)} "
                    f"does not read a picture of {sampling}; fast, scaled and pil do without"
                )


def _batches(files: Sequence[_File]) -> Iterator[Sequence[_File]]:
    """The files in turn, as many at a time as are decoded together."""
    start, room = 0, 0
    for end, file in enumerate(files):
        room += file.layout.bytes
        if room > _BYTES_AT_ONCE or end - start == _BATCHES[-1]:
            yield files[start:end]
            start, room = end, file.layout.bytes
    if start < len(files):
        yield files[start:]


@lru_cache(maxsize=1024)
def lay_out(frame: PlainFrame) -> Layout:
    """Room for the planes of such a picture."""
    pitch, rows = _padded(frame.width), _padded(frame.height)
    if frame.sampling == "gray":
        return Layout(frame, (pitch,), (0,), pitch * rows)
    down, across = frame.sampling == "4:2:0", frame.sampling in ("4:2:0", "4:2:2")
    chroma_pitch = _padded(-(-frame.width // (1 + across)))
    luma, chroma = pitch * rows, chroma_pitch * _padded(-(-frame.height // (1 + down)))
    starts = (0, luma, luma + chroma)
    return Layout(frame, (pitch, chroma_pitch, chroma_pitch), starts, luma + 2 * chroma)


def _padded(length: int) -> int:
    return -(-length // _MCU) * _MCU


def _draw(frame: PlainFrame) -> bytes:
    """A small picture as a JPEG."""
    picture = Image.linear_gradient("L").resize((frame.width, frame.height))
    file = BytesIO()
    if frame.sampling == "gray":
        picture.save(file, "JPEG")
    else:
        picture.convert("RGB").save(file, "JPEG", subsampling=_SUBSAMPLING[frame.sampling])
    return file.getvalue()


def to_rgb(planes: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Planes [n, bytes] uint8 -> [n, 3, H, W] uint8, and int32 [n].

    The second is 1 where a decoder has written all planes to their ends, else 0.
    """
    pitches, starts = (*layout.pitches, 0, 0), (*layout.starts, 0, 0)
    place = (pitches[0], pitches[1], starts[1], starts[2])
    rgb, written = _kernels().to_rgb(planes, layout.frame, place, _UNWRITTEN)
    return rgb, written


def resize(pixels: Tensor, image: ImageConfig) -> Tensor:
    """[n, 3, H, W] uint8 -> [n, S, S, 3] uint8, as `fit` does, rounded after each pass like Pillow."""
    height, width = pixels.shape[-2:]
    size = target_size(image, height, width)
    top, left = cut_offsets(image, size)
    weights = (image.size, image.resample, str(pixels.device))
    down = resize_weights(height, size[0], top, *weights)
    across = resize_weights(width, size[1], left, *weights)
    if down_first((height, width), size):
        pixels = _resample(_resample(pixels, 2, down), 3, across)
    else:
        pixels = _resample(_resample(pixels, 3, across), 2, down)
    return pixels.permute(0, 2, 3, 1)


def _resample(pixels: Tensor, axis: int, taps: Taps) -> Tensor:
    lines = pixels.view(-1, pixels.shape[axis], prod(pixels.shape[axis + 1 :]))
    resized: Tensor = _kernels().resample(lines, *taps)
    return resized.view(*pixels.shape[:axis], -1, *pixels.shape[axis + 1 :])


def _kernels() -> Any:
    # Needs the package triton, which machines without a GPU lack.
    from siglip_serve.images.nvjpeg import kernel

    return kernel


@lru_cache(maxsize=_WEIGHTS_KEPT)
def resize_weights(length: int, size: int, first: int, count: int, resample: Resample, device: str) -> Taps:
    """Weights of a line's `length` pixels in `count` of the `size` that it becomes, from `first` on."""
    scale = length / size
    stretch = max(scale, 1.0)  # the filter widens when pixels become fewer
    centers = (torch.arange(first, first + count, dtype=torch.float64) + 0.5) * scale
    support = (2.0 if resample == "bicubic" else 1.0) * stretch
    begin = (centers - support + 0.5).floor().clamp(min=0)
    end = (centers + support + 0.5).floor().clamp(max=length)
    taps = int((end - begin).max())
    starts = begin.clamp(max=length - taps)  # the same number for all, within the line
    position = starts + torch.arange(taps)[:, None]
    inside = (position >= begin) & (position < end)
    distance = (position + 0.5 - centers).abs() / stretch
    weights = (_cubic(distance) if resample == "bicubic" else (1 - distance).clamp(min=0)) * inside
    return Taps(starts.int().to(device), (weights / weights.sum(0)).float().to(device))


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic with a = -0.5."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
