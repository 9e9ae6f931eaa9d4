"""What follows the GPU's JPEG decoder, on a CPU: colour exactly as libjpeg's, resize as Pillow's."""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from siglip_serve import gpu_jpeg
from siglip_serve.checkpoint import ImageConfig
from siglip_serve.errors import ImageError, ImageTooLargeError, SettingsError
from siglip_serve.gpu_jpeg import GpuJpegReader, Layout
from siglip_serve.preprocess import ImageLimits, plain_jpeg

SUBSAMPLING = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}
Sampling = Literal["gray", "4:4:4", "4:2:2", "4:2:0"]


def blocks(height: int, width: int) -> Image.Image:
    """Plain squares of 16 pixels: colour is constant within every block of a JPEG."""
    colors = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return Image.fromarray(colors.repeat(16, 0).repeat(16, 1))


def jpeg(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92, **options)
    return file.getvalue()


def stored_planes(data: bytes, layout: Layout) -> torch.Tensor:
    """The planes of a JPEG of `blocks`, as a decoder gives them: [1, bytes]."""
    with Image.open(io.BytesIO(data)) as image:
        image.draft("YCbCr", image.size)
        full = np.asarray(image)
    height, width = layout.chroma
    down, across = layout.height // height, layout.width // width
    # The middle of a square has its colour, whatever the squares beside it are.
    middles = full[8::16, 8::16, 1:].repeat(16 // down, 0).repeat(16 // across, 1)
    parts = [full[..., 0], *(middles[..., channel] for channel in range(2))]
    return torch.from_numpy(np.concatenate([part.ravel() for part in parts]))[None]


@pytest.mark.parametrize("sampling", SUBSAMPLING)
def test_colour_is_libjpegs(sampling: Sampling) -> None:
    data = jpeg(blocks(48, 80), subsampling=SUBSAMPLING[sampling])
    frame = plain_jpeg(data)
    assert frame is not None
    assert (frame.height, frame.width, frame.sampling) == (48, 80, sampling)
    layout = Layout(48, 80, sampling)
    rgb = gpu_jpeg.to_rgb(stored_planes(data, layout), layout)[0].permute(1, 2, 0)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(rgb.numpy(), np.asarray(image))


def test_grey_is_repeated() -> None:
    values = torch.randint(0, 256, (2, 17 * 19), dtype=torch.uint8)
    rgb = gpu_jpeg.to_rgb(values, Layout(17, 19, "gray"))
    assert rgb.shape == (2, 3, 17, 19)
    for channel in range(3):
        torch.testing.assert_close(rgb[:, channel].flatten(1), values.float())


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(50, 37), (37, 90), (20, 20), (200, 31)], ids=str)
def test_resize_is_pillows(size: tuple[int, int], resample: Literal["bicubic", "bilinear"]) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture[: size[1] // 2] = 255 * (picture[: size[1] // 2] > 127)  # edges that overshoot
    got = gpu_jpeg.resize(torch.from_numpy(picture).permute(2, 0, 1)[None].float(), 32, resample)[0]
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    expected = np.asarray(Image.fromarray(picture).resize((32, 32), filters[resample]))
    difference = np.abs(got.numpy().astype(int) - expected)
    assert difference.max() <= 1
    assert difference.mean() < 0.1


def test_every_length_is_cut_into_known_batches() -> None:
    for count in (1, 5, 63, 64, 100):
        parts = list(gpu_jpeg._batches(range(count), 1000))
        assert [index for part in parts for index in part] == list(range(count))
        assert all(len(part) in gpu_jpeg._BATCHES for part in parts)
    assert [len(part) for part in gpu_jpeg._batches(range(9), 0)] == [1] * 9  # very large files


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(blocks(32, 32), exif=exif)


@pytest.mark.parametrize(
    "data",
    [
        jpeg(blocks(32, 32), progressive=True),
        jpeg(blocks(32, 32))[:-20],
        jpeg(blocks(32, 32).convert("CMYK")),
        rotated(),
        jpeg(Image.new("RGB", (8, 40))),
    ],
    ids=["progressive", "truncated", "CMYK", "rotated", "narrow"],
)
def test_what_has_to_be_judged_is_left_to_the_cpu(data: bytes) -> None:
    assert plain_jpeg(data) is None


def test_other_formats_are_left_to_the_cpu() -> None:
    file = io.BytesIO()
    blocks(32, 32).save(file, "PNG")
    assert plain_jpeg(file.getvalue()) is None


def test_hostile_headers_end_in_an_answer() -> None:
    """Whatever a byte of the header is changed to, there is a frame, no frame or an image error."""
    data = jpeg(blocks(16, 16))
    seen = set()
    for position in range(data.index(b"\xff\xda") + 8):
        for value in (0, 1, 0x11, 0x7F, 0xFF):
            changed = data[:position] + bytes([value]) + data[position + 1 :]
            try:
                seen.add(type(plain_jpeg(changed)).__name__)
            except ImageError as error:
                seen.add(type(error).__name__)
    assert seen == {"PlainFrame", "NoneType", "ImageError"}


def test_limits_hold() -> None:
    with pytest.raises(ImageTooLargeError, match="1024x1024 pixels"):
        plain_jpeg(jpeg(Image.new("RGB", (1024, 1024))), ImageLimits(max_pixels=1000))


def test_a_cpu_is_refused() -> None:
    with pytest.raises(SettingsError, match="runs on the CPU"):
        GpuJpegReader(ImageConfig(32, "bicubic", 1 / 255, (0.5,) * 3, (0.5,) * 3), "cpu", ImageLimits())
