"""The benchmark of CLIP on a GPU, tried without one: its rows, and embeddings that are near the reference."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import clip_gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")
def test_trial_without_a_gpu_writes_a_row_per_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "clip_gpu.csv"
    trial = "--device cpu --geometry tiny --rows 1 --seconds 0 --tower image heatmap"
    ways = ["--ways", "transformers", "torch", "fused"]
    monkeypatch.setattr(sys, "argv", ["clip_gpu", *trial.split(), *ways, "--output", str(output)])
    clip_gpu.main()
    with output.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["tower"], row["way"]) for row in rows] == [
        ("image", "transformers"),
        ("image", "torch"),
        ("image", "fused"),
        ("heatmap", "torch"),
        ("heatmap", "fused"),
    ]
    for row in rows[:3]:
        assert 0.999 < float(row["cosine_min"]) <= 1
        assert float(row["ratio_to_fastest_transformers"]) > 0
    assert all(float(row["over_forward"]) > 0 for row in rows[3:])
