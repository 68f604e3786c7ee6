"""Work in a background thread during the next steps, such as writing a checkpoint to a slow disk."""

from __future__ import annotations

import threading
from collections.abc import Callable


class AsyncWriter:
    """Runner of one function at a time in a thread. `wait` raises the function's error."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """True while the function runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """True if `wait` would raise an error of a function that has ended."""
        return self._error is not None

    def start(self, function: Callable[[], object]) -> None:
        """Start `function`, after waiting for the one before."""
        self.wait()

        def work() -> None:
            try:
                function()
            except BaseException as error:
                self._error = error

        # Not a daemon, so that the process finishes the work before it exits.
        self._thread = threading.Thread(target=work, name="stlm-background", daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing runs. Raises the function's error, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
