"""Progress bars on a terminal, and progress lines in a log."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import pytest
from tqdm import tqdm

from data_pipeline import progress
from data_pipeline.progress import Progress

ROOT = Path(__file__).parents[2]


class Clock:
    """A clock that advances only on request."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def work(clock, file, seconds, **options):
    """Report one update each second."""
    with Progress(total=seconds, desc="reading", unit=" documents", file=file, **options) as bar:
        bar._time = lambda: clock.now
        bar.start_t = bar.last_print_t = 0.0
        for _ in range(seconds):
            clock.now += 1
            bar.update()


@pytest.mark.parametrize("options", [{}, {"leave": False}, {"delay": 1}])
def test_a_log_has_a_line_at_intervals(clock, options):
    log = io.StringIO()
    work(clock, log, 200, **options)
    text = log.getvalue()
    assert "\r" not in text and "\x1b" not in text
    lines = text.splitlines()
    assert 3 <= len(lines) <= 200 / progress.LINE_EVERY_S
    assert lines[0].startswith("reading: 15 %, 30 of 200, ") and lines[0].endswith(" left")


def test_a_log_of_short_work_has_none(clock):
    log = io.StringIO()
    work(clock, log, 20)
    assert log.getvalue() == ""


def test_lines_written_in_between_add_no_progress_lines(clock, capsys):
    """Lines written by tqdm.write, such as those of training steps, redraw bars on a terminal."""
    with Progress(total=9, desc="validation") as bar:
        for _ in range(9):
            bar.update()
            tqdm.write("step")
    captured = capsys.readouterr()
    assert captured.out == "step\n" * 9 and captured.err == ""


def test_a_terminal_has_a_bar(clock):
    screen = io.StringIO()
    screen.isatty = lambda: True
    work(clock, screen, 5, mininterval=0, miniters=1)
    assert screen.getvalue().count("\r") >= 5


@pytest.mark.parametrize("folder", ["data_pipeline", "stlm", "scripts", "benchmarks"])
def test_all_progress_is_reported_this_way(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        if path != Path(progress.__file__):
            calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            assert not {"tqdm", "trange", "tqdm.tqdm", "tqdm.auto.tqdm"} & {ast.unparse(call) for call in calls}, path
