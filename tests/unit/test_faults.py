"""The list of planted faults fits the code: `make mutants` can plant each of them."""

from __future__ import annotations

import pytest
from paths import ROOT

from tests.mutants import Fault, find_tests, load_faults, locate

LISTED = load_faults()


@pytest.mark.parametrize("fault", LISTED, ids=lambda fault: fault.name)
def test_fault_can_be_planted(fault: Fault) -> None:
    locate(ROOT, fault)
    for test in find_tests(ROOT, fault.tests):
        assert (ROOT / test.partition("::")[0]).exists(), test
