"""Test the surroundings of the GPU's JPEG decoder on a CPU: colour exactly as libjpeg's, resize as Pillow's.

The decoder itself needs a GPU; in its place stands one that fills each picture with one grey, to see where
pictures go and in which order. `benchmarks/gpu_jpeg.py` checks the pixels of the real one.
"""

from __future__ import annotations

import ctypes
import io
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from images import encode
from PIL import Image

from siglip_serve.checkpoint.model_config import ImageConfig
from siglip_serve.errors import SettingsError
from siglip_serve.images.formats import ImageLimits
from siglip_serve.images.jpeg import PlainFrame, Sampling, plain_frame
from siglip_serve.images.nvjpeg import reader as gpu_jpeg
from siglip_serve.images.nvjpeg.library import Picture
from siglip_serve.images.nvjpeg.reader import GpuJpegReader, lay_out
from siglip_serve.images.resize import Resample, fit

SAMPLINGS: tuple[Sampling, ...] = ("4:4:4", "4:2:2", "4:2:0")
SIDE = 32
BYTES = 13824  # of a batch: two pictures of 64 x 64 in 4:2:0
PIXELS = 1600  # converted at once, six of the smallest pictures
FILLER = 3 * 16 * 16  # bytes of the file that fills up a batch


@pytest.fixture(autouse=True)
def large_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter takes as long for few results as for many."""
    if not torch.cuda.is_available():
        from siglip_serve.images.nvjpeg import kernel

        monkeypatch.setattr(kernel, "_THREADS", 8192)


def config(resample: Resample = "bicubic", shortest_edge: int | None = None) -> ImageConfig:
    return ImageConfig(SIDE, resample, 1 / 255, (0.5,) * 3, (0.5,) * 3, shortest_edge)


def blocks(height: int, width: int) -> Image.Image:
    """Plain squares of 16 pixels: colour is constant within every block of a JPEG."""
    colors = np.random.default_rng(0).integers(0, 256, (-(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    return Image.fromarray(colors.repeat(16, 0).repeat(16, 1)[:height, :width])


def stored_planes(data: bytes, frame: PlainFrame) -> torch.Tensor:
    """The planes of a JPEG of `blocks`, as a decoder gives them: [1, bytes]."""
    with Image.open(io.BytesIO(data)) as image:
        image.draft("YCbCr", image.size)
        full = np.asarray(image)
    layout = lay_out(frame)
    down, across = (2 if frame.sampling == "4:2:0" else 1), (1 if frame.sampling == "4:4:4" else 2)
    # The middle of a square has its colour, whatever the squares beside it are.
    middles = full[8::16, 8::16, 1:].repeat(16 // down, 0).repeat(16 // across, 1)
    planes = np.full(layout.bytes, 77, np.uint8)  # what lies beside a picture must not matter
    parts = [full[..., 0], *(middles[..., channel] for channel in range(2))]
    for part, start, pitch in zip(parts, layout.starts, layout.pitches, strict=True):
        rows = planes[start : start + pitch * len(part)].reshape(len(part), pitch)
        rows[:, : part.shape[1]] = part
    return torch.from_numpy(planes)[None]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_colour_equals_that_of_libjpeg(sampling: Sampling) -> None:
    data = encode(blocks(48, 80), "JPEG", quality=92, subsampling=sampling)
    frame = PlainFrame(48, 80, sampling)
    assert plain_frame(data) == frame
    rgb, written = gpu_jpeg.to_rgb(stored_planes(data, frame), lay_out(frame))
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(rgb[0].permute(1, 2, 0).numpy(), np.asarray(image))
    assert written.tolist() == [1]


def test_grey_fills_all_channels() -> None:
    layout = lay_out(PlainFrame(17, 19, "gray"))
    planes = torch.randint(2, 256, (2, layout.bytes), dtype=torch.uint8)
    rgb, written = gpu_jpeg.to_rgb(planes, layout)
    assert rgb.shape == (2, 3, 17, 19)
    for channel in range(3):
        torch.testing.assert_close(rgb[:, channel], planes.view(2, 32, 32)[:, :17, :19])
    assert written.tolist() == [1, 1]


@pytest.mark.parametrize("sampling", [*SAMPLINGS, "gray"])
@pytest.mark.parametrize("size", [(16, 16), (33, 31), (45, 70)], ids=str)
def test_notices_planes_that_the_decoder_left_out(sampling: Sampling, size: tuple[int, int]) -> None:
    """One plane after the other is not written, or not to its last rows."""
    layout = lay_out(PlainFrame(*size, sampling))
    planes = torch.full((1 + 2 * len(layout.starts), layout.bytes), 200, dtype=torch.uint8)
    for number, (start, pitch) in enumerate(zip(layout.starts, layout.pitches, strict=True)):
        rows = size[0] if number == 0 or sampling != "4:2:0" else -(-size[0] // 2)
        planes[1 + 2 * number, start : start + pitch * rows] = gpu_jpeg._UNWRITTEN
        planes[2 + 2 * number, start + pitch * (rows // 2) : start + pitch * rows] = gpu_jpeg._UNWRITTEN
    assert gpu_jpeg.to_rgb(planes, layout)[1].tolist() == [1] + [0] * (len(planes) - 1)


@pytest.mark.parametrize("sampling", [*SAMPLINGS, "gray"])
@pytest.mark.parametrize("size", [(16, 16), (33, 31), (375, 500)], ids=str)
def test_planes_have_room_for_whole_mcus(sampling: Sampling, size: tuple[int, int]) -> None:
    layout = lay_out(PlainFrame(*size, sampling))
    ends = [*layout.starts[1:], layout.bytes]
    down, across = (2 if sampling == "4:2:0" else 1), (2 if sampling in ("4:2:0", "4:2:2") else 1)
    for plane, (start, end, pitch) in enumerate(zip(layout.starts, ends, layout.pitches, strict=True)):
        divisors = (down, across) if plane else (1, 1)
        mcus = -(-size[0] // (8 * down)), -(-size[1] // (8 * across))
        rows = mcus[0] * 8 * down // divisors[0]
        assert pitch >= mcus[1] * 8 * across // divisors[1]
        assert end - start >= rows * pitch
        assert pitch % 16 == start % 256 == 0


@pytest.mark.parametrize("shortest_edge", [None, SIDE, 40], ids=["stretched", "cut", "cut more"])
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(50, 37), (37, 90), (20, 20), (200, 31), (190, 290), (31, 700)], ids=str)
def test_resize_is_close_to_pillow(
    size: tuple[int, int], resample: Resample, shortest_edge: int | None
) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture[: size[1] // 2] = 255 * (picture[: size[1] // 2] > 127)  # edges that overshoot
    image = config(resample, shortest_edge)
    got = gpu_jpeg.resize(torch.from_numpy(picture).permute(2, 0, 1)[None].contiguous(), image)[0]
    assert got.shape == (SIDE, SIDE, 3)
    difference = np.abs(got.numpy().astype(int) - fit(picture, image, "pil"))
    assert difference.max() <= 1
    assert difference.mean() < 0.1


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("length", "size"), [(50, 32), (32, 32), (20, 32), (375, 32), (33, 31), (3, 32)])
def test_resize_weights_equal_those_of_torch(length: int, size: int, resample: Resample) -> None:
    weights = dense(length, gpu_jpeg.resize_weights(length, size, 0, size, resample, "cpu"))
    lines = torch.eye(length, dtype=torch.float64)[None, None]
    expected = torch.nn.functional.interpolate(lines, (length, size), mode=resample, antialias=True)[0, 0]
    torch.testing.assert_close(weights.double(), expected, rtol=0, atol=1e-6)
    part = dense(length, gpu_jpeg.resize_weights(length, size, 3, 5, resample, "cpu"))
    torch.testing.assert_close(part, weights[:, 3:8], rtol=0, atol=0)


def dense(length: int, taps: gpu_jpeg.Taps) -> torch.Tensor:
    """All weights of a line: [length, count]."""
    count = torch.arange(len(taps.starts))
    weights = torch.zeros(length, len(count))
    for number, row in enumerate(taps.weights):
        weights[taps.starts + number, count] = row
    return weights


@pytest.mark.parametrize("size", [(50, 37), (20, 90)], ids=str)
def test_pictures_of_a_batch_are_resized_alike(size: tuple[int, int]) -> None:
    """Not even the last bit of a sum depends on the pictures beside it."""
    pictures = torch.randint(0, 256, (5, 3, *size), dtype=torch.uint8)
    together = gpu_jpeg.resize(pictures, config())
    for number in range(len(pictures)):
        alone = gpu_jpeg.resize(pictures[number : number + 1], config())
        torch.testing.assert_close(together[number : number + 1], alone, rtol=0, atol=0)


class GreyDecoder:
    """Fills the pictures of a file with the grey that the file holds, and tells what happens when."""

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"
        self.events: list[str] = []
        self.batches: list[int] = []
        self.bytes: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        self.memory = (0, 2**64)
        self.refused: set[bytes] = set()
        self.skipped: set[bytes] = set()
        self.unknown: set[bytes] = set()

    def agrees(self, data: bytes, frame: PlainFrame) -> bool:
        return data not in self.unknown and plain_frame(data) == frame

    def decode(self, files: Sequence[bytes], pictures: Sequence[Picture]) -> bool:
        self.events.append("decode")
        self.batches.append(len(files))
        places = []
        for data, picture in zip(files, pictures, strict=True):
            frame = plain_frame(data)
            assert frame is not None
            layout = lay_out(frame)
            self.sizes.append((frame.height, frame.width))
            assert picture == layout.at(picture.addresses[0])
            places.append((picture.addresses[0], picture.addresses[0] + layout.bytes))
            assert self.memory[0] <= places[-1][0]
            assert places[-1][1] <= self.memory[1]
            if data in self.skipped:
                continue
            ctypes.memset(picture.addresses[0], grey(data), layout.pitches[0] * frame.height)
            for address, pitch in zip(picture.addresses[1:], picture.pitches[1:], strict=True):
                ctypes.memset(address, 128, pitch * -(-frame.height // (1 + (frame.sampling == "4:2:0"))))
        self.bytes.append(sum(end - start for start, end in places))
        places.sort()
        assert all(end <= start for (_, end), (start, _) in pairwise(places))
        return not self.refused & set(files)

    def wait(self) -> None:
        self.events.append("wait")


def grey(data: bytes) -> int:
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image.convert("L"))
    return int(np.bincount(pixels.ravel()).argmax())


def plain(value: int, height: int, width: int, sampling: str = "4:2:0") -> bytes:
    color = (value, value, value)
    if sampling == "gray":
        return encode(Image.new("L", (width, height), value), "JPEG", quality=100)
    return encode(Image.new("RGB", (width, height), color), "JPEG", quality=100, subsampling=sampling)


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> GpuJpegReader:
    monkeypatch.setattr(gpu_jpeg, "Decoder", GreyDecoder)
    monkeypatch.setattr(gpu_jpeg, "_SMALL", PlainFrame(16, 16, "4:2:0"))
    monkeypatch.setattr(gpu_jpeg, "_BATCHES", (1, 2, 4))
    monkeypatch.setattr(gpu_jpeg, "_BYTES_AT_ONCE", BYTES)
    monkeypatch.setattr(gpu_jpeg, "_PIXELS_CONVERTED", PIXELS)
    made = GpuJpegReader(config(), "cpu", ImageLimits())
    decoder(made).events.clear()
    decoder(made).batches.clear()
    decoder(made).bytes.clear()
    decoder(made).sizes.clear()
    begin = made._planes.data_ptr()
    decoder(made).memory = (begin, begin + len(made._planes))
    return made


def decoder(reader: GpuJpegReader) -> Any:
    return reader._decoder


def values(found: Sequence[gpu_jpeg.Decoded | None]) -> list[int | None]:
    """The grey of each picture."""
    for decoded in found:
        if decoded is not None:
            assert decoded.pixels.shape == (SIDE, SIDE, 3)
            assert len(np.unique(decoded.pixels)) == 1
    return [None if decoded is None else int(decoded.pixels[0, 0, 0]) for decoded in found]


def nothing_is_left(reader: GpuJpegReader) -> bool:
    return bool((reader._planes == gpu_jpeg._UNWRITTEN).all())


def test_every_file_gets_its_own_picture(reader: GpuJpegReader) -> None:
    """Sizes and samplings in any order, and files for the CPU among them, in batches of all lengths."""
    rng = np.random.default_rng(0)
    sizes = [(16, 16), (40, 24), (33, 47), (64, 64)]
    samplings = [*SAMPLINGS, "gray"]
    for count in (1, 2, 3, 5, 8, 13):
        files, expected, shapes = [], [], []
        for value in rng.integers(2, 255, count):
            size, sampling = sizes[rng.integers(4)], samplings[rng.integers(4)]
            files.append(plain(int(value), *size, sampling))
            expected.append(grey(files[-1]))
            shapes.append(size)
        files.insert(count // 2, encode(blocks(32, 32), "PNG"))
        found = reader(files)
        assert found.pop(count // 2) is None
        assert values(found) == expected
        assert [decoded.size for decoded in found if decoded] == shapes
        assert nothing_is_left(reader)


@pytest.mark.parametrize(("height", "width"), [(3024, 4032), (4032, 3024)])
def test_a_batch_holds_a_photograph_for_each_engine(height: int, width: int) -> None:
    layout = gpu_jpeg.lay_out(PlainFrame(height, width, "4:2:0"))
    files = [gpu_jpeg._File(layout, number, b"") for number in range(15)]
    assert [len(batch) for batch in gpu_jpeg._batches(files)] == [7, 7, 1]


@pytest.mark.parametrize(
    ("side", "sampling", "count", "batches"),
    [
        (16, "4:2:0", 11, [4, 4, 4]),
        (64, "gray", 5, [4, 2]),  # three have room at once, and the filler
        (64, "4:2:0", 5, [2, 2, 1]),
        (64, "4:2:2", 3, [1, 1, 1]),
        (64, "4:4:4", 3, [1, 1, 1]),
    ],
)
def test_batches_have_few_sizes_and_bounded_bytes(
    reader: GpuJpegReader, side: int, sampling: str, count: int, batches: list[int]
) -> None:
    assert values(reader([plain(9, side, side, sampling)] * count)) == [9] * count
    assert decoder(reader).batches == batches


def test_large_files_are_decoded_first(reader: GpuJpegReader) -> None:
    """Files of one frame follow each other, the filler comes last."""
    files = [plain(9, 16, 16), plain(9, 48, 48), plain(9, 16, 16), plain(9, 64, 64)]
    assert values(reader(files[:3])) == [9] * 3
    assert decoder(reader).sizes == [(48, 48), (16, 16), (16, 16), (16, 16)]
    assert values(reader(files)) == [9] * 4
    assert decoder(reader).sizes[4:] == [(64, 64), (48, 48), (16, 16), (16, 16)]


def test_no_batch_exceeds_its_memory(reader: GpuJpegReader) -> None:
    """The memory has room for the bytes of a batch, and for files that fill it up."""
    rng = np.random.default_rng(2)
    kinds = [
        plain(9, *size, sampling)
        for size in ((16, 16), (40, 24), (48, 64), (64, 64))
        for sampling in (*SAMPLINGS, "gray")
    ]
    for count in rng.integers(1, 20, 8):
        reader([kinds[kind] for kind in rng.integers(0, len(kinds), count)])
    assert len(reader._planes) == BYTES + 4 * FILLER
    # A batch of three or more is at most a file short.
    for size, taken in zip(decoder(reader).batches, decoder(reader).bytes, strict=True):
        assert taken <= BYTES + (FILLER if size > 2 else 0)


def test_converts_few_pixels_at_once(reader: GpuJpegReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture of any size, or several whose RGB needs little memory."""
    convert, shapes = gpu_jpeg.to_rgb, []

    def logged(planes: torch.Tensor, layout: gpu_jpeg.Layout) -> Any:
        shapes.append((len(planes), *layout.frame[:2]))
        return convert(planes, layout)

    monkeypatch.setattr(gpu_jpeg, "to_rgb", logged)
    assert values(reader([plain(value, 24, 32) for value in (10, 30, 50, 70)])) == [10, 30, 50, 70]
    assert values(reader([plain(value, 64, 64) for value in (20, 40)])) == [20, 40]
    assert shapes == [(2, 24, 32), (2, 24, 32), (1, 64, 64), (1, 64, 64)]


