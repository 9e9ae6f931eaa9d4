"""`siglip-serve explain`: heatmaps of the places that the score of each prompt comes from."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from siglip_serve_client._operations.encoding import on_white
from siglip_serve_client._operations.explain import (
    COLORMAPS,
    MODES,
    NORMALIZATIONS,
    ExplainOptions,
    Explanation,
)
from siglip_serve_client.commands.checkpoint_note import print_note
from siglip_serve_client.commands.explain.heatmap_grid import heatmap_grid
from siglip_serve_client.commands.options import add_connection, connected, positive

__all__ = ["add_explain"]


def add_explain(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "explain",
        help="show where in a picture a prompt's score comes from",
        description="Draw a labelled grid: the picture, and a heatmap of each prompt with score and colours.",
        epilog="The table has the cosine of each prompt with the picture, and its two parts: the sum over "
        "places, and the part without a place. In the mode relative a map shows the evidence for a prompt "
        "compared with the background: the texts of --background, or the mean of all prompts, or general "
        "words for a single prompt. In the mode absolute it shows the parts of the cosine itself, which are "
        "much alike for all prompts.",
    )
    add = parser.add_argument
    add("image", type=Path, metavar="IMAGE", help="a picture file")
    add("--prompt", action="append", required=True, dest="prompts", metavar="TEXT", help="may be repeated")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="the picture to write: .png, .jpg")
    add("--npz", type=Path, metavar="FILE", help="also write the arrays: heatmaps, patch_maps, scores, ...")
    add(
        "--template", action="append", metavar="TEXT", help="such as 'a photo of a {}.'; several are averaged"
    )
    add("--background", action="append", metavar="TEXT", help="what prompts are compared with; repeatable")
    add("--mode", choices=MODES, default=MODES[0], help="default: %(default)s")
    add(
        "--normalize",
        choices=NORMALIZATIONS[1:],
        default=NORMALIZATIONS[2],
        help="one scale of colours per prompt, or a joint one for all (default: %(default)s)",
    )
    size = "of a map, in pixels; default: the picture's, at most 512"
    add("--size", type=positive, nargs=2, metavar=("HEIGHT", "WIDTH"), help=size)
    add("--colormap", choices=COLORMAPS, default=COLORMAPS[0], help="default: %(default)s")
    add("--opacity", type=float, default=0.5, help="of the maps, 0 to 1 (default: %(default)s)")
    add(
        "--truncation", action="store_true", help="cut texts that have too many tokens; else they are refused"
    )
    add_connection(parser)
    parser.set_defaults(run=_explain)


def _explain(options: argparse.Namespace) -> int:
    try:
        _check_files(options)
        data = options.image.read_bytes()
        with connected(options) as client:
            found = client.explain(data, options.prompts, **_asked(options))
            print_note(client)
        with Image.open(io.BytesIO(data)) as file:
            picture = on_white(ImageOps.exif_transpose(file))
        grid = heatmap_grid(picture, found, options.colormap, options.normalize == "joint")
        grid.save(options.output)
        if options.npz:
            _save(options.npz, found)
    except Image.DecompressionBombError as error:
        print(f"siglip-serve: {options.image}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"siglip-serve: {where}", file=sys.stderr)
        return 2
    _print(found)
    print(f"{options.output}: {len(found.prompts)} heatmaps")
    return 0


def _check_files(options: argparse.Namespace) -> None:
    """Check the files before anything runs.

    Raises:
        OSError: a file cannot be written. The message names it.
    """
    kind = Image.registered_extensions().get(options.output.suffix.lower())
    if kind not in Image.SAVE:
        raise OSError(f"{options.output}: not a picture's ending, such as .png or .jpg")
    for path in (options.output, options.npz):
        if path and not path.parent.is_dir():
            raise OSError(f"{path}: there is no folder {path.parent}")


def _asked(options: argparse.Namespace) -> ExplainOptions:
    asked = ExplainOptions(
        mode=options.mode,
        normalize=options.normalize,
        overlays=True,
        colormap=options.colormap,
        opacity=options.opacity,
        truncation=options.truncation,
    )
    if options.template:
        asked["templates"] = options.template
    if options.background:
        asked["background"] = options.background
    if options.size:
        asked["size"] = tuple(options.size)
    return asked


def _save(path: Path, found: Explanation) -> None:
    with path.open("wb") as file:  # given a name, NumPy would add an ending
        np.savez_compressed(
            file,
            prompts=np.array(found.prompts),
            heatmaps=found.heatmaps,
            patch_maps=found.patch_maps,
            scores=found.scores,
            unattributed=found.unattributed,
        )


def _print(found: Explanation) -> None:
    width = max(len("prompt"), *map(len, found.prompts))
    print(f"{'prompt':{width}}  cosine  in places  unattributed")
    for prompt, score, placed, rest in zip(
        found.prompts, found.scores, found.patch_maps.sum((1, 2)), found.unattributed, strict=True
    ):
        print(f"{prompt:{width}}  {score:6.3f}  {placed:9.3f}  {rest:12.3f}")
