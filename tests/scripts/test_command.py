"""What becomes of exceptions: one line and an exit code for a user's mistake, a traceback for a fault."""

from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from stlm.errors import ConfigError, Stopped


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    from _command import run

    return run


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (None, 0, ""),
        (4, 4, ""),
        (ConfigError("what, where"), 2, "error: what, where\n"),
        (DataError("what, where"), 2, "error: what, where\n"),
        (Stopped("saved at step 3"), 3, "error: saved at step 3\n"),
        (KeyboardInterrupt(), 3, "interrupted\n"),
    ],
)
def test_outcome(run, capsys, outcome, code, message):
    def main():
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as ending:
        run(main)
    assert ending.value.code == code
    assert capsys.readouterr().err == message


def test_a_fault_keeps_its_traceback(run):
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0)
