"""Decoding in a process that is ended: what costs too much is refused, and the next file is read."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import images
import numpy as np
import psutil
import pytest
from PIL import Image
from processes import still_running

from siglip_serve.errors import ImageCostError, ImageError, UnavailableError
from siglip_serve.images import watched
from siglip_serve.images.decode import decode_file
from siglip_serve.images.formats import ImageLimits
from siglip_serve.images.watched import WatchedDecoder

LIMITS = ImageLimits(max_seconds=0.4)
GIF = images.encode(images.photo(60, 40), "GIF")


def endless() -> bytes:
    """A run-length BMP whose runs of no pixels take long: each is a step in Python."""
    runs = b"\1\1" + b"\0\2\0\0" * 8_000_000
    head = b"BM" + struct.pack("<IHHI", 54 + 1024 + len(runs), 0, 0, 54 + 1024)
    return head + struct.pack("<IiiHHIIiiII", 40, 9, 9, 1, 8, 1, len(runs), 0, 0, 256, 0) + bytes(1024) + runs


ENDLESS = endless()


@pytest.fixture
def decoder() -> Iterator[WatchedDecoder]:
    """A decoder of little patience."""
    made = WatchedDecoder("pil", LIMITS)
    yield made
    made.close()


def child(decoder: WatchedDecoder) -> psutil.Process:
    """The process that decodes."""
    assert decoder._process is not None
    return psutil.Process(decoder._process.decoder)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP", "BMP"])
def test_gives_the_pixels_that_the_process_itself_would_give(decoder: WatchedDecoder, kind: str) -> None:
    data = images.encode(images.photo(60, 40), kind)
    name = "WebP" if kind == "WEBP" else kind
    pixels = decoder(data, name)
    np.testing.assert_array_equal(pixels, decode_file(data, name, "pil", LIMITS))
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous


def test_pixels_stay_when_the_next_file_is_decoded(decoder: WatchedDecoder) -> None:
    first = decoder(GIF, "GIF")
    kept = first.copy()
    decoder(images.encode(images.photo(60, 40, seed=5), "GIF"), "GIF")
    decoder.close()
    np.testing.assert_array_equal(first, kept)


def test_ends_a_decode_that_takes_too_long_and_reads_the_next_file(decoder: WatchedDecoder) -> None:
    decoder(GIF, "GIF")
    before = child(decoder)
    parent = before.parent()
    begin = time.process_time()
    with pytest.raises(ImageCostError, match=r"BMP takes more than 0\.3 s of CPU time to decode"):
        decoder(ENDLESS, "BMP")
    assert time.process_time() - begin < 1
    assert decoder(GIF, "GIF").shape == (40, 60, 3)
    assert child(decoder).pid != before.pid
    assert child(decoder).parent() == parent  # the libraries are not loaded again


def test_refuses_what_needs_too_much_memory_and_reads_the_next_file() -> None:
    decoder = WatchedDecoder("pil", ImageLimits(max_memory=60_000_000))
    large = images.encode(Image.new("RGB", (4000, 3000), (1, 2, 3)), "PNG")
    with pytest.raises(ImageCostError, match="PNG needs too much memory, at most 60 MB are allowed"):
        decoder(large, "PNG")
    assert decoder(GIF, "GIF").shape == (40, 60, 3)
    decoder.close()


def test_counts_the_time_that_the_resize_will_take(
    decoder: WatchedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(watched._RESIZE, "pil", 0.5 / (60 * 40))
    with pytest.raises(ImageCostError, match=r"GIF of 60x40 pixels takes 0\.5 s of CPU time, at most 0\.4"):
        decoder(GIF, "GIF")
    monkeypatch.undo()
    assert decoder(GIF, "GIF").shape == (40, 60, 3)


def test_passes_on_why_a_file_is_refused(decoder: WatchedDecoder) -> None:
    with pytest.raises(ImageError, match=r"^truncated GIF|^broken GIF"):
        decoder(GIF[:200], "GIF")
    with pytest.raises(ImageError, match=r"^broken GIF: the header of its 6 bytes cannot be read$"):
        decoder(GIF[:6], "GIF")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_replaces_a_process_that_died(decoder: WatchedDecoder, number: signal.Signals) -> None:
    expected = decoder(GIF, "GIF")
    os.kill(child(decoder).pid, number)
    np.testing.assert_array_equal(decoder(GIF, "GIF"), expected)


def test_the_caller_can_end_a_decode(decoder: WatchedDecoder) -> None:
    seen = []

    def watch(seconds: float, done: bool) -> None:
        seen.append((seconds, done))
        if seconds > 0.1:
            raise UnavailableError("enough")

    with pytest.raises(UnavailableError, match="enough"):
        decoder(ENDLESS, "BMP", watch)
    assert not any(done for _, done in seen)
    assert decoder(GIF, "GIF").shape == (40, 60, 3)


def test_tells_the_caller_how_long_a_file_took(decoder: WatchedDecoder) -> None:
    seen: list[tuple[float, bool]] = []
    decoder(images.encode(images.photo(900, 600), "TIFF"), "TIFF", lambda *known: seen.append(known))
    seconds, done = seen[-1]
    assert done
    assert 0 < seconds < LIMITS.max_seconds


def test_threads_share_a_process(decoder: WatchedDecoder) -> None:
    files = [images.encode(images.photo(60, 40, seed), "GIF") for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda data: decoder(data, "GIF"), files))
    for data, pixels in zip(files, results, strict=True):
        np.testing.assert_array_equal(pixels, decode_file(data, "GIF", "pil", LIMITS))
    assert still_running([child(decoder)])


def test_the_processes_end_with_their_decoder() -> None:
    decoder = WatchedDecoder("pil", LIMITS)
    decoder(GIF, "GIF")
    processes = [child(decoder), *child(decoder).parents()[:1]]
    del decoder
    assert not still_running(processes, timeout=10)


def test_replaces_the_process_that_forks(decoder: WatchedDecoder) -> None:
    decoder(GIF, "GIF")
    for process in (child(decoder).parent(), child(decoder)):
        assert process is not None
        process.kill()
    assert decoder(GIF, "GIF").shape == (40, 60, 3)


def test_the_processes_end_when_their_owner_is_killed() -> None:
    program = (
        "import os, sys; from siglip_serve.images.watched import WatchedDecoder, ImageLimits;"
        "decoder = WatchedDecoder('pil', ImageLimits()); decoder(sys.stdin.buffer.read(), 'GIF');"
        "print(decoder._process.decoder, decoder._process._process.pid, flush=True);"
        "os.kill(os.getpid(), 9)"
    )
    found = subprocess.run([sys.executable, "-c", program], input=GIF, stdout=subprocess.PIPE, check=False)
    processes = []
    for number in found.stdout.split():
        with suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(int(number)))
    assert found.stdout
    assert not still_running(processes, timeout=10)
