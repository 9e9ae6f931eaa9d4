"""CPU time that decoding the images of one request may take, so that other callers need not wait for it.

A decoder answers one request at a time. Time that the bytes of a request explain is not counted, as a batch
of photographs has to be read. Time that small files take is counted, and a request with much of it is slow.
One decoder of a model is always kept free of slow requests.
"""

from __future__ import annotations

import math
import time

from siglip_serve.engine.turns import Places
from siglip_serve.errors import ImageCostError, UnavailableError

__all__ = ["DecodeBudget"]

# Photographs of 0.2 to 12 megapixels take 15 to 35 ns per byte, small ones 1 to 2 ms.
_SECONDS_PER_IMAGE = 0.001
_SECONDS_PER_BYTE = 40e-9
_SLOW_IMAGES = 15  # a slow request may take as long as this many of the costliest images
# A picture that takes longer for its bytes is all but blank, or made to cost. A request may bring few such.
_SECONDS_PER_BLANK_BYTE = 3e-6
_BLANK_IMAGES = 0.75


class DecodeBudget:
    """Counts the CPU time of a request, image by image. Used as a context, in the thread that decodes.

    Args:
        places: one for each slow request that may run at the same time.
        alone: the model has one process. All callers wait for it, so no request may be slow for long.
        quick: seconds that a request may take before it is slow.
        image: seconds that one image may take.
    """

    def __init__(self, places: Places, alone: bool, quick: float, image: float) -> None:
        self._places = places
        self._alone = alone
        self._quick = quick
        self._most = image if alone else _SLOW_IMAGES * image
        self._most_blank = _BLANK_IMAGES * image
        self._spent = 0.0
        self._blank = 0.0  # part of it for pictures that are all but blank
        self._begin = time.thread_time()
        self._elsewhere = 0.0  # seconds of another process for the current image
        self._explained = math.inf  # before the first image
        self._size = 0
        self._slow = False

    def __enter__(self) -> DecodeBudget:
        return self

    def __exit__(self, *_: object) -> None:
        if self._slow:
            self._places.leave()

    def next_image(self, size: int) -> None:
        """Count the image before, and begin one of `size` bytes.

        Raises:
            ImageCostError: the request has taken more time than any may.
            UnavailableError: it is slow, and no more decoders may work on slow requests.
        """
        current = self._current()
        self._spent += current
        self._blank += self._blank_part(current)
        self._begin = time.thread_time()
        self._elsewhere = 0.0
        self._size = size
        self._explained = _SECONDS_PER_IMAGE + size * _SECONDS_PER_BYTE
        self._check(0.0)

    def watch(self, seconds: float, done: bool) -> None:
        """Note that another process has spent `seconds` on the current image.

        Raises as `next_image` does, but not when the image is done.
        """
        self._elsewhere = seconds
        if not done:
            self._check(self._current())

    def _current(self) -> float:
        return max(0.0, time.thread_time() - self._begin + self._elsewhere - self._explained)

    def _blank_part(self, current: float) -> float:
        return current if current > self._size * _SECONDS_PER_BLANK_BYTE else 0.0

    def _check(self, current: float) -> None:
        """Refuse the request if it has taken too long, `current` seconds for the current image included."""
        seconds, blank = self._spent + current, self._blank + self._blank_part(current)
        most, over = self._most, seconds > self._most
        if blank > self._most_blank and self._blank:  # the image alone has a limit of its own
            seconds, most, over = blank, self._most_blank, True
        if not over and (seconds <= self._quick or self._slow):
            return
        taken = f"decoding has taken {seconds:.1f} s of CPU time more than the bytes of this request explain"
        if over:
            raise ImageCostError(
                f"{taken}, at most {most:g} s are allowed; send fewer such images in one request"
            )
        self._slow = self._alone or self._places.take()
        if not self._slow:
            raise UnavailableError(
                f"{taken}, and the server is busy with other such requests; try again later, or send fewer "
                "such images in one request"
            )
