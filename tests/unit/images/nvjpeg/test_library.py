"""Test what nvJPEG is asked to do, on a library that stands for it."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from siglip_serve.images.jpeg import PlainFrame
from siglip_serve.images.nvjpeg.library import Decoder, Picture


class Library:
    """Stands for nvJPEG: writes down what it is asked to do, and reads what it is given."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.status = 0
        self.info = (3, 2, 70, 50)

    def nvjpegJpegStateCreate(self, _handle: Any, state: Any) -> int:  # noqa: N802
        state._obj.value = 1 + sum(entry[0] == "prepare" for entry in self.log)
        return 0

    def nvjpegDecodeBatchedInitialize(self, _handle: Any, state: Any, batch: int, *_: Any) -> int:  # noqa: N802
        self.log.append(("prepare", state.value, batch))
        return 0

    def nvjpegDecodeBatched(self, _handle: Any, state: Any, *given: Any) -> int:  # noqa: N802
        data, lengths, images, _ = given
        files = [ctypes.string_at(*pair) for pair in zip(pointers(data), lengths, strict=True)]
        planes = [(list(image.channel), list(image.pitch)) for image in images]
        self.log.append(("decode", state.value, files, planes))
        return self.status

    def nvjpegJpegStateDestroy(self, state: Any) -> int:  # noqa: N802
        self.log.append(("destroy", state.value))
        return 0

    def nvjpegGetImageInfo(self, _handle: Any, _data: bytes, _length: Any, *found: Any) -> int:  # noqa: N802
        components, subsampling, widths, heights = found
        components._obj.value, subsampling._obj.value, widths[0], heights[0] = self.info
        return self.status


def pointers(array: Any) -> list[int]:
    return list(ctypes.cast(array, ctypes.POINTER(ctypes.c_void_p))[: len(array)])


class QuietDecoder(Decoder):
    """The decoder's own code on a library that stands for nvJPEG."""

    def __init__(self, library: Library) -> None:
        self._library, self._handle = library, ctypes.c_void_p(1)
        self._states, self._device = {}, torch.device("cpu")

    def wait(self) -> None:
        self._library.log.append(("wait",))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    class Stream:
        cuda_stream = 0

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: Stream())
    return Library()


def test_the_host_waits_before_and_after_the_decoder(library: Library) -> None:
    """The files reach it whole, zeros in them included, and each size of a batch has a state of its own."""
    quiet = QuietDecoder(library)
    files = [b"a\0b", b"cd"]
    pictures = [Picture((1000, 2000, 3000), (64, 32, 32)), Picture((4000,), (16,))]
    assert quiet.decode(files, pictures)
    planes = [([1000, 2000, 3000, None], [64, 32, 32, 0]), ([4000, None, None, None], [16, 0, 0, 0])]
    decoded = ("decode", 1, files, planes)
    assert library.log == [("prepare", 1, 2), ("wait",), decoded, ("wait",)]
    library.log.clear()
    assert quiet.decode(files, pictures)
    assert library.log == [("wait",), decoded, ("wait",)]
    assert quiet.decode(files[:1], pictures[:1])
    assert library.log[3] == ("prepare", 1, 1)


def test_discards_the_state_of_a_refused_batch(library: Library) -> None:
    quiet = QuietDecoder(library)
    library.status = 6
    assert not quiet.decode([b"a"], [Picture((1000,), (16,))])
    assert library.log[-2:] == [("wait",), ("destroy", 1)]
    library.status = 0
    assert quiet.decode([b"a"], [Picture((1000,), (16,))])
    assert library.log[5] == ("prepare", 2, 1)


def test_library_must_agree_on_the_frame(library: Library) -> None:
    quiet = QuietDecoder(library)
    assert quiet.agrees(b"", PlainFrame(50, 70, "4:2:0"))
    assert not quiet.agrees(b"", PlainFrame(50, 71, "4:2:0"))
    assert not quiet.agrees(b"", PlainFrame(49, 70, "4:2:0"))
    assert not quiet.agrees(b"", PlainFrame(50, 70, "4:2:2"))
    assert not quiet.agrees(b"", PlainFrame(50, 70, "gray"))
    library.status = 3
    assert not quiet.agrees(b"", PlainFrame(50, 70, "4:2:0"))
