"""`siglip-serve bench`: what it sends, when, and what it makes of the records; no server, no locust."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image
from siglip_serve_client import ServerError
from siglip_serve_client._operations.requests import Call
from siglip_serve_client.commands.bench import LOCUSTFILE, BenchError, command
from siglip_serve_client.commands.bench.mix import (
    parse_models,
    parse_sizes,
    photograph,
    pictures,
    poisson_times,
)
from siglip_serve_client.commands.bench.perf_data import input_data
from siglip_serve_client.commands.bench.record import Recorder, Summary, summarise
from siglip_serve_client.commands.bench.report import Row, draw_curve, table_line, write_csv
from siglip_serve_client.commands.bench.requests import LABELS, Draw, check_answer, grpc_body, make_call
from siglip_serve_client.commands.bench.run import Plan, Point, locust_command
from siglip_serve_client.commands.install_hint import install_hint
from siglip_serve_client.commands.main import main
from siglip_serve_client.commands.options import API_KEY
from tritonclient.grpc import service_pb2


def test_sizes_have_weights() -> None:
    sizes = parse_sizes("64x128:2, 500x375:6,1920x1080")
    assert sizes == [((64, 128), 2), ((500, 375), 6), ((1920, 1080), 1)]
    assert parse_models("embed_image:8,embed_text:0.5") == [("embed_image", 8), ("embed_text", 0.5)]


@pytest.mark.parametrize(
    "mix", ["", "500", "500x", "0x5", "5x5:0", "5x5:-1", "5x5:a", "5x5:nan", "5x5:inf", "20000x1", "5x5,,6x6"]
)
def test_a_bad_mix_is_named(mix: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="expected WIDTHxHEIGHT"):
        parse_sizes(mix)
    assert main(["bench", "--mix", mix, "-o", str(tmp_path)]) == 2
    assert "expected WIDTHxHEIGHT" in capsys.readouterr().err


def test_photographs_have_their_size_and_weigh_as_photographs_do() -> None:
    assert len({photograph(64, 128, seed) for seed in (0, 1, 0)}) == 2
    for width, height, least, most in ((64, 128, 1e3, 2e4), (500, 375, 3e4, 2e5), (1, 1, 1, 1e4)):
        data = photograph(width, height)
        assert least < len(data) < most
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (width, height)


def test_pictures_come_from_files(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no images"):
        pictures("", [str(tmp_path)])
    (tmp_path / "a.JPG").write_bytes(b"a")
    (tmp_path / "notes.txt").write_bytes(b"b")
    assert pictures("", [str(tmp_path)]) == [(b"a", 1.0)]


def same(call: Call) -> Call:
    return call


def test_draws_follow_the_weights() -> None:
    models = [("embed_image", 1.0), ("classify_image", 3.0)]
    draw = Draw(models, [(b"a", 2.0), (b"b", 6.0), (b"c", 0.0001)], same, Random(0))
    drawn = [draw() for _ in range(4000)]
    models_drawn = Counter(model for model, _ in drawn)
    bytes_drawn = Counter(
        call.inputs[0].array.item() for _, call in drawn if call.inputs[0].array is not None
    )
    assert models_drawn["classify_image"] / models_drawn["embed_image"] == pytest.approx(3, rel=0.1)
    assert bytes_drawn[b"b"] / bytes_drawn[b"a"] == pytest.approx(3, rel=0.1)
    assert bytes_drawn[b"c"] < 10
    assert len({id(call) for _, call in drawn}) <= 6  # each model and picture is encoded once


def test_texts_are_new_each_time() -> None:
    draws = [Draw([("embed_text", 1.0)], [(b"a", 1.0)], grpc_body, Random()) for _ in range(2)]
    assert len({body for draw in draws for _, body in (draw() for _ in range(500))}) == 1000


def test_requests_over_grpc() -> None:
    body = grpc_body(make_call("classify_image", b"JPEG", Random(0)))
    request = service_pb2.ModelInferRequest.FromString(body)
    assert [(tensor.name, list(tensor.shape)) for tensor in request.inputs] == [
        ("INPUT_IMAGE", [1, 1]),
        ("LABELS", [len(LABELS)]),
    ]
    assert request.parameters["timeout"].int64_param == 119_750_000
    assert request.raw_input_contents[0] == b"\x04\0\0\0JPEG"
    assert request.raw_input_contents[1].startswith(b"\x05\0\0\0a dog")


def test_explanations_are_asked_for_without_pictures() -> None:
    call = make_call("explain_image", b"JPEG", Random(0))
    request = service_pb2.ModelInferRequest.FromString(grpc_body(call))
    assert [tensor.name for tensor in request.inputs] == ["INPUT_IMAGE", "PROMPTS"]
    assert {tensor.name for tensor in request.outputs} == {"HEATMAPS", "SCORES", "UNATTRIBUTED", "PATCH_MAPS"}


class Explained:
    """An answer of explain_image, with some outputs replaced."""

    def __init__(self, **other: Any) -> None:
        maps = np.arange(len(LABELS) * 4, dtype=np.float32).reshape(-1, 2, 2) / 100
        self.outputs: dict[str, Any] = {
            "HEATMAPS": np.zeros((len(LABELS), 6, 9), np.float32),
            "PATCH_MAPS": maps,
            "UNATTRIBUTED": np.full(len(LABELS), -0.1, np.float32),
            "SCORES": maps.sum((1, 2)) - np.float32(0.1),
            **other,
        }

    def as_numpy(self, name: str) -> Any:
        return self.outputs[name]


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        ({"HEATMAPS": np.zeros((4, 6, 9), np.float32)}, "HEATMAPS: float32 of shape"),
        ({"PATCH_MAPS": np.zeros((5, 4), np.float32)}, "PATCH_MAPS: float32 of shape"),
        ({"SCORES": np.zeros(5)}, "SCORES: float64"),
        ({"UNATTRIBUTED": np.full(5, np.nan, np.float32)}, "UNATTRIBUTED: values are not finite"),
        ({"UNATTRIBUTED": np.zeros(5, np.float32)}, "do not sum to SCORES"),
        ({"HEATMAPS": None}, "no output HEATMAPS"),
    ],
)
def test_wrong_explanations_are_found(other: dict[str, Any], fault: str) -> None:
    check_answer("explain_image", Explained())
    with pytest.raises(ServerError, match=fault):
        check_answer("explain_image", Explained(**other))


class Answered:
    """An answer with one output."""

    def __init__(self, shape: tuple[int, ...], values: list[float], name: str = "EMBEDDING") -> None:
        self.name, self.values = name, np.array(values, np.float32).reshape(shape)

    def as_numpy(self, name: str) -> Any:
        return self.values if name == self.name else None


@pytest.mark.parametrize(
    ("model", "answer", "fault"),
    [
        ("embed_image", Answered((2, 1), [1, 2]), "of shape"),
        ("embed_image", Answered((1, 0), []), "of shape"),
        ("embed_image", Answered((1, 2), [1, float("nan")]), "not finite"),
        ("embed_image", Answered((1, 2), [1, float("inf")]), "not finite"),
        ("embed_image", Answered((1, 2), [0, 0]), "all zeros"),
        ("embed_image", Answered((1, 2), [1, 2], "OTHER"), "no output EMBEDDING"),
        ("classify_image", Answered((1, 5), [0, 0.1, 0.2, 0.3, 2], "PROBABILITIES"), "outside 0 to 1"),
        ("classify_image", Answered((1, 4), [0, 0.1, 0.2, 0.3], "PROBABILITIES"), "of shape"),
    ],
)
def test_wrong_answers_are_found(model: str, answer: Answered, fault: str) -> None:
    with pytest.raises(ServerError, match=fault):
        check_answer(model, answer)


def test_right_answers_are_accepted() -> None:
    check_answer("embed_text", Answered((1, 2), [1, 2]))
    check_answer("classify_image", Answered((1, 5), [0, 0.1, 0.2, 0.3, 1], "PROBABILITIES"))


def test_the_open_loop_is_due_at_poisson_times() -> None:
    streams = [poisson_times(25.0, Random(user)) for user in range(8)]
    within = [list(itertools.takewhile(lambda time: time < 60.0, stream)) for stream in streams]
    times = np.sort(np.concatenate(within))
    gaps = np.diff(times)
    assert len(times) == pytest.approx(200 * 60, rel=0.03)  # 12,000, give or take 110
    # Gaps of a Poisson process: the standard deviation is the mean, and 1/e of them are above it.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert (gaps > gaps.mean()).mean() == pytest.approx(np.exp(-1), abs=0.02)


def record(folder: Path, name: str, rows: list[tuple[float, float, float, float, str]]) -> None:
    with (folder / name).open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_records_become_figures(tmp_path: Path) -> None:
    # Two processes; the second begins at 101, so that the measured time is 103 to 113.
    closed = [(100 + n * 0.1, 100 + n * 0.1, 100.05 + n * 0.1, n * 0.01, "") for n in range(200)]
    other = [(101.0, 101.0, 101.02, 0.0, "UNAVAILABLE: full"), (105.0, 105.0, 106.0, 0.1, "")]
    record(tmp_path, "1.csv", closed)
    record(tmp_path, "2.csv", other)
    found = summarise(tmp_path, 2.0, 10.0, is_open=False)
    assert found.answered == 101
    assert found.rate == pytest.approx(10.1)
    assert found.percentile(50) == pytest.approx(50)
    assert found.percentile(100) == pytest.approx(1000)
    assert found.faults == {"UNAVAILABLE: full": 1}
    assert found.late == 0
    assert found.client_cpu[0] == pytest.approx(1.0)


def test_the_open_loop_counts_from_when_requests_were_due(tmp_path: Path) -> None:
    rows = [(0.0, 0.0, 0.01, 0.0, "")]
    rows += [(1.0 + n, 1.5 + n, 4.0 + n, 0.0, "") for n in range(8)]
    record(tmp_path, "1.csv", rows)
    found = summarise(tmp_path, 1.0, 4.0, is_open=True)
    assert found.latencies.tolist() == [3.0] * 4  # due at 1, 2, 3, 4; all were sent half a second late
    assert found.late == 4
    assert found.answered == 1  # at 4


def test_nothing_to_measure_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no request was sent"):
        summarise(tmp_path, 1.0, 1.0, is_open=False)
    recorder = Recorder(tmp_path)
    recorder(1.0, 1.0, 1.1, "")
    recorder.close()
    with pytest.raises(BenchError, match="after the warm-up of 5 s"):
        summarise(tmp_path, 5.0, 1.0, is_open=False)
    assert summarise(tmp_path, 0.0, 1.0, is_open=True).latencies == pytest.approx([0.1])


def rows_of(is_open: bool) -> list[Row]:
    rng = np.random.default_rng(0)
    made = []
    for load in (1, 4, 16, 64):
        rate = min(load, 20) * 10.0
        latencies = rng.gamma(9, load / rate / 9, 400)
        summary = Summary(10.0, int(rate * 10), latencies, Counter(), 3, (2.5,))
        made.append(Row(Point(load, is_open), summary))
    return made


@pytest.mark.parametrize("is_open", [False, True])
def test_table_and_picture(is_open: bool, tmp_path: Path) -> None:
    made = rows_of(is_open)
    write_csv(Plan("127.0.0.1:8001"), made, tmp_path / "bench.csv")
    draw_curve(Plan("127.0.0.1:8001"), made, tmp_path / "bench.png")
    with (tmp_path / "bench.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    load, other = ("rate", "concurrency") if is_open else ("concurrency", "rate")
    assert [(row[load], row[other]) for row in rows] == [("1", ""), ("4", ""), ("16", ""), ("64", "")]
    assert [row["requests_per_second"] for row in rows] == ["10.0", "40.0", "160.0", "200.0"]
    assert rows[0]["p50_ms"] == f"{np.percentile(made[0].summary.latencies, 50) * 1000:.2f}"
    assert {row["late"] for row in rows} == {"3" if is_open else ""}
    with Image.open(tmp_path / "bench.png") as image:
        assert image.size == (1200, 560)
        colors = image.convert("RGB").getcolors(2**20) or []
    drawn = {color for count, color in colors if count > 50}
    assert {(0, 0x72, 0xB2), (0, 0x9E, 0x73), (0xE6, 0x9F, 0), (0xD5, 0x5E, 0)} <= drawn  # all four lines
    lines = [table_line(None, is_open), *(table_line(row, is_open) for row in made)]
    assert len({len(line) for line in lines}) == 1
    assert lines[4].split()[:2] == ["64", "200.0"]


def test_missing_locust_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "locust" else name)
    assert main(["bench", "-o", str(tmp_path)]) == 2
    assert f"locust: not installed; `{install_hint('load')}` adds what bench needs" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["127.0.0.1:9", "http://127.0.0.1:9"])
def test_a_missing_server_is_named(url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "--url", url, "-o", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "no server answers at 127.0.0.1:9" in error
    assert "make serve" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--concurrency", "0"], "expected a whole number"),
        (["--rate", "0"], "expected a number above 0"),
        (["--seconds", "x"], "expected a number above 0"),
        (["--rate", "1", "--concurrency", "1"], "not allowed with"),
    ],
)
def test_refuses_bad_options(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--url", "ftp://x"], "expected host:port"), (["--ca-file", "nosuch.pem"], "nosuch.pem: no such file")],
)
def test_refuses_bad_connections(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["bench", *words, "-o", str(tmp_path)])


def test_users_share_the_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(API_KEY, "secret")
    plan = Plan("127.0.0.1:8001", processes=4)
    closed = locust_command(plan, Point(2), tmp_path)
    assert "secret" not in " ".join(closed)
    assert closed[closed.index("--processes") + 1] == "2"  # no process without a user
    rate = locust_command(plan, Point(100, True), tmp_path)
    users, each = (float(rate[rate.index(name) + 1]) for name in ("-u", "--rate-per-user"))
    assert users * each == pytest.approx(100)


def test_input_of_perf_analyzer() -> None:
    (row,) = json.loads(input_data([b"JPEG"]))["data"]
    assert base64.b64decode(row["INPUT_IMAGE"]["b64"]) == b"\x04\0\0\0JPEG"


def test_the_script_of_perf_analyzer(tmp_path: Path) -> None:
    script, image, program = LOCUSTFILE.with_name("perf_analyzer.sh"), tmp_path / "a b.jpg", tmp_path / "bin"
    image.write_bytes(b"JPEG")
    program.mkdir()
    (program / "perf_analyzer").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (program / "perf_analyzer").chmod(0o755)
    path = f"{program}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHON": sys.executable, "URL": "host:1", "PROTOCOL": "http"}

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [script, *words], env=environment, capture_output=True, text=True, check=False, timeout=60
        )

    out = tmp_path / "out"
    done = run(out, image)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "input.json").read_text()) == json.loads(input_data([b"JPEG"]))
    assert done.stdout.split()[-14:] == [
        *["-m", "embed_image", "-i", "http", "-u", "host:1", "--input-data", f"{out}/input.json"],
        *["--concurrency-range", "1:64:21", "--percentile", "95", "-f", f"{out}/perf_analyzer.csv"],
    ]
    assert "usage" in run(out).stderr
    assert "nothing.jpg" in run(out, tmp_path / "nothing.jpg").stderr
