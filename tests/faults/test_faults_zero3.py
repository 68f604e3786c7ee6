"""Every fault of the matrix at ZeRO stage 3."""

from __future__ import annotations

import pytest
from matrix import FAULTS

STAGE = 3
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(stage, fault, tmp_path):
    stage.suffer(fault, tmp_path)
