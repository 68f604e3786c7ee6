"""Work that goes on beside the next steps, such as writing a checkpoint to a slow disk."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs one function at a time in a thread; what it raises is raised again where one waits for it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether the function is still under way."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether an error waits to be raised."""
        return self._error is not None

    def start(self, function: Callable[[], object]) -> None:
        """Begin `function`; the one before is waited for."""
        self.wait()

        def work() -> None:
            try:
                function()
            except BaseException as error:
                self._error = error

        # Not a daemon: a process that comes to its end lets the work be finished.
        self._thread = threading.Thread(target=work, name="stlm-background", daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is under way. Raises what the function raised, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
