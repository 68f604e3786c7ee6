"""Freed memory stays with the process."""

import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from stlm.training.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(16 << 20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

{call}
faults()
print(faults())
"""


def faults_of_ten_tensors(call: str) -> int:
    """Return how many new pages ten large tensors touch, each in the place of a freed one, in a new process."""
    program = PROGRAM.format(call=call)
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_the_kernel_clears_no_page_twice() -> None:
    assert faults_of_ten_tensors("assert keep_freed_memory()") < 100
    assert faults_of_ten_tensors("") > 100_000  # of 163,840 pages
