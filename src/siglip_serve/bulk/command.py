"""`siglip-serve bulk`: embed pictures of any number without a server, on all GPUs or the CPU of a machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from tempfile import TemporaryDirectory
from typing import NoReturn

from siglip_serve_client.commands.install_hint import install_hint

from siglip_serve.bulk.items import check_columns
from siglip_serve.bulk.job import Job, keep_manifest, open_job
from siglip_serve.bulk.options import bulk_parser, job_of
from siglip_serve.bulk.outputs import finish_output, finished_units
from siglip_serve.bulk.progress import Progress, Summary
from siglip_serve.bulk.storage import Folder
from siglip_serve.bulk.units import Unit, copy_plans, plan_units
from siglip_serve.errors import SiglipServeError

__all__ = ["main"]


def main(words: Sequence[str], refuse: Callable[[argparse.ArgumentParser, Sequence[str]], NoReturn]) -> int:
    """Run the command and return the exit status: 1 if a picture or a unit has no result.

    Args:
        words: its arguments.
        refuse: called with unknown arguments.
    """
    parser = bulk_parser()
    options, unknown = parser.parse_known_intermixed_args(words)  # inputs may stand between options
    if unknown:
        refuse(parser, unknown)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("siglip-serve: interrupted; the same command resumes", file=sys.stderr)
        return 130
    except (SiglipServeError, OSError) as error:
        print(f"siglip-serve: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    job = job_of(options)
    config = job.load_config()
    folder = open_job(job, config)
    if options.dry_run:
        with TemporaryDirectory() as plans:
            copy_plans(folder, Folder(plans))
            _describe(options, folder, _plan(options, job, Folder(plans)))
        return 0
    units = _plan(options, job, folder)
    keep_manifest(job, config, folder)
    done = finished_units(folder, job.format)
    left = [unit for unit in units if unit.name not in done]
    folder.remove_stale()
    if len(units) > len(left):
        print(
            f"siglip-serve: resuming: {len(units) - len(left)} of {len(units)} units are finished",
            file=sys.stderr,
        )
    progress = Progress(len(units), len(units) - len(left), options.progress)
    try:
        if left:
            _engine(options)(job, left, progress)
        finish_output(folder, job.format)
    finally:
        summary = progress.close()
    text = progress.describe(options.output)
    print(text, file=sys.stderr if options.progress == "json" else sys.stdout)
    return _status(summary)


def _engine(options: argparse.Namespace) -> Callable[[Job, list[Unit], Progress], None]:
    if options.on == "local":
        from siglip_serve.bulk.local import run_local

        return run_local
    try:
        from siglip_serve.bulk.on_ray import RayOptions, run_ray
    except ModuleNotFoundError as error:
        raise SiglipServeError(f"--on ray: {error}; `{install_hint('ray')}` adds it") from error
    return partial(run_ray, options=RayOptions(options.address, options.workers, options.worker_cpus))


def _status(summary: Summary) -> int:
    return 1 if summary.failed or summary.lost else 0


def _plan(options: argparse.Namespace, job: Job, folder: Folder) -> list[Unit]:
    """The units of this machine's part, each once."""
    if not options.inputs:
        raise SiglipServeError("no inputs are named")
    units = {unit.name: unit for unit in plan_units(options.inputs, job.inputs, folder, _note)}
    table = next((unit for unit in units.values() if unit.kind in ("parquet", "lance")), None)
    if table is not None:
        check_columns(table, job.columns)
    number, count = options.part
    return list(islice(units.values(), number - 1, None, count))


def _note(text: str) -> None:
    print(f"siglip-serve: {text}", file=sys.stderr)


def _describe(options: argparse.Namespace, folder: Folder, units: list[Unit]) -> None:
    from siglip_serve.bulk.local import devices_of

    done = finished_units(folder, options.format)
    left = [unit for unit in units if unit.name not in done]
    kinds = sorted({unit.kind for unit in units})
    print(f"{len(units)} units ({', '.join(kinds)}), {len(units) - len(left)} finished, {len(left)} to do")
    print(f"output: {folder.path}, {options.format} of {options.vectors}")
    print(f"devices of this machine: {', '.join(devices_of(job_of(options)))}")
    for unit in left[:5]:
        print(f"  {unit.name} ({unit.kind})")
    if len(left) > 5:
        print(f"  and {len(left) - 5} more")
