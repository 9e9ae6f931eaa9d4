"""CPU time of a request: what its bytes explain is free, and few requests may take much more."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton_module

from siglip_serve.engine.turns import Places
from siglip_serve.errors import ImageCostError, ImageError, UnavailableError


@pytest.fixture(scope="module")
def serving() -> Iterator[Any]:
    """The modules that need Triton's."""
    with triton_module.installed():
        from siglip_serve.serving import decode_budget

        yield decode_budget


def budget(serving: Any, places: Any, alone: bool = False) -> Any:
    return serving.DecodeBudget(places, alone, quick=0.5, image=2.0)


@pytest.fixture
def one_place(tmp_path: Path) -> Iterator[Places]:
    """A place that no one has."""
    places = Places("x", 1, tmp_path)
    yield places
    places.close()


def no_place() -> Places:
    return Places("", 0)


def spend(made: Any, seconds: float, size: int = 0) -> None:
    """Let another process take some seconds for an image."""
    made.next_image(size)
    made.watch(seconds, True)


def test_a_quick_request_needs_no_place(serving: Any) -> None:
    with budget(serving, no_place()) as made:
        for _ in range(100):
            spend(made, 0.005)
        made.next_image(0)


def test_time_that_bytes_explain_is_free(serving: Any) -> None:
    with budget(serving, no_place()) as made:
        for _ in range(128):  # photographs of 12 megapixels
            spend(made, 0.1, 3_000_000)
        made.next_image(0)


def test_bytes_of_one_image_explain_no_other(serving: Any) -> None:
    with budget(serving, no_place()) as made:
        spend(made, 0.0, 30_000_000)
        made.next_image(0)
        with pytest.raises(UnavailableError, match=r"has taken 0\.6 s of CPU time more than the bytes"):
            made.watch(0.6, False)


def test_counts_the_time_of_this_process(serving: Any) -> None:
    with serving.DecodeBudget(no_place(), False, quick=0.05, image=2.0) as made:
        made.next_image(0)
        end = time.thread_time() + 0.1
        while time.thread_time() < end:
            pass
        with pytest.raises(UnavailableError):
            made.next_image(0)


def test_a_slow_request_without_a_place_is_told_to_come_again(serving: Any) -> None:
    with budget(serving, no_place()) as made:
        spend(made, 0.3)
        spend(made, 0.3)
        with pytest.raises(UnavailableError, match="try again later, or send fewer such images"):
            made.next_image(0)


def test_a_slow_request_with_a_place_continues_up_to_its_end(serving: Any, one_place: Places) -> None:
    with budget(serving, one_place) as made:
        for _ in range(19):
            spend(made, 1.54, 1_000_000)
        made.next_image(1_000_000)
        made.watch(1.0, False)
        with pytest.raises(ImageCostError, match="at most 30 s are allowed; send fewer"):
            made.watch(2.0, False)


def test_a_request_brings_few_pictures_that_are_all_but_blank(serving: Any, one_place: Places) -> None:
    with budget(serving, one_place) as made:
        for _ in range(3):
            spend(made, 0.4, 5_000)
        made.next_image(5_000)
        made.watch(0.2, False)
        with pytest.raises(ImageCostError, match=r"has taken 1\.6 s .* at most 1\.5 s are allowed"):
            made.watch(0.4, False)


def test_one_blank_picture_has_only_the_limit_of_an_image(serving: Any, one_place: Places) -> None:
    with budget(serving, one_place) as made:
        made.next_image(100)
        made.watch(1.9, False)


def test_gives_its_place_back(serving: Any, tmp_path: Path) -> None:
    taken = []

    class Counting(Places):
        def take(self) -> bool:
            taken.append("take")
            return super().take()

        def leave(self) -> None:
            taken.append("leave")
            super().leave()

    places = Counting("y", 1, tmp_path)
    for _ in range(2):
        with budget(serving, places) as made:
            spend(made, 1.0)
            made.next_image(0)
    with budget(serving, places) as made:
        made.next_image(0)
    assert taken == ["take", "leave"] * 2
    places.close()


def test_a_model_of_one_process_serves_as_much_as_one_image_may_take(serving: Any) -> None:
    with budget(serving, no_place(), alone=True) as made:
        spend(made, 1.94, 1_000_000)
        made.next_image(0)
        with pytest.raises(ImageCostError, match="at most 2 s are allowed"):
            made.watch(0.2, False)


def test_a_finished_image_is_not_refused(serving: Any) -> None:
    with budget(serving, no_place()) as made:
        spend(made, 1.0)


PEER = """
import sys
from pathlib import Path
from siglip_serve.engine.turns import Places
places = Places("x", 2, Path(sys.argv[1]))
print(places.take(), flush=True)
sys.stdin.read()
places.close()
"""


def test_processes_share_places(tmp_path: Path) -> None:
    places = Places("x", 2, tmp_path)
    assert places.take()
    answers, peers = [], []
    for _ in range(3):
        command = [sys.executable, "-c", PEER, str(tmp_path)]
        peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert peer.stdout is not None
        answers.append(peer.stdout.readline().strip())
        peers.append(peer)
        if len(peers) == 2:
            places.leave()
    assert answers == ["True", "False", "True"]
    for peer in peers:
        peer.communicate()
    places.close()
    assert not list(tmp_path.iterdir())


def test_no_row_is_computed_after_one_that_costs_too_much() -> None:
    from siglip_serve.serving.rows import map_rows

    computed = []

    def row(number: int) -> Any:
        computed.append(number)
        if number == 1:
            raise ImageError("broken")
        if number == 3:
            raise ImageCostError("takes too long")
        return np.zeros(1)

    with pytest.raises(ImageCostError, match=r"^ROWS\[3\]: takes too long$"):
        map_rows("ROWS", range(9), row)
    assert computed == [0, 1, 2, 3]
