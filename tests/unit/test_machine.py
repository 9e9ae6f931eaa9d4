"""Hardware of the machine, and the arithmetic that follows from it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from siglip_serve import machine
from siglip_serve.engine.plan import fastest_dtype
from siglip_serve.machine import available_cores, processor_flags


def test_counts_the_cores_of_this_machine() -> None:
    assert 1 <= available_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000\n", 4),
        ("400000 100000\n", 4),
        ("500000 100000\n", 4),  # more than the affinity allows
        ("300000 100000\n", 3),
        ("200000 50000\n", 4),
        ("150000 100000\n", 2),
        ("149000 100000\n", 1),
        ("100000 100000\n", 1),
        ("20000 100000\n", 1),
        ("²0000 100000\n", 4),
        ("nonsense\n", 4),
        (None, 4),
    ],
)
def test_counts_the_cores_of_the_affinity_and_the_quota(
    quota: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpu.max"
    if quota is not None:
        file.write_text(quota, encoding="utf-8")
    monkeypatch.setattr(machine, "_CPU_QUOTA", file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5})
    assert available_cores() == expected


def test_lists_the_processors_flags() -> None:
    flags = processor_flags()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            assert flags == set(line.partition(":")[2].split())
            break
    else:
        assert flags == set()


@pytest.mark.parametrize(
    ("gpu", "flags", "expected"),
    [
        (9, (), "bfloat16"),
        (8, (), "bfloat16"),
        (7, ("avx512_bf16",), "float16"),
        (None, ("avx2", "avx512_bf16"), "bfloat16"),
        (None, ("amx_bf16",), "bfloat16"),
        (None, ("avx2", "avx512f", "avx512_vnni"), "float32"),
    ],
)
def test_fastest_dtype_is_a_fast_one_of_the_device(
    gpu: int | None, flags: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("siglip_serve.engine.plan.processor_flags", lambda: frozenset(flags))
    assert fastest_dtype(gpu) == expected
