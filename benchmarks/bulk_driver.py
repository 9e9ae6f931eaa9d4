"""Memory and start of the process that drives a job over a listing of very many pictures.

The listing names files that do not exist, so that a job on it needs no pictures: its workers note each as
unreadable. The job is ended after some seconds.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.bulk import bulk_command, child_environment
from benchmarks.records import about, write_csv
from siglip_serve.bulk.outputs import finished_units
from siglip_serve.bulk.storage import Folder

_LINES = 1_000_000  # that are written at a time


def write_listing(file: Path, lines: int) -> None:
    """Write a listing of pictures that do not exist."""
    with file.open("w", encoding="ascii") as listing:
        for start in range(0, lines, _LINES):
            end = min(start + _LINES, lines)
            listing.write(
                "".join(f"/nowhere/shard-{n // 10_000:06}/{n:012}.jpg\n" for n in range(start, end))
            )


def measure(options: argparse.Namespace) -> dict[str, str]:
    """One row of the table."""
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        listing, output = Path(scratch, "pictures.txt"), Path(scratch, "output")
        write_listing(listing, options.lines)
        words = [*bulk_command([listing], output, options.checkpoint, "cpu"), "--progress", "none"]
        begin = time.perf_counter()
        first, most = 0.0, 0
        with subprocess.Popen(words, env=child_environment()) as driver:
            watched = psutil.Process(driver.pid)
            while time.perf_counter() < begin + options.seconds and driver.poll() is None:
                most = max(most, watched.memory_info().rss)
                if not first and finished_units(Folder(str(output)), "parquet"):
                    first = time.perf_counter() - begin
                time.sleep(0.1)
            driver.kill()
        units = len(finished_units(Folder(str(output)), "parquet"))
        size = listing.stat().st_size
    return {
        **about(["numpy", "pyarrow"]),
        "lines": str(options.lines),
        "listing_megabytes": f"{size / 1e6:.0f}",
        "first_unit_seconds": f"{first:.1f}",
        "driver_megabytes": f"{most / 1e6:.0f}",
        "units_finished": str(units),
        "seconds": f"{options.seconds:.0f}",
    }


def main() -> None:
    """Measure, print, and write CSV if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="directory in the Hugging Face layout")
    parser.add_argument("--lines", type=int, default=100_000_000, help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=90, help="of the job, default %(default)s")
    parser.add_argument("--folder", help="for the listing, default: that of temporary files")
    parser.add_argument("--output", type=Path, help="CSV file to append to")
    options = parser.parse_args()
    row = measure(options)
    print({key: row[key] for key in list(row)[-6:]}, flush=True)
    if options.output:
        write_csv(options.output, [row], append=True)


if __name__ == "__main__":
    main()
