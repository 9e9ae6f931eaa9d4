"""The gateway's search: its options, and a look at its index before a server starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from siglip_serve.errors import ServerStartError
from siglip_serve.launcher.options import ServeOptions

__all__ = ["check_search", "search_options"]

_PREFIX = "siglip-serve gateway: "
_PATIENCE = 600.0  # seconds: a large Parquet file is read as a whole


def search_options(options: ServeOptions) -> list[str]:
    """The options of a gateway that works in another folder."""
    words: list[str] = []
    if options.search is not None:
        words += ["--search", str(options.search.absolute()), "--search-base", str(Path.cwd())]
    if options.search_images is not None:
        words += ["--search-images", str(options.search_images.absolute())]
    return words


def check_search(options: ServeOptions, width: int) -> None:
    """Check that the gateway can search the index, if one is named.

    Args:
        width: numbers of an embedding of the checkpoint.

    Raises:
        ServerStartError: the index cannot be read or has vectors of another width, or the folder is missing.
    """
    words = search_options(options)
    if not words:
        return
    command = [sys.executable, "-m", "siglip_gateway", *words, "--check-width", str(width)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired as error:
        raise ServerStartError(f"{options.search}: not read within {_PATIENCE:g} s") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["the gateway does not start"])[-1]
        raise ServerStartError(reason.removeprefix(_PREFIX))
