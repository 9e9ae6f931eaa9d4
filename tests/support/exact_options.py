"""Options of servers whose answers are compared with transformers."""

from __future__ import annotations

from pathlib import Path

from paths import ROOT

from siglip_serve.launcher import ServeOptions

__all__ = ["exact_options"]


def exact_options(checkpoint: Path, log: Path, *models: str, **settings: str) -> ServeOptions:
    """A server in float32 with the pixels of PIL, unless the settings say otherwise."""
    chosen = {"dtype": "float32", "preprocess": "pil", **settings}
    return ServeOptions(
        ROOT / "model_repository", str(checkpoint), models=models, log_file=log, settings=chosen
    )