def test_waits_between_kernels_and_the_next_decoding(
    reader: GpuJpegReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between kernels and the next decoding, and before the answer."""
    convert = gpu_jpeg.to_rgb

    def logged(*given: Any) -> Any:
        decoder(reader).events.append("kernels")
        return convert(*given)

    monkeypatch.setattr(gpu_jpeg, "to_rgb", logged)
    reader([plain(50, 16, 16), plain(60, 48, 48), plain(70, 16, 16), plain(80, 64, 64), plain(90, 64, 64)])
    events = decoder(reader).events
    busy = [event for event in events if event != "wait"]
    assert busy[0] == "decode"
    assert busy.count("decode") == 2
    assert busy.count("kernels") == 4
    for before, after in pairwise(events):
        assert after != "decode" or before == "wait"
    assert events[-1] == "wait"


def test_reads_the_other_files_of_a_refused_batch(reader: GpuJpegReader) -> None:
    files = [plain(value, 16, 32) for value in range(20, 90, 10)]
    expected: list[int | None] = [grey(file) for file in files]
    decoder(reader).refused = {files[2]}
    expected[2] = None
    assert values(reader(files)) == expected
    assert nothing_is_left(reader)


@pytest.mark.parametrize("side", [16, 24, 64])
def test_skipped_file_does_not_show_another_picture(reader: GpuJpegReader, side: int) -> None:
    """In any place of a batch, and of those that are converted together."""
    greys = [30, 60, 90, 120, 150]
    files = [plain(value, side, side) for value in greys]
    reader(files)
    for gap in (0, 1, 4):
        decoder(reader).skipped = {files[gap]}
        expected = [None if place == gap else value for place, value in enumerate(greys)]
        assert values(reader(files)) == expected


def test_leaves_files_to_the_cpu_where_the_library_disagrees(reader: GpuJpegReader) -> None:
    files = [plain(value, 32, 32) for value in (30, 60)]
    decoder(reader).unknown = {files[0]}
    assert values(reader(files)) == [None, 60]


def test_leaves_large_files_to_the_cpu(reader: GpuJpegReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_jpeg, "_LONGEST_SIDE", 40)
    assert values(reader([plain(9, 41, 20), plain(9, 40, 20)])) == [None, 9]
    monkeypatch.setattr(reader, "_limits", ImageLimits(max_pixels=500))
    assert values(reader([plain(9, 40, 20), plain(9, 20, 20)])) == [None, 9]


def test_leaves_files_that_are_cropped_first_to_the_cpu(reader: GpuJpegReader) -> None:
    reader._image = config(shortest_edge=SIDE)
    assert values(reader([plain(9, 16, 257), plain(9, 16, 256)])) == [None, 9]


def test_works_after_the_device_ran_out_of_memory(
    reader: GpuJpegReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(gpu_jpeg, "resize", fails)
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            reader([plain(9, 32, 32)])
    assert nothing_is_left(reader)
    assert decoder(reader).events[-1] == "wait"
    assert values(reader([plain(8, 32, 32)])) == [8]


def test_refuses_a_decoder_that_cannot_read_a_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind(GreyDecoder):
        def agrees(self, data: bytes, frame: PlainFrame) -> bool:
            return frame.sampling != "4:2:2" and super().agrees(data, frame)

    monkeypatch.setattr(gpu_jpeg, "Decoder", Blind)
    monkeypatch.setattr(gpu_jpeg, "_BATCHES", (1,))
    monkeypatch.setattr(gpu_jpeg, "_BYTES_AT_ONCE", BYTES)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    with pytest.raises(SettingsError, match="the JPEG decoder of a GPU does not read a picture of 4:2:2"):
        GpuJpegReader(config(), "cpu", ImageLimits())


def test_refuses_a_cpu() -> None:
    with pytest.raises(SettingsError, match="runs on the CPU"):
        GpuJpegReader(config(), "cpu", ImageLimits())
