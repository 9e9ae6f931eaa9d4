"""Replay a clip: find its teams in the first frames, then label each track with few classifications.

    python clients/examples/replay_clip.py FRAMES DETECTIONS.csv -o teams.csv [--draw FOLDER]

FRAMES is a folder of a video's frames as images, in the order of their names. DETECTIONS.csv has the columns
frame, track_id, x0, y0, x1, y1 (pixels). `frame` is an image's name, with or without its ending, or its
number. The output has a row for each detection, in the frames' order: frame, track_id, team.

In a live pipeline, frames are arrays already: send `frame=array, color_order="BGR"` instead of a file, and,
if the server runs on the same machine with `--shared-memory`, use `Client(url, shared_memory=True)`.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from siglip_serve_client import Client, ClientError, TeamFit, TeamTracker

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
COLORS = [(0, 114, 178), (230, 159, 0)]  # of the teams; colour-blind people can tell them apart
NO_TEAM = (150, 150, 150)
MOST_CROPS = 600


@dataclass
class Detections:
    """The players of one frame: `tracks` int64 [N], `boxes` float32 [N, 4]."""

    tracks: NDArray[np.int64]
    boxes: NDArray[np.float32]

    def inside(self, width: int, height: int) -> Detections:
        """The detections inside the frame. Trackers may report players for a while after they left it."""
        x0, y0, x1, y1 = self.boxes.T
        kept = (x0 < x1) & (y0 < y1) & (x1 > 0) & (y1 > 0) & (x0 < width) & (y0 < height)
        return Detections(self.tracks[kept], self.boxes[kept])


NO_PLAYERS = Detections(np.zeros(0, np.int64), np.zeros((0, 4), np.float32))


def read_detections(path: Path, frames: Sequence[Path]) -> dict[Path, Detections]:
    """The detections of each frame that has any."""
    by_name = {str(int(frame.stem)): frame for frame in frames if frame.stem.isdecimal()}
    by_name |= {name: frame for frame in frames for name in (frame.name, frame.stem)}
    tracks: dict[Path, list[int]] = defaultdict(list)
    boxes: dict[Path, list[list[float]]] = defaultdict(list)
    with path.open(newline="", encoding="utf-8-sig") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                frame = by_name[row["frame"]]
                tracks[frame].append(int(row["track_id"]))
                boxes[frame].append([float(row[side]) for side in ("x0", "y0", "x1", "y1")])
            except KeyError as error:
                raise SystemExit(
                    f"{path}, line {number}: no such frame, or no such column: {error}"
                ) from error
            except (TypeError, ValueError) as error:
                raise SystemExit(f"{path}, line {number}: {error}") from error
    return {frame: Detections(np.array(tracks[frame]), np.array(boxes[frame], np.float32)) for frame in boxes}


def fit(client: Client, detections: dict[Path, Detections], frames: Sequence[Path]) -> TeamFit:
    """The teams in the players' crops of the frames, or every n-th of very many crops."""
    crops: list[Image.Image] = []
    tracks: list[int] = []
    for frame in frames:
        with Image.open(frame) as picture:
            found = detections.get(frame, NO_PLAYERS).inside(*picture.size)
            # Whole pixels, at least one, inside of the frame.
            low = np.floor(found.boxes[:, :2]).clip(0)
            high = np.ceil(found.boxes[:, 2:]).clip(None, picture.size)
            crops += [picture.crop(tuple(box)) for box in np.hstack([low, high]).astype(int).tolist()]
            tracks += found.tracks.tolist()
    step = max(1, -(-len(crops) // MOST_CROPS))
    return client.fit_teams(crops=crops[::step], track_ids=tracks[::step])


class Replay:
    """Labels frame by frame, and counts the crops that were classified, of all that there were."""

    def __init__(self, client: Client, state: bytes) -> None:
        self.client = client
        self.state = state
        self.tracker = TeamTracker()
        self.classified = self.seen = 0

    def label(self, frame: Path, found: Detections) -> NDArray[np.int32]:
        """The team of each detection in the frame."""
        wanted = self.tracker.needs_label(found.tracks, boxes=found.boxes)
        labels = np.full(len(wanted), -1, dtype=np.int32)
        margins = np.zeros(len(wanted), dtype=np.float32)
        if wanted.any():
            said = self.client.classify_teams(frame=frame, boxes=found.boxes[wanted], state=self.state)
            labels[wanted], margins[wanted] = said.labels, said.margin
        self.classified += int(wanted.sum())
        self.seen += len(wanted)
        return self.tracker.update(found.tracks, labels, margins, boxes=found.boxes)


def draw(picture: Image.Image, found: Detections, teams: NDArray[np.int32]) -> Image.Image:
    """The frame with each player's box in the team's colour, and the track's number."""
    picture = picture.convert("RGB")
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(11, picture.height // 70))
    for track, box, team in zip(found.tracks, found.boxes.tolist(), teams, strict=True):
        color = COLORS[team] if 0 <= team < len(COLORS) else NO_TEAM
        pen.rectangle(box, outline=color, width=max(2, picture.height // 360))
        middle = ((box[0] + box[2]) / 2, box[1] - 3)
        pen.text(middle, str(track), color, font, anchor="mb", stroke_width=2, stroke_fill="white")
    return picture


def replay(client: Client, options: argparse.Namespace) -> None:
    """The whole clip: fit, then label and draw frame by frame."""
    frames = sorted(path for path in options.frames.iterdir() if path.suffix.lower() in SUFFIXES)
    detections = read_detections(options.detections, frames)
    fitted = fit(client, detections, frames[: options.fit_frames])
    print(f"fit: {len(fitted)} crops, status {', '.join(fitted.status)}")
    if not fitted.state:
        raise SystemExit("no teams were found")
    clip = Replay(client, fitted.state)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["frame", "track_id", "team"])
        for path in frames:
            with Image.open(path) as picture:
                found = detections.get(path, NO_PLAYERS).inside(*picture.size)
                teams = clip.label(path, found)
                writer.writerows((path.name, *row) for row in zip(found.tracks, teams, strict=True))
                if options.draw:
                    draw(picture, found, teams).save(options.draw / f"{path.stem}.jpg", quality=90)
    print(f"labels: {clip.seen} players in {len(frames)} frames, {clip.classified} of them classified")


def main() -> int:
    """Run the example and return the exit status."""
    parser = argparse.ArgumentParser(description="Find the teams of a clip, and label its tracks.")
    parser.add_argument("frames", type=Path, help="folder of the video's frames")
    parser.add_argument("detections", type=Path, help="CSV: frame, track_id, x0, y0, x1, y1")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="CSV to write: frame, track_id, team"
    )
    parser.add_argument("--draw", type=Path, help="folder for the labelled frames; made if there is none")
    parser.add_argument("--fit-frames", type=int, default=50, help="first frames to fit on (default: 50)")
    parser.add_argument("--url", default="127.0.0.1:8001", help="gRPC of the server (default: %(default)s)")
    options = parser.parse_args()
    if options.draw:
        options.draw.mkdir(parents=True, exist_ok=True)
    try:
        with Client(options.url) as client:
            replay(client, options)
    except (ClientError, OSError) as error:
        print(f"replay_clip: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
