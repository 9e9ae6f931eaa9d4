"""The input file of perf_analyzer, made from image files with Python's standard library alone.

perf_analyzer sends the bytes as they are, so each row is Triton's form of a string: its length as 4
little-endian bytes, then the bytes. JSON holds them as base64. The rows are sent one after another.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["input_data", "main"]


def input_data(images: Sequence[bytes]) -> str:
    """The JSON: a row of INPUT_IMAGE for each image."""
    rows = [base64.b64encode(len(image).to_bytes(4, "little") + image).decode() for image in images]
    return json.dumps({"data": [{"INPUT_IMAGE": {"b64": row}} for row in rows]})


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the options, write the file, and return the exit status."""
    parser = argparse.ArgumentParser(description="Make the input file of perf_analyzer from image files.")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        images = [path.read_bytes() for path in options.images]
        options.output.write_text(input_data(images), encoding="utf-8")
    except OSError as error:
        print(f"perf_data: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{options.output}: {len(images)} images, {sum(map(len, images)):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
