from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from validate.embeddings import Cache, embed_all, file_key
from validate.errors import CacheError, RefusedError, ServerError

IDENTITY = {"checkpoint": "tiny", "model": "embed_text"}
PROBE = np.array([1.0, 2.0], dtype=np.float32)


class Embedder:
    """Embeds a number n as [n, n + 1]. It counts its calls, refuses negative numbers, and fails at 1000."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self._lock = threading.Lock()

    def __call__(self, numbers: list[int]) -> NDArray[np.float32]:
        if 1000 in numbers:
            raise ServerError("the server died")
        bad = [index for index, number in enumerate(numbers) if number < 0]
        if bad:
            raise RefusedError(f"INPUT[{bad[0]}]: negative")
        with self._lock:
            self.asked += numbers
        return np.array([[number, number + 1] for number in numbers], dtype=np.float32)


def items(*numbers: int) -> list[tuple[str, int]]:
    return [(f"number\n{number}", number) for number in numbers]


def keys(*numbers: int) -> list[str]:
    return [key for key, _ in items(*numbers)]


def test_embeds_each_item_once_and_keeps_it(tmp_path: Path) -> None:
    embedder = Embedder()
    wanted = items(*range(50), 3, 3)
    with Cache(tmp_path, IDENTITY, PROBE) as cache:
        result = embed_all(wanted, cache, embedder, batch=7, concurrency=3, label="test")
    assert result.embedded == 50
    assert sorted(embedder.asked) == list(range(50))
    with Cache(tmp_path, IDENTITY, PROBE) as cache:
        assert embed_all(wanted, cache, embedder, batch=7, concurrency=3, label="test").embedded == 0
        assert cache.get(keys(49, 0)).tolist() == [[49, 50], [0, 1]]
    assert len(embedder.asked) == 50


def test_keeps_results_from_before_a_failure(tmp_path: Path) -> None:
    embedder = Embedder()
    with Cache(tmp_path, IDENTITY, PROBE) as cache, pytest.raises(ServerError, match="died"):
        embed_all(items(*range(20), 1000), cache, embedder, batch=2, concurrency=1, label="test")
    assert sorted(embedder.asked) == list(range(20))
    with Cache(tmp_path, IDENTITY, PROBE) as cache:
        embed_all(items(*range(30)), cache, embedder, batch=2, concurrency=1, label="test")
    assert sorted(embedder.asked) == list(range(30))


@pytest.mark.parametrize(("file", "cut"), [("index.jsonl", 3), ("rows.bin", 5)])
def test_loses_only_the_last_rows_when_killed_while_writing(tmp_path: Path, file: str, cut: int) -> None:
    embedder = Embedder()
    with Cache(tmp_path, IDENTITY, PROBE) as cache:
        embed_all(items(0, 1, 2, 3), cache, embedder, batch=1, concurrency=1, label="test")
    path = next(tmp_path.glob(f"*/{file}"))
    os.truncate(path, path.stat().st_size - cut)
    with Cache(tmp_path, IDENTITY, PROBE) as cache:
        assert len(cache) == 3
        embed_all(items(0, 1, 2, 3, 4), cache, embedder, batch=1, concurrency=1, label="test")
    with Cache(tmp_path, IDENTITY, PROBE) as cache:
        assert cache.get(keys(0, 1, 2, 3, 4))[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert embedder.asked == [0, 1, 2, 3, 3, 4]


def test_names_a_refused_item_and_keeps_its_batch(tmp_path: Path) -> None:
    embedder = Embedder()
    with Cache(tmp_path, IDENTITY, PROBE) as cache:
        result = embed_all(items(0, 1, -5, 2), cache, embedder, batch=4, concurrency=2, label="test")
        assert result.refused == {2: "INPUT[0]: negative"}
        assert result.embedded == 3
        assert cache.get(keys(2)).tolist() == [[2, 3]]


def test_each_model_has_its_own_cache(tmp_path: Path) -> None:
    for identity, probe in (
        (IDENTITY, PROBE),
        (IDENTITY, -PROBE),
        ({**IDENTITY, "checkpoint": "large"}, PROBE),
        (IDENTITY, np.ones(3, np.float32)),
    ):
        with Cache(tmp_path, identity, probe) as cache:
            assert len(cache) == 0
            cache.add(["key"], probe[None])
    with Cache(tmp_path, IDENTITY, PROBE * np.float32(1 + 1e-5)) as cache:
        assert cache.get(["key"]).tolist() == [PROBE.tolist()]


def test_refuses_a_cache_in_use(tmp_path: Path) -> None:
    with Cache(tmp_path, IDENTITY, PROBE), pytest.raises(CacheError, match="in use by another run"):
        Cache(tmp_path, IDENTITY, PROBE)


def test_names_an_unusable_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CacheError, match=r"--cache .*file: cannot be used"):
        Cache(tmp_path / "file", IDENTITY, PROBE)


def test_a_changed_file_has_another_key(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(b"one")
    before = file_key(file)
    assert file_key(file) == before
    file.write_bytes(b"other")
    assert file_key(file) != before
