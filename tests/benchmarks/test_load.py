"""The load generator of the benchmarks: its requests, counts, checks and plots."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from numpy.typing import NDArray
from paths import ROOT
from PIL import Image
from tritonclient.grpc import service_pb2

from benchmarks import plots
from benchmarks.cpu_time import cpu_of, cpu_used, machine_cpu
from benchmarks.inputs import synthetic_jpeg
from benchmarks.load import Driver, Load, Result, send_times, wrong
from benchmarks.load_clients import (
    Answer,
    Target,
    TritonHttpClient,
    http_answer,
    infer_request,
    triton_embedding,
    triton_embeddings,
)
from benchmarks.records import write_csv

TARGET = Target("http", "127.0.0.1:1", "/embed")
TINY = ROOT / "checkpoints" / "siglip-tiny"


def load(**changes: object) -> Load:
    return Load(TARGET, [b"a", b"b"], **{"concurrency": 4, "seconds": 2.0, **changes})  # type: ignore[arg-type]


class Slow:
    """Answers each request `delay` seconds after it was sent, but none before `stall` seconds have passed."""

    def __init__(self, delay: float, stall: float = 0.0, answer: float = 1.0) -> None:
        self.delay, self.answer = delay, answer
        self.free = time.perf_counter() + stall
        self.pending: list[tuple[float, int]] = []

    def send(self, ticket: int, picture: int) -> None:  # noqa: ARG002 - the protocol's
        self.pending.append((max(self.free, time.perf_counter() + self.delay), ticket))

    def wait(self, timeout: float) -> list[Answer]:
        first = min(self.pending)[0] - time.perf_counter() if self.pending else timeout
        time.sleep(max(0.0, min(first, timeout)))
        now = time.perf_counter()
        ended = [ticket for moment, ticket in self.pending if moment <= now]
        self.pending = [(moment, ticket) for moment, ticket in self.pending if moment > now]
        return [(ticket, "", b"") for ticket in ended]

    def embedding(self, body: bytes) -> NDArray[np.float32]:  # noqa: ARG002 - the protocol's
        return np.array([self.answer, 0], np.float32)

    def close(self) -> None:
        pass


def drive(client: Slow, given: Load) -> Driver:
    driver = Driver(client, given, 0, np.array([[1, 0], [1, 0]], np.float32))
    driver.drive(time.perf_counter())
    return driver


def test_percentiles_and_costs_of_a_result() -> None:
    latencies = np.arange(1, 101) / 1000
    counted = Counter({"UNAVAILABLE": 2})
    result = Result(load(), latencies, 100, counted, 3, 4, 5, 0.05, 1.5, {"tritonserver": 0.1, "model": 0.2})
    row = result.columns()
    assert row["images_per_second"] == "50.0"
    assert [row[name] for name in ("p50_ms", "p95_ms", "p99_ms")] == ["50.50", "95.05", "99.01"]
    assert (row["errors"], row["statuses"], row["late"], row["unsent"]) == ("2", "UNAVAILABLE:2", "3", "4")
    assert (row["client_cpu_ms"], row["server_cpu_ms"], row["busy_cores"]) == ("0.500", "3.000", "1.50")


def test_a_result_without_an_answer_has_no_latency() -> None:
    row = Result(load(), np.array([]), 0, Counter(), 0, 0, 0, 0.0, 0.0, {}).columns()
    assert (row["images_per_second"], row["p50_ms"], row["server_cpu_ms"]) == ("0.0", "nan", "")


def test_fixed_arrivals_of_processes_interleave() -> None:
    given = load(rate=10.0, processes=2, arrivals="fixed", seconds=0.6, warmup=0.0)
    np.testing.assert_allclose(send_times(given, 0), [0.0, 0.2, 0.4])
    np.testing.assert_allclose(send_times(given, 1), [0.1, 0.3, 0.5])


def test_poisson_arrivals_are_drawn_from_the_seed() -> None:
    given = load(rate=500.0, processes=2, seconds=30.0, warmup=0.0)
    times = send_times(given, 0)
    assert np.array_equal(times, send_times(given, 0))
    assert not np.array_equal(times[:5], send_times(given, 1)[:5])
    gaps = np.diff(times)
    assert gaps.min() >= 0
    assert times[-1] < 30 < times[-1] + 0.1
    assert gaps.mean() == pytest.approx(1 / 250, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)


def test_the_closed_loop_has_no_send_times() -> None:
    with pytest.raises(ValueError, match="closed loop"):
        send_times(load(), 0)


def test_closed_loop_keeps_its_number_in_flight() -> None:
    record = drive(Slow(0.02), load(concurrency=3, seconds=0.4, warmup=0.1, check=1)).record
    assert 3 <= record.completed <= 63
    assert record.completed == len(record.latencies) == record.checked
    assert min(record.latencies) >= 0.02
    assert not record.statuses


def test_open_loop_counts_from_the_intended_time() -> None:
    given = load(concurrency=1, seconds=0.5, warmup=0.0, rate=50.0, arrivals="fixed")
    record = drive(Slow(0.001, stall=0.3), given).record
    assert len(record.latencies) + record.unsent == 25
    # With one in flight, the requests due during the stall waited for its end.
    assert sum(latency > 0.1 for latency in record.latencies) >= 9
    assert record.late >= 9


def test_open_loop_counts_what_was_never_sent() -> None:
    given = load(concurrency=1, seconds=0.3, warmup=0.1, rate=50.0, arrivals="fixed")
    record = drive(Slow(0.001, stall=0.6), given).record
    assert len(record.latencies) == 0  # the only one sent belongs to the warm-up
    assert record.unsent == 15


def test_counts_a_wrong_answer_as_an_error() -> None:
    record = drive(Slow(0.01, answer=-1.0), load(seconds=0.2, warmup=0.0, check=1)).record
    assert record.completed == 0
    assert record.statuses["WRONG"] > 0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([1, 0], False),
        ([0.999, 0.01], False),
        ([0, 1], True),
        ([1], True),
        ([np.nan, 0], True),
        ([0, 0], True),
    ],
)
def test_answer_is_wrong_beyond_the_tolerance(answer: list[float], expected: bool) -> None:
    with np.errstate(invalid="ignore"):
        assert wrong(np.array(answer, np.float32), np.array([1, 0], np.float32)) is expected


def test_a_request_holds_the_picture() -> None:
    request = service_pb2.ModelInferRequest.FromString(infer_request("embed_image", [b"JPEG"]))
    assert request.model_name == "embed_image"
    assert list(request.inputs[0].shape) == [1, 1]
    assert request.raw_input_contents == [b"\x04\0\0\0JPEG"]


@pytest.mark.parametrize(
    ("shape", "datatype", "raw"),
    [([2, 2], "FP32", 16), ([1, 2], "FP16", 4), ([1, 2], "FP32", 4), ([], "FP32", 0)],
)
def test_an_answer_of_another_form_is_no_embedding(shape: list[int], datatype: str, raw: int) -> None:
    response = service_pb2.ModelInferResponse(raw_output_contents=[bytes(raw)])
    response.outputs.add(name="EMBEDDING", datatype=datatype, shape=shape)
    assert triton_embedding(response.SerializeToString()) is None
    assert triton_embedding(b"\xff") is None


def test_an_answer_holds_the_embedding() -> None:
    row = np.array([1, 2, 3], np.float32)
    response = service_pb2.ModelInferResponse(raw_output_contents=[bytes(4), row.tobytes()])
    response.outputs.add(name="OTHER", datatype="FP32", shape=[1, 1])
    response.outputs.add(name="EMBEDDING", datatype="FP32", shape=[1, 3])
    found = triton_embedding(response.SerializeToString())
    assert found is not None
    np.testing.assert_array_equal(found, row)


def test_texts_of_one_request_are_compared_row_by_row() -> None:
    request = service_pb2.ModelInferRequest.FromString(infer_request("m", [b"a", b"b c"], "INPUT_TEXT"))
    assert list(request.inputs[0].shape) == [2, 1]
    assert request.raw_input_contents == [b"\x01\0\0\0a\x03\0\0\0b c"]
    rows = np.array([[1, 0], [0, 1]], np.float32)
    response = service_pb2.ModelInferResponse(raw_output_contents=[rows.tobytes()])
    response.outputs.add(name="EMBEDDING", datatype="FP32", shape=[2, 2])
    found = triton_embeddings(response.SerializeToString())
    assert found is not None
    assert not wrong(found, rows)
    assert wrong(found[::-1], rows)


def test_only_known_answers_are_checked() -> None:
    given = load(concurrency=1, seconds=0.3, warmup=0.0, check=1)
    for expected, answers in (({1: np.array([0, 1], np.float32)}, {"WRONG"}), ({}, set())):
        driver = Driver(Slow(0.001), given, 0, expected)
        record = driver.drive(time.perf_counter())
        assert set(record.statuses) == answers
        assert record.completed > 0
        assert bool(record.checked) is bool(expected)


def test_http_answers_are_read_when_they_are_whole() -> None:
    whole = b"HTTP/1.1 200 OK\r\nserver: a\r\nContent-Length: 3\r\n\r\nabc"
    assert [http_answer(whole[:end]) for end in (10, len(whole) - 1)] == [None, None]
    assert http_answer(whole) == (200, b"abc")
    with pytest.raises(ValueError, match="Content-Length"):
        http_answer(b"HTTP/1.1 200 OK\r\n\r\n")


@pytest.mark.parametrize(("shape", "whole"), [([1, 2], True), ([2, 2], False), ([], False)])
def test_tritons_http_answer_holds_the_embedding(shape: list[int], whole: bool) -> None:
    row = np.array([1, 2], np.float32)
    output = {"name": "EMBEDDING", "datatype": "FP32", "shape": shape, "parameters": {"binary_data_size": 8}}
    client = TritonHttpClient(Target("triton_http", "127.0.0.1:1", "embed_image"), [b"JPEG"])
    found = client.embedding(json.dumps({"outputs": [output]}).encode() + row.tobytes())
    nothing = client.embedding(b"{}")
    client.close()
    assert nothing is None
    assert (found is not None and np.array_equal(found, row)) == whole


def test_pictures_differ_by_seed() -> None:
    assert synthetic_jpeg(64, 48) == synthetic_jpeg(64, 48)
    assert len({synthetic_jpeg(64, 48, seed) for seed in range(4)}) == 4


def test_cpu_time_of_this_process_is_counted() -> None:
    before, machine = cpu_of(os.getpid()), machine_cpu()
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    used = cpu_used(before, cpu_of(os.getpid()))
    assert sum(used.values()) >= 0.05
    assert machine_cpu() >= machine
    assert cpu_of(None) == {}


def _rows(name: str) -> list[dict[str, str]]:
    about = {"date": "2026-01-02", "device": "a device", "label": "base", "dtype": "bfloat16"}
    speed = {"p50_ms": "9.5", "p95_ms": "11", "p99_ms": "12"}
    if name == "vision_waterfall":
        steps = [("as it is", "100", "1.0"), ("compiled", "150", "0.9999"), ("fused", "900", "0.9998")]
        return [
            {
                **about,
                "geometry": "base",
                "rows": "64",
                "step": step,
                "images_per_second": rate,
                "cosine_min": cosine,
            }
            for step, rate, cosine in steps
        ]
    sent = {"size": "500x375", "rate": "", "client": "grpc", "loop": "closed", **speed}
    measured = "per_second" if name == "peers" else "images_per_second"
    return [
        {
            **about,
            **sent,
            "server": server,
            "asked_dtype": "bfloat16",
            "concurrency": str(number),
            measured: str(rate),
        }
        for number in (1, 8)
        for server, rate in (("fastapi", 50 * number), ("ours", 99.5 * number), ("infinity", 20 * number))
    ]


@pytest.mark.parametrize(("name", "least"), [("serve_load", 400), ("vision_waterfall", 200), ("peers", 250)])
def test_plots_are_drawn(name: str, least: int, tmp_path: Path) -> None:
    write_csv(tmp_path / f"{name}.csv", _rows(name))
    with Image.open(plots.draw(name, tmp_path)) as image:
        assert image.width == plots.WIDTH
        assert image.height >= least
        assert len(set(np.asarray(image.convert("L")).ravel().tolist())) > 10  # something was drawn


def test_waterfall_is_no_taller_than_a_screen(tmp_path: Path) -> None:
    rows = [
        {**row, "geometry": geometry, "rows": number, "step": f"{row['step']} {turn}"}
        for geometry in ("base", "large", "giant")
        for number in ("64", "1")
        for turn in range(4)
        for row in _rows("vision_waterfall")
    ]
    write_csv(tmp_path / "vision_waterfall.csv", rows)
    with Image.open(plots.draw("vision_waterfall", tmp_path)) as image:
        assert image.height <= plots.HEIGHT


def test_waterfall_shows_the_whole_run_and_no_panel_without_the_first_step() -> None:
    whole = [{**row, "command": "all"} for row in _rows("vision_waterfall")]
    single = {**whole[2], "command": "one", "images_per_second": "901"}
    headless = {**whole[1], "geometry": "tiny"}
    figure = plots.waterfall([*whole, single, headless])
    shown = {axes.get_title(loc="left"): [text.get_text() for text in axes.texts] for axes in figure.axes}
    assert shown.pop("") == []
    expected = [" 100  1.00000", " 150  1.50 x  0.99990", " 900  9.00 x  0.99980"]
    assert shown == {"base, 64 images per pass, bfloat16": expected}
    plt.close(figure)


@pytest.mark.parametrize(
    ("value", "expected"), [(10630.5, "10,631"), (26.25, "26.3"), (471.0, "471"), (5.0, "5"), (0, "0")]
)
def test_figures_are_rounded_as_in_the_pages(value: float, expected: str) -> None:
    assert plots._thousands(value) == expected
