"""Errors that a user can cause: scripts print one message, without a traceback, and exit with `exit_code`."""


class StlmError(Exception):
    """Base of these errors. A message says what, where, what was expected and what to do."""

    exit_code = 2


class ConfigError(StlmError):
    """The configuration cannot be used; the message lists every problem, each with its place."""


class CheckpointError(StlmError):
    """A checkpoint, model or run directory is missing, incomplete, damaged, does not fit, or cannot be written."""


class ConversionError(StlmError):
    """A model cannot be converted as was asked; nothing was written."""


class EngineError(StlmError):
    """The training engine cannot do what was asked on this machine."""


class Stopped(StlmError):
    """Training ended early on a signal, after saving; rerunning the command resumes it."""

    exit_code = 3


class NonFinite(StlmError):
    """A loss or gradient is infinite or not a number; the last checkpoint is untouched."""

    exit_code = 1


class LostRank(StlmError):
    """Another rank has ended, and training cannot continue without it."""

    exit_code = 1
