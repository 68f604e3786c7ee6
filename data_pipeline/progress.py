"""Progress of a task: a bar on a terminal, an occasional line in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

LINE_EVERY_S = 30.0  # if the output is not a terminal
_LINE = "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left"


class Progress(tqdm):
    """The progress bar of tqdm. If standard error is a file or a pipe, it prints a whole line at most every
    `LINE_EVERY_S` instead: a bar that redraws itself would fill a log with carriage returns.
    """

    monitor_interval = 0  # no monitor thread, so that workers may be forked: see workers.py

    def __init__(self, *arguments: Any, **options: Any) -> None:
        file = options.get("file") or sys.stderr
        self._terminal = bool(file.isatty())
        self._line_due = time.monotonic() + LINE_EVERY_S
        if not self._terminal:
            options |= {"mininterval": LINE_EVERY_S, "delay": LINE_EVERY_S, "leave": False}
        super().__init__(*arguments, **options)
        if not self._terminal and not self.disable and self.total:
            self.bar_format = _LINE

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        if self._terminal:
            return super().display(msg, pos)
        if msg is None and time.monotonic() >= self._line_due:
            self._line_due = time.monotonic() + LINE_EVERY_S
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return None  # nothing is on the screen to clear

    def clear(self, nolock: bool = False) -> None:
        if self._terminal:
            super().clear(nolock=nolock)
