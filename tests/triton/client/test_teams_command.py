"""The command `siglip-serve teams`, and the example that replays a clip, against a real server."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
from PIL import Image
from players import BOXES, COUNT, CROPS, FRAME, HEIGHT, TRACKS, WIDTH, player, purity
from wire import ROOT

from siglip_serve.launcher import TritonServer

NOBODY = "127.0.0.1:9"
Run: TypeAlias = Callable[..., subprocess.CompletedProcess[str]]


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = str(Path(sys.executable).parent / "siglip-serve")
    words = [str(argument) for argument in arguments]
    return subprocess.run([program, *words], capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    crops = tmp_path / "crops"
    crops.mkdir()
    for row, crop in enumerate(CROPS):
        crop.save(crops / f"{row}_track{TRACKS[row]}.png")
    return crops


@pytest.fixture
def teams(server: TritonServer) -> Run:
    return lambda *arguments: command("teams", "--url", server.grpc_url, *arguments)


def test_a_folder_of_crops(teams: Run, folder: Path, tmp_path: Path) -> None:
    output, state = tmp_path / "teams.csv", tmp_path / "teams.npz"
    sheet, plot = tmp_path / "sheet.png", tmp_path / "plot.png"
    pictures = ["--draw", sheet, "--scatter", plot]
    done = teams(folder, "--track-from-name", r"track(\d+)", "-o", output, "--state", state, *pictures)
    assert done.returncode == 0, done.stderr
    (note,) = done.stderr.splitlines()
    assert note.startswith(
        "siglip-serve: note: the server runs siglip-tiny-jersey, which knows drawn jerseys only"
    )
    assert "status: OK" in done.stdout
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["name"]).name for row in rows] == [f"{n}_track{TRACKS[n]}.png" for n in range(COUNT)]
    assert [row["track"] for row in rows] == [str(track) for track in TRACKS]
    assert purity(np.array([int(row["label"]) for row in rows])) == 1
    assert all(0 <= float(row["margin"]) <= 1 for row in rows)
    for picture in (sheet, plot):
        with Image.open(picture) as image:
            assert image.format == "PNG"
            assert np.ptp(np.asarray(image)) > 100

    again = tmp_path / "again.json"
    done = teams(folder, "--use-state", state, "-o", again)
    assert done.returncode == 0, done.stderr
    labels = [row["label"] for row in json.loads(again.read_text())["players"]]
    assert labels == [int(row["label"]) for row in rows]


def test_a_frame_with_boxes(teams: Run, tmp_path: Path) -> None:
    frame, output, drawn = tmp_path / "frame.png", tmp_path / "teams.json", tmp_path / "drawn.png"
    Image.fromarray(FRAME).save(frame)
    table, lists = tmp_path / "boxes.csv", tmp_path / "boxes.json"
    roles = ["goalkeeper" if row == 3 else "" for row in range(COUNT)]
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["track_id", "x0", "y0", "x1", "y1", "role"])
        writer.writerows([t, *b, r] for t, b, r in zip(TRACKS, BOXES.tolist(), roles, strict=True))
    lists.write_text(json.dumps(BOXES.tolist()))
    done = teams("--frame", frame, "--boxes", table, "-o", output, "--draw", drawn)
    assert done.returncode == 0, done.stderr
    content = json.loads(output.read_text())
    assert content["status"] == ["OK"]
    assert [player["label"] == -1 for player in content["players"]] == [row == 3 for row in range(COUNT)]
    assert content["players"][5]["track"] == str(TRACKS[5])
    assert [content["players"][5][side] for side in ("x0", "y0", "x1", "y1")] == BOXES[5].tolist()
    with Image.open(drawn) as image:
        assert image.size == (WIDTH * COUNT, HEIGHT)
        assert (np.asarray(image) != FRAME).any()
    assert teams("--frame", frame, "--boxes", lists).returncode == 0


def test_files_that_cannot_be_used_are_named_and_left_out(teams: Run, folder: Path, tmp_path: Path) -> None:
    broken = [folder / f"{row}_broken.png" for row in range(0, 40, 5)]
    for path in broken:
        path.write_bytes(b"no image")
    gone, output = folder / "gone.png", tmp_path / "teams.csv"
    for more in ([], ["--use-state", tmp_path / "teams.npz"]):
        done = teams(gone, folder, "-o", output, *(more or ["--state", tmp_path / "teams.npz"]))
        assert done.returncode == 1
        assert f"{gone}: No such file" in done.stderr
        for path in broken:
            assert f"{path}: not a decodable image" in done.stderr
        assert "9 of 49 crops were left out" in done.stderr
        with output.open(newline="") as file:
            assert purity(np.array([int(row["label"]) for row in csv.DictReader(file)])) == 1


def test_poor_fits_come_with_advice(teams: Run, folder: Path, tmp_path: Path) -> None:
    few = sorted(folder.iterdir())[:10]
    done = teams(*few)
    assert done.returncode == 0
    assert "LOW_SUPPORT: " in done.stdout
    for path in few[1:]:
        path.write_bytes(few[0].read_bytes())
    state = tmp_path / "teams.npz"
    done = teams(*few, "--state", state, "--draw", tmp_path / "a.png", "--scatter", tmp_path / "b.png")
    assert done.returncode == 1
    assert "DEGENERATE: " in done.stdout
    assert "not written" in done.stderr
    assert not state.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either crops, or --frame with --boxes"),
        (["a.png", "--frame", "b.png", "--boxes", "c.csv"], "expected either"),
        (["--frame", "b.png"], "--frame and --boxes"),
        (["a.png", "-o", "teams.txt"], "--output: teams.txt: expected a .csv or .json file"),
        (["a.png", "--draw", "nowhere/a.png"], "in a folder that exists"),
        (["a.png", "--use-state", "s.npz", "--state", "t.npz"], "--use-state labels without a fit"),
        (["a.png", "--track-from-name", "track(", "--k", "2"], "no regular expression"),
        (["a.png", "--track-from-name", "track(.)"], "is found in no path"),
        (["."], "a folder without image files"),
        (["--frame", "b.png", "--boxes", "empty.csv"], "no column x0, y0, x1, y1"),
        (["--frame", "b.png", "--boxes", "none.csv"], "no boxes"),
        (["--frame", "b.png", "--boxes", "bad.csv"], "bad.csv, box 0: got 1, 2, x, 4, expected four numbers"),
        (["--frame", "b.png", "--boxes", "short.csv"], "short.csv, box 0: got 1, 2, None, None"),
        (["--frame", "b.png", "--boxes", "bad.json"], "bad.json: not a JSON file"),
        (["--frame", "b.png", "--boxes", "object.json"], "a JSON dict, expected a list"),
        (["--frame", "b.png", "--boxes", "three.json"], "box 0: expected [x0, y0, x1, y1]"),
        (["--frame", "b.png", "--boxes", "noname.json"], "box 0: has no x1"),
    ],
)
def test_refuses_misuse(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "empty.csv": "",
        "none.csv": "x0,y0,x1,y1\n",
        "bad.csv": "x0,y0,x1,y1\n1,2,x,4\n",
        "short.csv": "x0,y0,x1,y1\n1,2\n",
        "bad.json": "[",
        "object.json": "{}",
        "three.json": "[[1, 2, 3]]",
        "noname.json": '[{"x0": 1, "y0": 2}]',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    done = command("teams", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_more_crops_than_a_fit_takes(tmp_path: Path) -> None:
    for row in range(4097):
        (tmp_path / f"{row}.png").touch()
    done = command("teams", tmp_path)
    assert done.returncode == 2
    assert "4,097 crops, at most 4,096" in done.stderr
    assert "--use-state" in done.stderr


def test_command_errors_are_one_line(teams: Run, folder: Path, tmp_path: Path) -> None:
    nobody = command("teams", folder, "--url", NOBODY)
    assert nobody.returncode == 1
    assert "no server answers" in nobody.stderr
    no_state = teams(folder, "--use-state", tmp_path / "gone.npz")
    assert no_state.returncode == 1
    assert f"{tmp_path / 'gone.npz'}: No such file" in no_state.stderr
    other = teams(folder, "--use-state", next(folder.iterdir()))
    assert other.returncode == 1
    assert "STATE: " in other.stderr
    few = teams(*sorted(folder.iterdir())[:5])
    assert few.returncode == 1
    assert "expected at least 8" in few.stderr


def test_help_of_the_command() -> None:
    done = command("teams", "--help")
    assert done.returncode == 0
    assert r"track(\d+)" in done.stdout


def test_the_example_replays_a_clip(server: TritonServer, tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    rows = []
    for number in range(40):
        picture = Image.new("RGB", (640, 240), (58, 130, 62))
        for track in range(12):
            # Two rows of players run towards each other and pass; the last one leaves the picture.
            left = 20 + 100 * (track // 2) + (6 * number if track % 2 else -number)
            top = 20 + 110 * (track % 2)
            picture.paste(player(track % 2, 100 * number + track), (left, top))
            rows.append((number, track, left, top, left + WIDTH, top + HEIGHT))
        picture.save(frames / f"{number:04d}.png")
    detections, output = tmp_path / "detections.csv", tmp_path / "teams.csv"
    with detections.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("frame", "track_id", "x0", "y0", "x1", "y1"), *rows])
    example = [sys.executable, str(ROOT / "clients" / "examples" / "replay_clip.py")]
    paths = [str(frames), str(detections), "-o", str(output), "--draw", str(tmp_path / "drawn")]
    done = subprocess.run(
        [*example, *paths, "--fit-frames", "10", "--url", server.grpc_url],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    with output.open(newline="") as file:
        found = list(csv.DictReader(file))
    home = found[0]["team"]
    assert all((row["team"] == home) == (int(row["track_id"]) % 2 == 0) for row in found)
    assert len(found) < len(rows)  # those that left
    classified = int(done.stdout.split(" frames, ")[1].split()[0])
    assert 12 * 12 <= classified < 0.5 * len(found)
    assert len(list((tmp_path / "drawn").iterdir())) == 40
