"""The comparison with other servers: what is sent, how rounds become rows, and the peer written here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
from paths import ROOT

from benchmarks import peers
from benchmarks.inputs import synthetic_jpeg, synthetic_texts
from benchmarks.load import Load, Result, first_answers
from benchmarks.load_clients import Target, connect
from benchmarks.peer_model import TransformersModel
from benchmarks.peer_servers import Choice, bodies, run_server, stopped
from benchmarks.records import cosine

TINY = ROOT / "checkpoints" / "siglip-tiny"
HTTP = Target("http", "127.0.0.1:1", "/")


def result(rate: float, latencies: list[float], server: float = 1.0) -> Result:
    load = Load(HTTP, [b"a"], concurrency=8, seconds=2.0)
    return Result(
        load, np.array(latencies), int(2 * rate), Counter(), 0, 0, 1, 0.5, 1.5, {"python": 2 * server * rate}
    )


def test_bodies_are_those_of_each_dialect() -> None:
    assert bodies(HTTP, "image", [b"JPEG"]) == [b"JPEG"]
    assert bodies(HTTP, "text", ["größe"]) == ["größe".encode()]
    openai = [json.loads(body) for body in bodies(Target("openai", "", ""), "image", [b"one", b"two"])]
    assert [len(body["input"]) for body in openai] == [1, 1]
    assert openai[0]["modality"] == "image"
    (weaviate,) = bodies(Target("weaviate", "", ""), "text", ["a dog"])
    assert json.loads(weaviate) == {"texts": ["a dog"], "images": []}


def test_texts_are_new_in_every_round() -> None:
    rounds = [synthetic_texts(300, mark) for mark in ("8 0", "8 1", "1 0", "reference")]
    assert len({text for texts in rounds for text in texts}) == 1200


def test_ratios_are_of_the_same_round() -> None:
    results = {
        "ours": [result(30, [0.1]), result(10, [0.3])],
        "fastapi": [result(10, [0.5]), result(5, [0.9])],
    }
    found = peers._ratios(results, "fastapi")
    assert found == {"ratio": "2.50", "lowest_ratio": "2.00", "highest_ratio": "3.00"}
    assert set(peers._ratios(results, "ours").values()) == {""}


def test_rounds_become_one_row() -> None:
    row = peers._measured([result(30, [0.1, 0.2], server=0.01), result(10, [0.3], server=0.03)])
    assert (row["per_second"], row["answers"], row["rounds"]) == ("20.00", "3", "2")
    assert (row["p50_ms"], row["server_cpu_ms"]) == ("200.00", "20.00")
    assert row["other_cores"] == "0.95"  # of 1.5 busy ones the server had 0.3, the client 0.25


def test_closest_inputs_are_two_different_ones() -> None:
    rows = np.array([[1, 0], [0, 2], [3, 3]], np.float32)
    assert peers._closest(rows) == pytest.approx(0.5**0.5)


def test_stopped_servers_do_nothing_until_they_go_on() -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE) as process:
        parent = psutil.Process(process.pid)
        while not parent.children():
            pass
        members = [parent, *parent.children()]
        with stopped([process.pid]):
            while any(member.status() != psutil.STATUS_STOPPED for member in members):
                pass
        while any(member.status() == psutil.STATUS_STOPPED for member in members):
            pass
        process.communicate(b"\n", timeout=60)


def test_peer_answers_each_request_of_a_batch_with_its_own_embedding() -> None:
    jpegs = [synthetic_jpeg(64, 48, seed) for seed in range(5)]
    texts = synthetic_texts(3)
    with run_server("fastapi", Choice(TINY, "cpu", "float32", {}), jpegs[0], timeout=100) as server:
        way = server.program.ways["fastapi"]
        one_by_one = first_answers(way.image, jpegs)
        client = connect(way.image, [*jpegs, b"no picture"])
        for ticket in range(6):
            client.send(ticket, ticket)
        answers: dict[int, tuple[str, bytes]] = {}
        while len(answers) < 6 and (ended := client.wait(60)):
            answers |= {ticket: (status, body) for ticket, status, body in ended}
        client.close()
        of_texts = first_answers(way.text, bodies(way.text, "text", texts))
    assert answers.pop(5)[0] == "HTTP_400"
    together = np.stack([np.frombuffer(answers[ticket][1], np.float32) for ticket in range(5)])
    model = TransformersModel(TINY)
    pixels = model.pixels([model.decode(jpeg) for jpeg in jpegs])
    np.testing.assert_allclose(one_by_one, model.embed_pixels(pixels), atol=1e-4)
    np.testing.assert_allclose(together, one_by_one, atol=1e-4)
    np.testing.assert_allclose(of_texts, model.embed_texts(texts), atol=1e-4)
    assert cosine(one_by_one[:-1], one_by_one[1:]).max() < 0.999


def test_a_server_that_ends_is_named(tmp_path: Path) -> None:
    choice = Choice(tmp_path, "cpu", "float32", {})  # no checkpoint is there
    with (
        pytest.raises(RuntimeError, match="fastapi: ended during its start"),
        run_server("fastapi", choice, b"", timeout=100),
    ):
        pass


def test_weaviate_needs_its_code() -> None:
    with (
        pytest.raises(ValueError, match="--weaviate FOLDER"),
        run_server("weaviate", Choice(TINY, "cpu", "float32", {}), b"", timeout=1),
    ):
        pass
