"""Puts a checkpoint of the hub into a folder, so that a server needs no network: bake.py HUB_ID FOLDER."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from siglip_serve.checkpoint.config import load_config
from siglip_serve.checkpoint.files import resolve


def main() -> None:
    """Download `owner/name` or `owner/name@revision` and copy it to FOLDER/<hub id>."""
    hub_id, folder = sys.argv[1:]
    source = resolve(hub_id)
    load_config(source)  # one that the server would refuse ends the build here
    target = Path(folder) / hub_id
    shutil.copytree(source, target)
    print(f"{target}: {sum(file.stat().st_size for file in target.rglob('*') if file.is_file()):,} bytes")


if __name__ == "__main__":
    main()
