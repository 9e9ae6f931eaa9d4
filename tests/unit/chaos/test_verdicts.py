"""Conclusions of the suite: planted deaths, hangs, failures, wrong answers and leaks become faults."""

from __future__ import annotations

import math
import os
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.chaos import abandoned, deadlines, kills, neighbours, overload, soak, starts
from tests.chaos.canaries import Canaries, difference
from tests.chaos.kills import Blow, blame
from tests.chaos.messages import of_array
from tests.chaos.processes import TRITON, Death, Member, Watch, family, grouped, kind_of
from tests.chaos.report import Report, percentile
from tests.chaos.soak import Sample, slope
from tests.chaos.traffic import Ask
from tests.chaos.verdicts import Answered, Tally, reason, suspects, windows
from tests.chaos.wires import Outcome, Reply


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(tmp_path)


def faults(report: Report) -> list[str]:
    return [row.check for row in report.rows if row.fault]


def answered(name: str, outcome: Outcome, at: float, seconds: float = 0.1) -> Answered:
    return Answered(name, name.partition(":")[0], Reply(outcome, "", "said 7", seconds, b"", at))


def test_kinds_of_processes() -> None:
    assert kind_of(["/x/bin/tritonserver", "--model-repository=/tmp/models/"]) == TRITON
    stub = ["/b/triton_python_backend_stub", "/tmp/siglip-serve-1-x/models/siglip_text_model/1/model.py", "x"]
    assert kind_of(stub) == "siglip_text_model"
    assert kind_of(["python", "-m", "siglip_gateway.doors", "grpc", "--listen"]) == "grpc door"
    assert kind_of(["python", "worker"], "siglip_vision_process") == "siglip_vision_process helper"
    assert kind_of(["python", "worker"], "siglip_vision_process helper") == "siglip_vision_process helper"
    assert kind_of(["python", "worker"], TRITON) == ""
    assert kind_of(["python", "-c", "while True: pass"]) == ""
    assert kind_of([]) == ""


def test_a_process_that_does_not_run_its_own_program_yet_is_not_taken_for_its_parent() -> None:
    stub = ["/b/triton_python_backend_stub", "/tmp/siglip-serve-1-x/models/siglip_text_model/1/model.py"]
    assert kind_of(["/x/bin/tritonserver", "--model-repository=/tmp/models/"], TRITON) == ""
    assert kind_of(stub, "siglip_text_model") == "siglip_text_model helper"
    assert kind_of(stub[:1], TRITON) == ""


def test_processes_that_end_for_one_reason_are_one_death() -> None:
    ended = [
        (10.0, Member(1, "siglip_text_model")),
        (12.5, Member(2, "siglip_text_model")),  # retired when the model was loaded again
        (60.0, Member(3, "siglip_text_model")),
        (100.0, Member(4, "team_fit")),  # of tritonserver, whose end was seen a little later
        (100.4, Member(5, TRITON)),
        (101.0, Member(6, "siglip_vision_model")),
        (103.0, Member(7, TRITON)),
        (200.0, Member(8, "grpc door")),
    ]
    found = grouped(ended)
    kinds = ["siglip_text_model", "siglip_text_model", TRITON, TRITON, "grpc door"]
    assert [death.kind for death in found] == kinds
    assert found[0].pids == (1, 2)


