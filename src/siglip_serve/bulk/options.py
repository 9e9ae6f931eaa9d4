"""Options of `siglip-serve bulk`, and the job that they describe."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from siglip_serve_client.commands.options import positive

from siglip_serve.bulk.items import Columns
from siglip_serve.bulk.job import Format, Job, Labels, VectorType
from siglip_serve.bulk.outputs import OWN_COLUMNS
from siglip_serve.bulk.progress import ProgressForm
from siglip_serve.bulk.units import InputOptions
from siglip_serve.config import Settings
from siglip_serve.errors import SiglipServeError

__all__ = ["bulk_parser", "job_of"]

# Settings of the server that a job has too.
_SETTINGS = (
    "dtype",
    "backend",
    "calibration",
    "cache",
    "max_rows",
    "threads",
    "preprocess",
    "color",
    "max_num_patches",
    "decoders",
    "max_image_bytes",
    "max_image_pixels",
    "max_decode_seconds",
    "max_decode_megabytes",
)


def job_of(options: argparse.Namespace) -> Job:
    """Build the job that parsed options describe.

    Raises:
        SiglipServeError: a file of labels is empty or not UTF-8, a template has no place for a label, or a
            column would have the name of one of the output's own.
        OSError: the file of labels cannot be read.
    """
    own = {name: getattr(options, name) for name in _SETTINGS}
    labels: tuple[str, ...] = ()
    if options.labels:
        try:
            lines = options.labels.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise SiglipServeError(f"{options.labels}: not UTF-8: {error}") from error
        labels = tuple(line.strip() for line in lines if line.strip())
        if not labels:
            raise SiglipServeError(f"{options.labels}: no labels, expected one per line")
    if options.template.count("{}") < 1:
        raise SiglipServeError(f"--template: {options.template!r} has no {{}} where the label goes")
    taken = OWN_COLUMNS.intersection([options.text_column, *options.keep])
    if taken:
        raise SiglipServeError(f"column {min(taken)!r}: the output has one of this name; rename the input's")
    return Job(
        settings=Settings(checkpoint=options.checkpoint, **own),
        output=options.output,
        format=options.format,
        vectors=options.vectors,
        normalized=options.normalized,
        columns=Columns(
            options.column,
            options.text_column,
            tuple(options.keep),
            options.max_image_bytes,
            str(Path.cwd()),
        ),
        inputs=InputOptions(options.unit_items, options.all_files),
        labels=Labels(labels, options.template, options.top),
        device=options.device,
    )


def bulk_parser() -> argparse.ArgumentParser:
    """Build the parser of `siglip-serve bulk`."""
    parser = argparse.ArgumentParser(
        prog="siglip-serve bulk",
        description="Embed pictures of any number without a server: on all GPUs or the CPU of this machine, "
        "or on a Ray cluster. An interrupted job resumes when the same command is started again.",
        epilog="INPUT is a folder (with all below it), a picture, a pattern in quotes, a tar archive "
        "(webdataset), a Parquet file, a Lance dataset, or a listing: a .txt, .lst or .list file with one "
        "path per line. Each may be a URI, such as s3://bucket/key. Each tar archive, row group and part "
        "of a listing becomes a file in OUTPUT/embeddings. Pictures that failed are in OUTPUT/failed.",
    )
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="what to embed")
    add("-o", "--output", required=True, help="folder or URI of the results")
    add("--checkpoint", required=True, help="Hugging Face directory or hub id; owner/name@revision pins it")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    add("--format", choices=get_args(Format), default="parquet", help="of the files (default: %(default)s)")
    add(
        "--vectors",
        choices=get_args(VectorType),
        default="float32",
        help="stored type (default: %(default)s)",
    )
    add("--normalized", action="store_true", help="scale every embedding to unit length")
    add("--dry-run", action="store_true", help="say what would be done")
    add(
        "--progress",
        choices=get_args(ProgressForm),
        default="auto",
        help="auto: a bar on a terminal; json: lines",
    )
    _add_cluster(parser)
    _add_inputs(parser)
    _add_labels(parser)
    _add_settings(parser)
    return parser


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("inputs").add_argument
    add("--column", default="image", help="column of tables with the pictures (default: %(default)s)")
    add(
        "--text-column",
        default="",
        metavar="NAME",
        help="embed this text beside each picture: a column; in tar archives a suffix of a member, or a key "
        "of the JSON member",
    )
    add("--keep", action="append", default=[], metavar="NAME", help="copy this column too; may be repeated")
    add("--all-files", action="store_true", help="read every file of folders and archives as a picture")
    add(
        "--unit-items",
        type=positive,
        default=4096,
        help="lines of a listing per file (default: %(default)s)",
    )
    add(
        "--part",
        type=_part,
        default=(1, 1),
        metavar="I/N",
        help="do the I-th of N parts, for N machines without a cluster",
    )


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("where").add_argument
    add(
        "--on",
        choices=("local", "ray"),
        default="local",
        help="this machine, or a Ray cluster (default: %(default)s)",
    )
    add(
        "--address",
        default="",
        help="of the Ray cluster (default: RAY_ADDRESS, or a new one on this machine)",
    )
    add("--workers", type=int, default=0, help="Ray actors; 0: one per GPU, or one per node without GPUs")
    add("--worker-cpus", type=int, default=0, help="cores of a Ray actor; 0: an equal part of a node's")


def _add_labels(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("labels").add_argument
    add(
        "--labels",
        type=Path,
        metavar="FILE",
        help="compare pictures with the labels in FILE, one per line",
    )
    add("--template", default="{}", help="text around a label (default: %(default)s)")
    add("--top", type=positive, default=5, help="likeliest labels that are kept (default: %(default)s)")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the options that a server has too, with the same texts."""
    types = get_type_hints(Settings)
    groups: dict[str, Any] = {}
    for found in fields(Settings):
        if found.name not in _SETTINGS:
            continue
        title = found.metadata["group"]
        group = groups.setdefault(title, parser.add_argument_group(title))
        kind = types[found.name]
        choices = get_args(kind) or None
        default = f" (default: {found.default})" if found.default != "" else ""
        group.add_argument(
            f"--{found.name.replace('_', '-')}",
            type=str if choices else kind,
            choices=choices,
            default=found.default,
            metavar=found.metadata["metavar"] or (None if choices else "N"),
            help=(found.metadata["help"] + default).replace("%", "%%"),
        )


def _part(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not slash or not number.isdecimal() or not count.isdecimal() or not 1 <= int(number) <= int(count):
        raise argparse.ArgumentTypeError(f"expected I/N with 1 <= I <= N, such as 3/16, got {text!r}")
    return int(number), int(count)
