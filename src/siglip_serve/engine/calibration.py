"""The images that int8 is calibrated on: found, and checked before anything slow begins."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from siglip_serve.errors import SettingsError

__all__ = ["FEWEST_IMAGES", "calibration_files", "check_calibration", "require_nncf", "too_few"]

FEWEST_IMAGES = 10
_MOST_IMAGES = 300
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}


def calibration_files(folder: Path | None) -> list[Path]:
    """Draw up to 300 image files evenly from the folder and those below it.

    Raises:
        SettingsError: no folder is given, or it is none.
    """
    if folder is None:
        raise SettingsError("setting 'calibration' is not given: dtype int8 needs a folder of images")
    if not folder.is_dir():
        raise SettingsError(f"setting 'calibration': {folder} is not a folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    step = max(1, -(-len(files) // _MOST_IMAGES))
    return files[::step]


def check_calibration(folder: Path | None, cache: Path | None) -> None:
    """Check in a moment what int8 needs: the images by their headers, and nncf or a model in the cache.

    Args:
        folder: setting `calibration`.
        cache: folder that keeps quantised models between starts.

    Raises:
        SettingsError: int8 cannot run. The message says what is missing.
    """
    files = calibration_files(folder)
    readable = 0
    for file in files:
        readable += _has_header(file)
        if readable == FEWEST_IMAGES:
            break
    else:
        raise too_few(folder, readable)
    if cache is None or not any(cache.glob("int8-*.zip")):
        require_nncf()


def require_nncf() -> None:
    """Check that nncf, which quantises, is installed.

    Raises:
        SettingsError: it is not.
    """
    if find_spec("nncf") is None:
        raise SettingsError(
            "dtype int8: needs the extra int8 (`.venv/bin/pip install -e '.[int8]'` in the checkout)"
        )


def too_few(folder: Path | None, readable: int) -> SettingsError:
    """Make the error for a folder with fewer than 10 readable images."""
    return SettingsError(
        f"setting 'calibration': {readable} readable images in {folder}, expected at least {FEWEST_IMAGES}"
    )


def _has_header(file: Path) -> bool:
    try:
        with Image.open(file):
            return True
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
