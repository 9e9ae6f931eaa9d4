"""Parameters of a request, as Triton hands them over."""

from __future__ import annotations

import importlib
import json
import sys
import time
from types import ModuleType
from typing import Any

import pytest

from siglip_serve.errors import ParameterError, UnavailableError

REQUEST = "siglip_serve.serving.request"


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that reads requests, without the module that only exists within Triton."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", ModuleType("triton_python_backend_utils"))
    monkeypatch.delitem(sys.modules, REQUEST, raising=False)
    module = importlib.import_module(REQUEST)
    yield module
    sys.modules.pop(REQUEST, None)


class Sent:
    """A request of Triton with parameters only."""

    def __init__(self, timeout: int = 0, **parameters: object) -> None:
        self._text, self._timeout = json.dumps(parameters), timeout

    def parameters(self) -> str:
        return self._text

    def timeout(self) -> int:
        """Microseconds; Triton takes this parameter from the others."""
        return self._timeout


@pytest.mark.parametrize(
    ("given", "cut"),
    [
        (True, True),
        (False, False),
        ("true", True),
        ("False", False),
        ("longest_first", True),
        ("only_first", True),
        ("only_second", True),
        ("LONGEST_FIRST", True),
        ("do_not_truncate", False),
    ],
)
def test_truncation_is_a_boolean_or_a_strategy_of_transformers(
    given: object, cut: bool, requests: Any
) -> None:
    assert requests.Request(Sent(truncation=given)).truncates() is cut


def test_texts_are_not_cut_unless_truncation_is_given(requests: Any) -> None:
    assert requests.Request(Sent()).truncates() is False


@pytest.mark.parametrize("given", [1, 0.5, "", "longest", "yes", None])
def test_refuses_another_truncation(given: object, requests: Any) -> None:
    expected = r"^parameter 'truncation': got .*, expected true or false, or one of longest_first, only_first"
    with pytest.raises(ParameterError, match=expected):
        requests.Request(Sent(truncation=given)).truncates()


@pytest.mark.parametrize("given", ["longest_first", 1])
def test_other_flags_are_booleans_only(given: object, requests: Any) -> None:
    with pytest.raises(ParameterError, match=r"expected true or false$"):
        requests.Request(Sent(normalized=given)).flag("normalized")


class Undecodable:
    """A request of Triton whose parameters are not UTF-8."""

    def parameters(self) -> str:
        return b"{\x80".decode()


def test_refuses_parameters_that_are_not_utf8(requests: Any) -> None:
    with pytest.raises(
        ParameterError, match=r"^a parameter's name or value is not UTF-8 \(invalid start byte"
    ):
        requests.Request(Undecodable())


def ago(seconds: float) -> int:
    return round((time.monotonic() - seconds) * 1e6)


@pytest.mark.parametrize("form", [int, str])  # of gRPC, and of an HTTP header
def test_drops_a_request_that_has_waited_for_too_long(form: Any, requests: Any) -> None:
    with pytest.raises(UnavailableError, match=r"^Request timeout expired$"):
        requests.Request(Sent(timeout=500_000, arrived=form(ago(1))))


@pytest.mark.parametrize(
    ("timeout", "waited"),
    [(0, 1e5), (600_000_000, 1), (600_000_000, -1)],
)
def test_takes_a_request_without_a_timeout_or_in_time(timeout: int, waited: float, requests: Any) -> None:
    assert requests.Request(Sent(timeout=timeout, arrived=ago(waited))).flag("normalized") is False


@pytest.mark.parametrize("given", ["", "soon", None, [1]])
def test_refuses_an_arrival_that_is_no_time(given: object, requests: Any) -> None:
    with pytest.raises(ParameterError, match=r"^parameter 'arrived': got .*, expected microseconds$"):
        requests.Request(Sent(timeout=1, arrived=given))
