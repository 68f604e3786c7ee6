"""The table in docs/faults.md lists exactly the faults that are tested."""

from __future__ import annotations

import injections
from matrix import FAULTS, STAGES, in_docs, table


def test_the_table_in_the_docs_is_that_of_the_tests():
    assert in_docs() == table(), "docs/faults.md is stale: python tests/faults/matrix.py"


def test_every_fault_is_there_once():
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) >= 20
    assert {fault.inject for fault in FAULTS if fault.inject} == set(injections.FAULTS)
    assert STAGES == (0, 2, 3)
