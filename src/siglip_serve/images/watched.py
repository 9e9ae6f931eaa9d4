"""Decoding in a process of its own, which is ended when a file takes too long.

A decoder is one call of a C library, which nothing interrupts within the process. Memory is limited there as
well. The next decoder is a fork of a process that has loaded the libraries, which takes a millisecond instead
of half a second.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from siglip_serve import errors
from siglip_serve.config import Color
from siglip_serve.errors import ImageCostError, ImageError
from siglip_serve.images import decoder_process
from siglip_serve.images.formats import ImageLimits
from siglip_serve.images.resize import Mode, Pixels

__all__ = ["Watch", "WatchedDecoder"]

# Called with the CPU seconds that a decode has taken, and with True at its end. What it raises during the
# decode ends it.
Watch = Callable[[float, bool], None]

_INTERVAL = 0.02  # seconds between two looks at the process
_DECODING = 0.75  # part of the CPU time of an image; the rest is for checks, copies and late looks
# Seconds per pixel that the image then takes in the caller's process.
_RESIZE = {"fast": 3e-9, "pil": 13e-9}
_PATIENCE = 10.0  # seconds, and as many times the CPU time: a process that takes longer is stuck
_START = 60.0  # seconds in which the process is ready, on a busy machine
_LONGEST_LINE = 65_536
_ATTEMPTS = 3  # a process that was killed from outside is replaced, and so is its parent


class WatchedDecoder:
    """Decodes in a process that starts with the first file and stays. Safe to call from several threads.

    Args:
        mode: how to decode.
        limits: of one image. `max_seconds` and `max_memory` are held by ending the process.
        color: as for `decode_file`.
    """

    def __init__(self, mode: Mode, limits: ImageLimits, color: Color = "stored") -> None:
        self._how = {"mode": mode, "color": color}
        self._limits = limits
        self._lock = threading.Lock()
        self._process: _Process | None = None

    def __call__(self, data: bytes, kind: str, watch: Watch | None = None) -> Pixels:
        """Decode a file.

        Args:
            data: the file.
            kind: name of its format.
            watch: called about 50 times a second, and at the end.

        Returns:
            uint8 RGB `[H, W, 3]`, upright.

        Raises:
            ImageError: not a decodable image.
            ImageTooLargeError: more pixels than allowed.
            ImageCostError: it takes more CPU time or memory than allowed.
        """
        with self._lock:
            for _ in range(_ATTEMPTS):
                if self._process is None or self._process.owner != os.getpid():
                    self._process = _Process()
                try:
                    return self._process.decode(data, kind, self._how, self._limits, watch)
                except _DeadError:
                    self._process = self._process.renewed()
                except _AnsweredError as answered:
                    raise answered.error from None
                except BaseException:  # it still decodes
                    self._process = self._process.renewed()
                    raise
        raise ImageError(f"broken {kind}: its decoder crashed")

    def close(self) -> None:
        """End the process. The next file would start another."""
        with self._lock:
            if self._process is not None:
                self._process.end()
                self._process = None

    def __del__(self) -> None:
        process = getattr(self, "_process", None)
        if process is not None and process.owner == os.getpid():
            process.end()


class _DeadError(Exception):
    """The process has ended without an answer."""


class _AnsweredError(Exception):
    """The process has refused the file, and can go on."""

    def __init__(self, error: errors.InvalidInputError) -> None:
        super().__init__(str(error))
        self.error = error


class _Process:
    """A process that forks decoders, one at a time, and the socket to the present one.

    Attributes:
        owner: id of the process that has started it.
        decoder: id of the present decoder, 0 if none has been needed yet.
    """

    def __init__(self) -> None:
        self.owner, self.decoder = os.getpid(), 0
        self._control, theirs = socket.socketpair()
        self._channel: socket.socket | None = None
        environment = {
            **os.environ,
            # Modules come from where this process has them, which Triton arranges.
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", decoder_process.__name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the server, which ends it when its work is done
            )

    def decode(
        self, data: bytes, kind: str, how: Mapping[str, str], limits: ImageLimits, watch: Watch | None
    ) -> Pixels:
        channel = self._channel or self._meet()
        request = {"kind": kind, **how, "size": len(data), "limits": dataclasses.asdict(limits)}
        begin = self._cpu_seconds()
        longest = _PATIENCE * (1 + limits.max_seconds)
        channel.settimeout(longest)
        try:
            channel.sendall(json.dumps(request).encode() + b"\n")
            channel.sendall(data)
        except OSError as error:
            raise _DeadError from error
        self._wait(channel, kind, begin, limits, time.monotonic() + longest, watch)
        answer, files = _receive(channel)
        if "error" in answer:
            raise _AnsweredError(getattr(errors, answer["error"])(answer["message"]))
        pixels = _pixels(answer["shape"], files)
        _check_time(kind, pixels, answer["seconds"] + pixels[..., 0].size * _RESIZE[how["mode"]], limits)
        if watch is not None:
            watch(float(answer["seconds"]), True)
        return pixels

    def renewed(self) -> _Process:
        """End the decoder, and return a process with another one."""
        if self._channel is None or self._process.poll() is not None:
            self.end()
            return _Process()
        self._end_decoder()
        return self

    def end(self) -> None:
        """Kill the processes and wait until the first is gone."""
        self._control.close()
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._end_decoder()

    def _meet(self) -> socket.socket:
        """Wait for the next decoder."""
        self._control.settimeout(_START)
        answer, files = _receive(self._control)
        self.decoder = answer["pid"]
        self._channel = socket.socket(fileno=files[0])
        return self._channel

    def _end_decoder(self) -> None:
        if self._channel is not None:
            # It is killed first, since the end of its channel would end the other process too.
            with suppress(ProcessLookupError):
                os.kill(self.decoder, signal.SIGKILL)
            self._channel.close()
            self._channel = None

    def _wait(
        self,
        channel: socket.socket,
        kind: str,
        begin: float,
        limits: ImageLimits,
        until: float,
        watch: Watch | None,
    ) -> None:
        """Wait for an answer, or raise what ends the wait."""
        poll = select.poll()
        poll.register(channel, select.POLLIN)
        most = _DECODING * limits.max_seconds
        while not poll.poll(1000 * _INTERVAL):
            seconds = self._cpu_seconds() - begin
            if seconds > most or time.monotonic() > until:
                raise ImageCostError(
                    f"{kind} takes more than {most:g} s of CPU time to decode, expected less"
                )
            if watch is not None:
                watch(seconds, False)

    def _cpu_seconds(self) -> float:
        # The clock of another process's CPU time, as clock_getcpuclockid of the C library gives it.
        try:
            return time.clock_gettime(~self.decoder << 3 | 2)
        except OSError as error:
            raise _DeadError from error


def _receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]]:
    try:
        line, files, _, _ = socket.recv_fds(channel, _LONGEST_LINE, 1)
    except OSError as error:
        raise _DeadError from error
    if not line.endswith(b"\n"):
        for file in files:
            os.close(file)
        raise _DeadError
    return json.loads(line), files


def _check_time(kind: str, pixels: Pixels, seconds: float, limits: ImageLimits) -> None:
    height, width, _ = pixels.shape
    if seconds > limits.max_seconds:
        message = f"{kind} of {width}x{height} pixels takes {seconds:.1f} s of CPU time"
        raise _AnsweredError(ImageCostError(f"{message}, at most {limits.max_seconds:g} are allowed"))


def _pixels(shape: tuple[int, int, int], files: list[int]) -> Pixels:
    """Map the memory file of the pixels, which stays as long as the array."""
    (file,) = files
    try:
        memory = mmap.mmap(file, int(np.prod(shape)))
    finally:
        os.close(file)
    return np.frombuffer(memory, np.uint8).reshape(shape)
