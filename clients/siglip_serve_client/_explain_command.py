"""`siglip-serve explain`: where in a picture the score of each prompt comes from."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from siglip_serve_client._connection import add_connection, connected
from siglip_serve_client._explain import COLORMAPS, MODES, NORMALIZATIONS, ExplainOptions, Explanation
from siglip_serve_client._heatmap_pictures import heatmap_grid

__all__ = ["add_explain"]


def add_explain(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "explain",
        help="show where in a picture a prompt's score comes from",
        description="Draw a labelled grid: the picture, and a heatmap of each prompt with score and colours.",
        epilog="In the mode relative a map shows what speaks for a prompt more than for the background: the "
        "texts of --background, else the mean of all prompts, or of general words for a single prompt. "
        "In the mode absolute it shows what adds to the cosine itself, which is much alike for all prompts.",
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
        default=NORMALIZATIONS[1],
        help="one scale of colours for each prompt, or a joint one (default: %(default)s)",
    )
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of a map; default: the picture's")
    add("--colormap", choices=COLORMAPS, default=COLORMAPS[0], help="default: %(default)s")
    add("--opacity", type=float, default=0.5, help="of the maps, 0 to 1 (default: %(default)s)")
    add_connection(parser)
    parser.set_defaults(run=_explain)


def _explain(options: argparse.Namespace) -> int:
    if options.output.suffix.lower() not in Image.registered_extensions():
        print(
            f"siglip-serve: {options.output}: not a picture's ending, such as .png or .jpg", file=sys.stderr
        )
        return 2
    try:
        data = options.image.read_bytes()
    except OSError as error:
        print(f"siglip-serve: {options.image}: {error.strerror}", file=sys.stderr)
        return 2
    with connected(options) as client:
        found = client.explain(data, options.prompts, **_asked(options))
    with Image.open(io.BytesIO(data)) as file:
        picture = ImageOps.exif_transpose(file).convert("RGB")
    joint = options.normalize == "joint"
    heatmap_grid(picture, found, options.colormap, joint).save(options.output)
    if options.npz:
        _save(options.npz, found)
    _print(found)
    print(f"{options.output}: {len(found.prompts)} heatmaps")
    return 0


def _asked(options: argparse.Namespace) -> ExplainOptions:
    asked = ExplainOptions(
        mode=options.mode,
        normalize=options.normalize,
        overlays=True,
        colormap=options.colormap,
        opacity=options.opacity,
    )
    if options.template:
        asked["templates"] = options.template
    if options.background:
        asked["background"] = options.background
    if options.size:
        asked["size"] = tuple(options.size)
    return asked


def _save(path: Path, found: Explanation) -> None:
    np.savez_compressed(
        path,
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
