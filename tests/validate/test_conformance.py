"""`python -m validate.conformance` against servers with one mistake each, and against a right one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from paths import TINY
from wrong_server import MISTAKES, Model, wrong_server

from validate.conformance import __main__ as command
from validate.conformance.check import check_server
from validate.conformance.dialects import Endpoint
from validate.conformance.towers import Towers
from validate.conformance.verdicts import Verdict
from validate.reference import Reference


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(TINY)


@pytest.fixture(scope="module")
def towers() -> Towers:
    return Towers(str(TINY), "cpu")


def verdicts(
    model: Model, towers: Towers, mistake: str, only: tuple[str, ...] = ("text", "picture")
) -> list[Verdict]:
    with wrong_server(model, mistake) as url:
        return check_server(Endpoint(url, "openai"), towers, 0.999, only)


def test_a_right_server_has_no_fault(model: Model, towers: Towers) -> None:
    found = verdicts(model, towers, "")
    assert [verdict for verdict in found if verdict.status == "fault"] == []
    unseen = {(verdict.kind, verdict.check) for verdict in found if verdict.status == "unseen"}
    assert unseen == set(), "every fault would be seen with the bundled checkpoint"
    assert all("float32:" in verdict.evidence for verdict in found if verdict.check == "precision")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_and_named(model: Model, towers: Towers, mistake: str) -> None:
    only, check, words = MISTAKES[mistake]
    found = verdicts(model, towers, mistake, only)
    faults = {verdict.check: verdict for verdict in found if verdict.status == "fault"}
    assert words in faults[check].evidence
    # Texts that are not padded depend on those of the same request, too.
    assert faults.keys() - {check} <= ({"batch"} if mistake == "unpadded" else set())


def test_the_reference_is_that_of_parity(towers: Towers, tmp_path: Path) -> None:
    from validate.conformance.inputs import TEXTS, pictures
    from validate.conformance.recipes import ImageRecipe, TextRecipe

    reference = Reference(str(TINY), "cpu")
    texts = list(TEXTS.values())
    expected = torch.from_numpy(reference.embed_texts(texts))
    assert torch.equal(torch.from_numpy(towers.texts(TextRecipe(), [texts])), expected)
    files = []
    for number, picture in enumerate(pictures()):
        files.append(tmp_path / str(number))
        files[-1].write_bytes(picture.data)
    found = towers.images(ImageRecipe(), [picture.data for picture in pictures()])
    assert torch.allclose(torch.from_numpy(found), torch.from_numpy(reference.embed_images(files)), atol=1e-5)


def test_command(
    model: Model,
    towers: Towers,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "Towers", lambda *_: towers)
    table = tmp_path / "verdicts.csv"
    given = ["--api", "openai", "--checkpoint", str(TINY), "--device", "cpu", "--csv", str(table)]
    given += ["--only", "picture"]
    with wrong_server(model, "no exif") as url:
        assert command.main([url, *given, "--label", "stub", "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert command.main([url, *given, "--label", "stub"]) == 1
    assert [row["check"] for row in found if row["status"] == "fault"] == ["EXIF"]
    assert "fault   picture  EXIF            the EXIF orientation is ignored" in capsys.readouterr().out
    rows = table.read_text(encoding="utf-8").splitlines()
    assert len(rows) == len(found) + 1, "the second run replaces the first"


def test_errors_name_the_cause(
    towers: Towers, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "Towers", lambda *_: towers)
    given = ["--api", "weaviate", "--checkpoint", str(TINY), "--device", "cpu"]
    assert command.main(["http://127.0.0.1:9", *given]) == 2
    assert "http://127.0.0.1:9/vectorize: cannot be reached" in capsys.readouterr().err
    assert command.main(["http://127.0.0.1:9", *given, "--header", "key"]) == 2
    assert "--header: got 'key', expected NAME: VALUE" in capsys.readouterr().err
