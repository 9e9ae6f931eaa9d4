"""`siglip-serve teams`: crops, or a frame and boxes, become teams, labels and pictures."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from siglip_serve_client._client import Client
from siglip_serve_client._operations.teams import TeamFit, Teams
from siglip_serve_client.commands.checkpoint_note import print_note
from siglip_serve_client.commands.options import connected
from siglip_serve_client.commands.teams.contact_sheet import contact_sheet
from siglip_serve_client.commands.teams.files import (
    Boxes,
    MisuseError,
    crop_paths,
    read_boxes,
    short_names,
    track_numbers,
    track_of,
    write_labels,
)
from siglip_serve_client.commands.teams.labelled import OUTLIER, OUTLIERS, Labelled, team_name
from siglip_serve_client.commands.teams.labelled_frame import labelled_frame
from siglip_serve_client.commands.teams.scatter_plot import scatter_plot
from siglip_serve_client.errors import InvalidInputError

__all__ = ["add_teams"]

_MOST_CROPS = 4096
_CHUNK = 256
_SMALL_PART = 0.2  # a fitted team below this share of all players may be keepers or referees
_ADVICE = {
    "LOW_SUPPORT": "the crops of players are few; fit 60 or more, of 10 players or more, of several frames.",
    "LOW_SEPARATION": "the teams look alike, or there is only one; look at --draw and --scatter, take crops "
    "of both teams, and leave referees and keepers out.",
    "DEGENERATE": "all crops look the same, so no teams were found; check that they show several players.",
    "ANCHOR_CONFLICT": "crops that were named as of one team do not look like it; check the named crops.",
}
# The server names each crop that it refuses: "CROPS[3]: why; CROPS[7]: why; and 2 more".
_REFUSED = re.compile(r"CROPS\[(\d+)\]: (.*?)(?=; CROPS\[\d+\]: |; and \d+ more$|$)", re.DOTALL)

_Said = TypeVar("_Said", bound=Teams)


@dataclass
class _Players:
    """The players to label: either files of crops, or a frame with boxes.

    Attributes:
        names: [N]: a path, or a box's number in its file.
        tracks: [N], "" where unknown.
        crops: [N] encoded images.
        frame, boxes: the frame and its boxes instead of crops.
        failed: crops that were left out.
    """

    names: list[str]
    tracks: list[str]
    crops: list[bytes] = field(default_factory=list)
    frame: bytes = b""
    boxes: Boxes | None = None
    failed: int = 0

    def leave_out(self, refused: Mapping[int, str]) -> None:
        """Name crops on standard error, each with the reason, and continue without them."""
        for row, why in refused.items():
            print(f"siglip-serve: {self.names[row]}: {why}", file=sys.stderr)
        for row in sorted(refused, reverse=True):
            del self.names[row], self.tracks[row], self.crops[row]
        self.failed += len(refused)


def add_teams(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the command, and return its parser."""
    parser = commands.add_parser(
        "teams",
        help="find the teams of football players",
        description="Find the teams in pictures of football players with a running server, or with "
        "--use-state name the team of each player among teams found before.",
        epilog="At least 8 crops are needed to find teams; 60 of 10 players or more are recommended. Files "
        "that cannot be used are named on standard error and left out, and the exit status is then 1.",
    )
    add = parser.add_argument
    add("crops", nargs="*", type=Path, metavar="CROP", help="image files of one player each, or folders")
    add("--frame", type=Path, metavar="IMAGE", help="one image of many players, instead of crops")
    boxes = "the players in --frame: CSV or JSON with x0, y0, x1, y1, and if known track_id and role"
    add("--boxes", type=Path, metavar="FILE", help=f"{boxes} (player, goalkeeper, referee)")
    add("--k", type=int, default=2, help="how many teams to find (default: %(default)s)")
    tracks = "finds the track in a crop's path, by its first group, for example 'track(\\d+)'"
    helps = "crops of one track show one player, which helps a fit much"
    add("--track-from-name", type=_pattern, metavar="REGEX", help=f"{tracks}; {helps}")
    add("--timeout", type=float, default=600.0, help="seconds for one request (default: %(default)s)")
    state = parser.add_argument_group("fitted teams").add_argument
    state("--state", type=Path, metavar="FILE", help="write them, for --use-state: .npz")
    state("--use-state", type=Path, metavar="FILE", help="label with them, without a fit")
    state("--previous", type=Path, metavar="FILE", help="fit again, and keep the numbers of these teams")
    output = parser.add_argument_group("output").add_argument
    output(
        "-o", "--output", type=Path, metavar="FILE", help="write labels, margins, coordinates: .csv or .json"
    )
    pictures = ".png or .jpg"
    output(
        "--draw", type=Path, metavar="FILE", help=f"draw the frame with its boxes, or the crops: {pictures}"
    )
    output("--scatter", type=Path, metavar="FILE", help=f"draw a plot of the coordinates: {pictures}")
    parser.set_defaults(run=_teams)
    return parser


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def _teams(options: argparse.Namespace) -> int:
    try:
        _check(options)
        players = _from_frame(options) if options.frame else _from_crops(options)
        with connected(options, timeout=options.timeout) as client:
            if options.use_state:
                said: Teams = _classify(client, players, options.use_state.read_bytes())
            else:
                said = _fit(client, players, options)
            print_note(client, "siglip_base_model")
        return _report(options, players, said)
    except MisuseError as error:
        print(f"siglip-serve: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"siglip-serve: {what}", file=sys.stderr)
        return 1


def _check(options: argparse.Namespace) -> None:
    if bool(options.crops) == bool(options.frame):
        raise MisuseError("expected either crops, or --frame with --boxes")
    if bool(options.frame) != bool(options.boxes):
        raise MisuseError("--frame and --boxes: expected both or neither")
    if options.use_state and (options.state or options.previous or options.k != 2):
        raise MisuseError("--use-state labels without a fit: --state, --previous and --k have no use with it")
    if options.frame and options.track_from_name:
        raise MisuseError("--track-from-name is for crops; a column track_id in --boxes names tracks")
    _check_file("--output", options.output, ".csv", ".json")
    _check_file("--state", options.state, ".npz")
    _check_file("--draw", options.draw, ".png", ".jpg", ".jpeg")
    _check_file("--scatter", options.scatter, ".png", ".jpg", ".jpeg")


def _check_file(option: str, path: Path | None, *suffixes: str) -> None:
    # Checked now, not after a long request.
    if path is not None and (path.suffix not in suffixes or not path.parent.is_dir()):
        raise MisuseError(
            f"{option}: {path}: expected a {' or '.join(suffixes)} file in a folder that exists"
        )


def _from_frame(options: argparse.Namespace) -> _Players:
    boxes = read_boxes(options.boxes)
    count = len(boxes.corners)
    if not count:
        raise MisuseError(f"{options.boxes}: no boxes")
    return _Players([str(row) for row in range(count)], boxes.tracks, [], options.frame.read_bytes(), boxes)


def _from_crops(options: argparse.Namespace) -> _Players:
    paths = crop_paths(options.crops)
    if not options.use_state and len(paths) > _MOST_CROPS:
        raise MisuseError(
            f"{len(paths):,} crops, at most {_MOST_CROPS:,} can be fitted together: fit some, for example of "
            "every tenth frame, with --state FILE, and label all with --use-state FILE"
        )
    players = _Players(
        [str(path) for path in paths], [track_of(path, options.track_from_name) for path in paths]
    )
    unreadable = {}
    for row, path in enumerate(tqdm(paths, unit="crop", desc="reading", disable=None, leave=False)):
        try:
            players.crops.append(path.read_bytes())
        except OSError as error:
            players.crops.append(b"")
            unreadable[row] = error.strerror or str(error)
    players.leave_out(unreadable)
    if options.track_from_name and not any(players.tracks):
        raise MisuseError(f"--track-from-name: {options.track_from_name.pattern!r} is found in no path")
    if not players.crops:
        raise MisuseError("no crop could be read")
    return players


def _fit(client: Client, players: _Players, options: argparse.Namespace) -> TeamFit:
    previous = options.previous.read_bytes() if options.previous else None

    def ask(_first: int) -> TeamFit:
        tracks = track_numbers(players.tracks)
        if players.boxes is not None:
            return client.fit_teams(
                frame=players.frame,
                boxes=players.boxes.corners,
                roles=players.boxes.roles,
                track_ids=tracks,
                prev_state=previous,
                k=options.k,
            )
        return client.fit_teams(crops=players.crops, track_ids=tracks, prev_state=previous, k=options.k)

    if sys.stderr.isatty():
        print(f"fitting {len(players.names):,} crops in one request ...", file=sys.stderr)
    return _without_refused(ask, players)


def _classify(client: Client, players: _Players, state: bytes) -> Teams:
    if players.boxes is not None:
        return client.classify_teams(frame=players.frame, boxes=players.boxes.corners, state=state)
    parts: list[Teams] = []
    done = 0
    with tqdm(total=len(players.crops), unit="crop", desc="labelling", disable=None, leave=False) as bar:
        while done < len(players.crops) or not parts:
            part = _without_refused(
                lambda first: client.classify_teams(crops=players.crops[first : first + _CHUNK], state=state),
                players,
                done,
            )
            parts.append(part)
            done += len(part)
            bar.update(len(part))
    names = [field.name for field in fields(Teams)]
    return Teams(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def _without_refused(ask: Callable[[int], _Said], players: _Players, first: int = 0) -> _Said:
    """The answer of `ask` for the crops from `first` on, without the crops that the server refuses."""
    while True:
        try:
            return ask(first)
        except InvalidInputError as error:
            refused = {first + int(row): why for row, why in _REFUSED.findall(str(error))}
            if not refused or not players.crops:
                raise
            players.leave_out(refused)


def _report(options: argparse.Namespace, players: _Players, said: Teams) -> int:
    _summarise(players, said)
    failed = players.failed > 0
    if failed:
        total = len(players.names) + players.failed
        print(f"siglip-serve: {players.failed} of {total} crops were left out", file=sys.stderr)
    if options.output:
        corners = players.boxes.corners if players.boxes else None
        write_labels(options.output, players.names, players.tracks, said, corners)
        print(f"{options.output}: {len(said)} labels")
    if options.state and isinstance(said, TeamFit):
        if said.state:
            options.state.write_bytes(said.state)
            print(f"{options.state}: the fitted teams; label more crops with --use-state {options.state}")
        else:
            print(f"siglip-serve: {options.state}: not written, as no teams were found", file=sys.stderr)
            failed = True
    if options.draw or options.scatter:
        _draw(options, players, said)
    return 1 if failed else 0


def _summarise(players: _Players, said: Teams) -> None:
    print(f"{'':12} {'crops':>6} {'tracks':>7} {'mean margin':>12}")
    labelled = Labelled(said, players.names)
    for number in labelled.numbers:
        rows = labelled.of(number)
        tracks = {players.tracks[row] for row in rows} - {""}
        margin = "" if number < 0 else f"{said.margin[rows].mean():.2f}"
        print(f"{team_name(number):12} {len(rows):6} {len(tracks) or '':>7} {margin:>12}")
    assigned = said.labels[said.labels >= 0]
    for number, count in zip(*np.unique(assigned, return_counts=True), strict=True):
        if isinstance(said, TeamFit) and count < _SMALL_PART * len(assigned):
            print(f"{team_name(number)} is small: keepers or a referee? Leave them out, or try a larger --k")
    outliers = labelled.of(OUTLIERS)
    if len(outliers):
        named = ", ".join(players.names[row] for row in outliers[:3])
        print(f"outliers have a score above {OUTLIER:g}: keepers and referees? For example {named}")
    if said.region_fallback.any():
        print(f"{'tiny':12} {said.region_fallback.sum():6}  without a jersey region; the whole crop was used")
    if isinstance(said, TeamFit):
        print(f"status: {', '.join(said.status)}")
        for status in said.status:
            if status in _ADVICE:
                print(f"  {status}: {_ADVICE[status]}")


def _draw(options: argparse.Namespace, players: _Players, said: Teams) -> None:
    if players.boxes is not None:
        names = [track or name for track, name in zip(players.tracks, players.names, strict=True)]
        source = options.frame.name
    else:
        names = short_names(players.names)
        source = f"{len(names):,} crops"
    labelled = Labelled(said, names, players.tracks)
    if options.draw:
        if players.boxes is not None:
            picture = labelled_frame(_image(options.frame), players.boxes.corners, labelled)
        else:
            picture = contact_sheet([Path(name) for name in players.names], labelled, f"Teams of {source}")
        picture.save(options.draw)
        print(f"{options.draw}: the labelled {'frame' if players.boxes else 'crops'}")
    if options.scatter:
        scatter_plot(labelled, f"Teams of {source}").save(options.scatter)
        print(f"{options.scatter}: the coordinates")


def _image(path: Path) -> Image.Image:
    with Image.open(path) as file:
        return ImageOps.exif_transpose(file)
