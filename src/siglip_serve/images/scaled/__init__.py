"""Plain JPEGs read at a fraction of their size, for pictures that are resized to far fewer pixels anyway."""

from __future__ import annotations

from importlib.util import find_spec

from siglip_serve.errors import SettingsError

__all__ = ["check_numba"]


def check_numba() -> None:
    """Refuse the mode `scaled` where its compiler is missing.

    Raises:
        SettingsError: Numba is not installed.
    """
    if find_spec("numba") is None:
        raise SettingsError(
            "preprocess scaled: needs the extra scaled "
            "(`.venv/bin/pip install -e '.[scaled]'` in the checkout)"
        )
