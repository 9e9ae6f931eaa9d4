"""`siglip-serve fit-projection`: a projection to fewer dimensions, fitted to stored embeddings."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from siglip_serve_client.commands.embed.output import replacing
from siglip_serve_client.commands.embed.stored import StoredError, StoredVectors
from siglip_serve_client.commands.options import positive
from siglip_serve_client.projection import Moments, Projection, write_projection

__all__ = ["add_fit_projection"]

_SHOWN = (2, 4, 8)  # parts of the width whose share of the variance is printed


def add_fit_projection(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "fit-projection",
        help="fit a projection to fewer dimensions, for the gateway",
        description="Fit a projection to stored embeddings of images: their principal components. "
        "`siglip-serve gateway --projection OUTPUT` then answers requests for fewer dimensions.",
        epilog="One projection serves every number of dimensions up to its own. Several files must be of one "
        "checkpoint. Files are read in blocks, so they may be larger than the memory.",
    )
    add = parser.add_argument
    add(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="output of `siglip-serve embed` (.npz, .parquet), or a .npy array [rows, width]",
    )
    add("-o", "--output", type=Path, required=True, help="the .npz file to write")
    add("--dimensions", type=positive, metavar="K", help="the most dimensions (default: half of the width)")
    add("--column", default="embedding", help="of .parquet files (default: %(default)s)")
    add("--checkpoint", metavar="NAME", help="that made the embeddings, if the files do not name it")
    add("--overwrite", action="store_true", help="replace an output that exists")
    parser.set_defaults(run=_fit)


def _fit(options: argparse.Namespace) -> int:
    try:
        _check_output(options.output, options.overwrite)
        files = [StoredVectors(path, options.column) for path in options.files]
        checkpoint, revision = _checkpoint(files, options.checkpoint)
        moments = _moments(files)
        dimensions = options.dimensions or max(files[0].width // 2, 1)
        projection = moments.fit(dimensions, checkpoint, revision)
        with replacing(options.output) as file:
            write_projection(projection, file)
    except (StoredError, ValueError, OSError) as error:
        print(f"siglip-serve: {error}", file=sys.stderr)
        return 2
    _report(projection, options.output)
    return 0


def _check_output(output: Path, overwrite: bool) -> None:
    if output.suffix != ".npz" or not output.parent.is_dir():
        raise StoredError(f"{output}: expected a .npz file in a folder that exists")
    if output.exists() and not overwrite:
        raise StoredError(f"{output}: exists; --overwrite replaces it")


def _checkpoint(files: Sequence[StoredVectors], name: str | None) -> tuple[str, str]:
    """Name and revision of the one checkpoint of all files."""
    first = files[0]
    for file in files[1:]:
        if file.width != first.width:
            raise StoredError(f"{file.path}: width {file.width}, but {first.path} has {first.width}")
    found = {}
    for file in files:
        own = file.identity.get("checkpoint_name") or name
        if not own:
            raise StoredError(f"{file.path}: does not name its checkpoint; give it with --checkpoint")
        if name and own != name:
            raise StoredError(f"{file.path}: of the checkpoint {own}, but --checkpoint is {name}")
        found[own, file.identity.get("checkpoint_revision", "")] = file.path
    if len(found) > 1:
        parts = [f"{path} of {' '.join(filter(None, key))}" for key, path in found.items()]
        raise StoredError(f"embeddings of several checkpoints: {', '.join(parts)}")
    return next(iter(found))


def _moments(files: Sequence[StoredVectors]) -> Moments:
    moments = Moments(files[0].width)
    with tqdm(total=sum(file.rows for file in files), unit="vector", unit_scale=True, disable=None) as bar:
        for file in files:
            start = 0
            for block in file.blocks():
                try:
                    moments.add(block)
                except ValueError as error:
                    index, _, what = str(error).partition(": ")
                    raise StoredError(f"{file.path}: row {start + int(index)}: {what}") from None
                start += len(block)
                bar.update(len(block))
    return moments


def _report(projection: Projection, output: Path) -> None:
    print(f"{output}: {projection.most} dimensions of {projection.width}, from {projection.rows} embeddings")
    for part in _SHOWN:
        count = projection.width // part
        if 1 <= count <= projection.most:
            print(f"  {count:5} dimensions hold {projection.explained[:count].sum():.1%} of the variance")
