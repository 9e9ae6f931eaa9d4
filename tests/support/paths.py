"""Folders of the checkout that tests read."""

from __future__ import annotations

from pathlib import Path

__all__ = ["JERSEY", "MODELS", "ROOT", "TINY"]

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "model_repository"
TINY = ROOT / "checkpoints" / "siglip-tiny"
JERSEY = ROOT / "checkpoints" / "siglip-tiny-jersey"