def test_the_watch_notices_a_killed_process() -> None:
    process = subprocess.Popen(["bash", "-c", "exec -a tritonserver sleep 60"])
    try:
        deadline = time.monotonic() + 10
        while process.pid not in family(os.getpid()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        watch = Watch(os.getpid())
        watch.start()
        process.kill()
        while not watch.deaths():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        watch.stop()
        watch.join()
        assert [(death.kind, death.pids) for death in watch.deaths()] == [(TRITON, (process.pid,))]
    finally:
        process.kill()
        process.wait()


def test_failures_around_a_death_are_its_consequence_and_others_are_faults() -> None:
    tally = Tally()
    for one in (
        answered("text:1:1", Outcome.INTERNAL, at=50),
        answered("text:1:2", Outcome.INTERNAL, at=100.2),
        answered("text:1:3", Outcome.LOST, at=100),
        answered("text:1:4", Outcome.HANG, at=112, seconds=10),
        answered("text:1:5", Outcome.HANG, at=130, seconds=10),
        answered("text:1:6", Outcome.LOST, at=130),
        answered("text:1:7", Outcome.ANSWERED, at=1),
    ):
        tally.note(one)
    dead = windows(
        [Death(TRITON, 100.3, (1,)), Death("siglip_vision_process helper", 50, (2,))], [104.0], 999
    )
    assert len(dead) == 1
    found = {outcome: [one.name for one in tally.faults(outcome, dead)] for outcome in Outcome}
    assert found[Outcome.INTERNAL] == ["text:1:1"]
    assert found[Outcome.LOST] == ["text:1:6"]
    assert found[Outcome.HANG] == ["text:1:5"]
    assert (tally.total, tally.sum(Outcome.LOST)) == (7, 2)


def test_suspects_are_the_cases_under_way_the_lost_ones_first() -> None:
    ended = [
        answered("text:1:1", Outcome.ANSWERED, at=97),
        answered("text:1:2", Outcome.ANSWERED, at=99.8),
        answered("text:1:3", Outcome.INTERNAL, at=100.1),
        answered("text:1:4", Outcome.LOST, at=100.05),
        answered("text:1:5", Outcome.LOST, at=103, seconds=0.1),  # sent when it was dead
    ]
    assert suspects(Death(TRITON, 100.2, (1,)), ended) == ["text:1:4", "text:1:3", "text:1:2"]


def test_messages_are_counted_without_their_numbers() -> None:
    assert (
        reason("no model 'x' at 0x7f and 12")
        == reason("no model 'abc' at 0x1  and 7")
        == "no model # at # and #"
    )


def answer(*values: float) -> bytes:
    from tritonclient.grpc import service_pb2

    made = service_pb2.ModelInferResponse()
    tensor = of_array("EMBEDDING", np.array([values], np.float32))
    made.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    made.raw_output_contents.append(tensor.data)
    return bytes(made.SerializeToString())


def test_a_neighbours_row_is_a_wrong_answer() -> None:
    canaries = Canaries()
    canaries.learned({"embed": b""}, {"embed": {"EMBEDDING": np.array([[0.6, 0.8]], np.float32)}})
    assert canaries.check("embed", answer(0.6, 0.8)) == ""
    assert canaries.check("embed", answer(0.6, 0.8 + 4e-7)) == ""
    assert "off by 0.2" in canaries.check("embed", answer(0.8, 0.6))
    assert "off by" in canaries.check("embed", answer(0.6, 0.80001))
    assert "off by inf" in canaries.check("embed", answer(0.6, math.nan))
    assert "off by inf" in canaries.check("embed", answer(0.6, 0.8, 0.0))


def test_differences_of_names_and_whole_numbers_are_infinite() -> None:
    one = {"LABELS": np.array([0, 1], np.int32)}
    assert difference(one, {"LABELS": np.array([0, 1], np.int32)}) == 0
    assert difference(one, {"LABELS": np.array([1, 1], np.int32)}) == math.inf
    assert difference({}, one) == math.inf


def test_an_error_and_a_wrong_answer_after_a_kill_are_faults(report: Report) -> None:
    blows = [
        Blow(TRITON, "kill", 10.0, 15.0),
        Blow("team_fit", "kill", 20.0, 22.0),
        Blow("team_fit", "stop", 30.0, 31.0),
    ]
    good = [Ask("Client", "embed", at, at + 0.1) for at in (5.0, 12.0, 21.0, 30.5)]
    kills.tell(report, blows, good, 0)
    assert faults(report) == []
    kills.tell(report, blows, [*good, Ask("Client", "embed", 20.5, 21.5, error="ServerError: dead")], 0)
    assert faults(report) == ["kill team_fit, 1 times"]
    kills.tell(report, blows, [*good, Ask("Client", "embed", 30.1, 31.5, wrong="off by 1")], 1)
    assert faults(report)[1:] == ["stop team_fit, 1 times", "answers lost"]
    assert [len(asks) for asks in blame(blows, good).values()] == [1, 1, 1, 1]


def test_a_server_that_comes_back_late_or_never_is_a_fault(report: Report) -> None:
    kills.tell(report, [Blow(TRITON, "kill", 10.0, 20.5)], [], 0)
    kills.tell(report, [Blow("team_fit", "kill", 10.0, 190.0, back=False)], [], 0)
    assert faults(report) == ["kill tritonserver, 1 times", "kill team_fit, 1 times"]


def test_a_failed_start_is_a_fault(report: Report) -> None:
    starts.tell(report, "quiet", [5.0, 7.0], [])
    starts.tell(report, "busy", [5.0], ["start 1 failed after 300 s: not ready"])
    assert faults(report) == ["2 starts busy"]
    assert report.rows[0].result == "2 served, median 7.0 s, longest 7.0 s"


def test_unanswered_requests_of_an_overload_are_a_fault(report: Report) -> None:
    sent: dict[str, Any] = {"sent": 100, "seconds": 1.0, "never": 0}
    overload.tell(report, "http", 10, [{**sent, "counts": {"answered": 40, "refused": 60}}], 0)
    assert faults(report) == []
    overload.tell(report, "http", 10, [{**sent, "counts": {"answered": 97, "unanswered": 2}, "never": 1}], 1)
    assert faults(report) == ["http: never answered", "http: deaths of processes"]
    assert report.rows[-4].result == "3"


def test_a_death_or_a_slow_neighbour_of_impatient_callers_is_a_fault(report: Report) -> None:
    patient = deadlines.Patient()
    patient.seconds = [0.01] * 98 + [0.03] * 2
    deadlines.tell(report, "late", patient, 20.0, None, {"unanswered": 3})
    assert faults(report) == []
    deadlines.tell(report, "late", patient, 14.0, None, {})
    deadlines.tell(report, "gone", patient, 14.0, 2.5, {})
    assert faults(report) == ["late: the patient caller, 100 answers", "gone: no count"]
    patient.refused, patient.failed = 5, ["lost"]
    deadlines.tell(report, "full", patient, 20.0, None, {})
    assert faults(report)[2:] == ["full: its refusals", "full: its failures, wrong answers"]


def test_work_for_callers_that_have_gone_is_a_fault(report: Report) -> None:
    abandoned.tell(report, "a", 790, 0.10, 0.02, 5)
    assert faults(report) == []
    abandoned.tell(report, "b", 790, 0.13, 0.02, 6)
    assert faults(report) == ["b: wait of the next caller", "b: images decoded for no caller"]
    metrics = (
        '# HELP x\nsiglip_serve_images_total{model="a"} 5\nsiglip_serve_images_total{model="b"} 2\nother 9\n'
    )
    assert abandoned.decoded(metrics) == 7


def test_a_caller_who_waits_for_costly_pictures_is_a_fault(report: Report) -> None:
    patient = deadlines.Patient()
    patient.seconds = [0.01] * 98 + [0.9] * 2
    neighbours.tell(report, "GIF", 100, patient, Counter({"refused INVALID_ARGUMENT": 4}))
    assert faults(report) == []
    patient.seconds[-2:], patient.refused, patient.wrong = [1.1] * 2, 5, 1
    neighbours.tell(report, "PNG", 100, patient, Counter())
    name = "2 x 128 of the costliest PNG: "
    problems = ["the other caller, 100 answers", "its refusals", "its failures, wrong answers"]
    assert faults(report) == [name + problem for problem in problems]
    patient.seconds, patient.refused, patient.wrong = [], 0, 0
    neighbours.tell(report, "BMP", 100, patient, Counter())
    assert faults(report)[3:] == ["2 x 128 of the costliest BMP: the other caller, 0 answers"]


def test_a_slope_is_that_of_the_line() -> None:
    seconds = [0.0, 10.0, 20.0, 30.0]
    found = slope(seconds, [5.0 + 0.01 * at for at in seconds])
    assert found.per_hour == pytest.approx(36)
    assert found.error == pytest.approx(0, abs=1e-9)
    assert slope(seconds, [1.0, 2.0, 1.0, 2.0]).error > 100
    assert slope([0.0, 1.0], [1.0, 2.0]).error == math.inf


def test_a_leak_of_descriptors_is_a_fault_and_noise_is_none(report: Report) -> None:
    def samples(kind: str, rise: float, noise: float) -> list[Sample]:
        rows = range(60)
        return [Sample(10.0 * n, kind, 1, 100 + noise * (n % 2), 80, 40 + rise * n, 9) for n in rows]

    soak.tell(report, samples("steady", 0, 20) + samples("leaking", 0.1, 0))
    assert faults(report) == ["leaking"]
    soak.tell(report, [Sample(10.0 * n, "/dev/shm", 0, 0, 0, 0, 0, shared_memory=n) for n in range(60)])
    assert faults(report)[1:] == ["/dev/shm"]


def test_a_report_is_a_table_and_a_file_of_findings(report: Report) -> None:
    report.add("fuzz", "deaths", 2, "0", True)
    report.add("fuzz", "a | b", "x\ny")
    report.find("fuzz", "death", "tritonserver", "text:1:7")
    assert report.faults == 1
    assert "| fuzz | deaths | 2 | 0 | FAULT |" in (report.folder / "table.md").read_text()
    assert "| fuzz | a / b | x y |  |  |" in report.markdown()
    assert (report.folder / "table.csv").read_text().splitlines()[1] == "fuzz,deaths,2,0,True"
    assert '"case": "text:1:7"' in (report.folder / "findings.jsonl").read_text()


def test_percentiles() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(n) for n in range(100)], 0.99) == 99.0
    assert percentile([], 0.5) == 0.0


def test_a_process_that_no_one_watches_has_no_family() -> None:
    assert family(2**22 - 3) == {}
