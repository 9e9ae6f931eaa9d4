"""Process that decodes the image files which another process would not risk: `watched` starts and ends it.

It loads the libraries once and forks a decoder. When that was killed, it forks the next one. The socket whose
descriptor is the first argument gives the process id and the socket of each decoder. There a request is a
JSON line and the file. The answer is a JSON line, with the pixels as a memory file where there are any.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import AvifImagePlugin, Image

from siglip_serve.errors import InvalidInputError
from siglip_serve.images.decode import decode_file
from siglip_serve.images.formats import ImageLimits
from siglip_serve.images.resize import Pixels

__all__ = ["main"]

_GRACE = 2  # seconds after which the system ends this process, if its parent could not


class _Sheet:
    """Memory of the pixels that another process can map."""

    def __init__(self) -> None:
        self.file = -1

    def __call__(self, shape: tuple[int, int, int], /, *, dtype: type[np.uint8]) -> Pixels:
        """Return an array in a new memory file. It replaces the one before."""
        self.close()
        self.file = os.memfd_create("pixels", os.MFD_CLOEXEC)
        size = int(np.prod(shape))
        os.ftruncate(self.file, size)
        return np.frombuffer(mmap.mmap(self.file, size), dtype).reshape(shape)

    def close(self) -> None:
        """Give the memory file back. The other process keeps what it has mapped."""
        if self.file >= 0:
            os.close(self.file)
        self.file = -1


def main(descriptor: int) -> None:
    """Fork one decoder after the other, until one ends because the other end of its socket is closed."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Image.MAX_IMAGE_PIXELS = None  # our own limit stands in its place, at the same point: the header
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    with socket.socket(fileno=descriptor) as control:
        while os.waitpid(_fork(control), 0)[1]:
            pass


def _fork(control: socket.socket) -> int:
    """Start a decoder, tell the other end of `control`, and return the process id."""
    theirs, ours = socket.socketpair()
    process = os.fork()
    if not process:
        status = 1
        try:
            control.close()
            theirs.close()
            _serve(ours)
            status = 0
        finally:
            os._exit(status)
    with theirs, ours, suppress(OSError):  # without the other end, the decoder finds its socket closed
        _reply(control, {"pid": process}, theirs.fileno())
    return process


def _serve(channel: socket.socket) -> None:
    """Answer requests until the other end of the socket is closed."""
    base = _virtual_memory()
    with channel, channel.makefile("rb") as source:
        while request := _read_line(source):
            limits = ImageLimits(**request["limits"])
            _limit(base, limits)
            data = source.read(request["size"])
            sheet = _Sheet()
            begin = time.process_time()
            answer = _decode(data, request, limits, sheet)
            answer["seconds"] = time.process_time() - begin
            _reply(channel, answer, sheet.file if "shape" in answer else -1)
            sheet.close()
            del data


def _read_line(source: IO[bytes]) -> dict[str, Any]:
    """Read a message, empty at the end."""
    line = source.readline()
    return dict(json.loads(line)) if line.endswith(b"\n") else {}


def _decode(data: bytes, request: dict[str, Any], limits: ImageLimits, sheet: _Sheet) -> dict[str, Any]:
    kind, mode, color = request["kind"], request["mode"], request["color"]
    try:
        shape = decode_file(data, kind, mode, limits, canvas=sheet, color=color).shape
    except InvalidInputError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"shape": shape}


def _limit(base: int, limits: ImageLimits) -> None:
    space = base + limits.max_memory
    resource.setrlimit(resource.RLIMIT_AS, (space, resource.RLIM_INFINITY))
    seconds = int(time.process_time() + 2 * limits.max_seconds) + _GRACE
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))


def _virtual_memory() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * mmap.PAGESIZE


def _reply(channel: socket.socket, answer: dict[str, Any], file: int) -> None:
    line = json.dumps(answer).encode() + b"\n"
    files = [file] if file >= 0 else []
    socket.send_fds(channel, [line], files)


if __name__ == "__main__":
    main(int(sys.argv[1]))
