"""The exception tree and the exit code of each kind of failure.

Every error a user can cause is a `FituneError`; its message says what was given, what is allowed and what
to do. The command line prints the message without a traceback and exits with `exit_code`.
"""

from __future__ import annotations

EXIT_OK = 0


class FituneError(Exception):
    """Base of every error that fitune raises on purpose."""

    exit_code = 1


class ConfigError(FituneError, ValueError):
    """The configuration, the model folder or the command line cannot work as given."""

    exit_code = 2


class MissingDependencyError(FituneError, ImportError):
    """An optional package is needed for what was asked; the message has the install command."""

    exit_code = 2


class DataError(FituneError, ValueError):
    """Rows of a data file cannot be used; the message names `file:line`."""

    exit_code = 3


class PlanError(FituneError, RuntimeError):
    """Nothing that was asked for fits the memory there is."""

    exit_code = 4


class OutOfMemoryError(FituneError, RuntimeError):
    """The device ran out of memory."""

    exit_code = 4


class DivergedError(FituneError, RuntimeError):
    """Loss or gradients stayed non-finite; no such step was applied or saved."""

    exit_code = 5


class CheckpointError(FituneError, RuntimeError):
    """A checkpoint or run folder cannot be written, read or locked."""

    exit_code = 6


class Interrupted(FituneError, RuntimeError):
    """A signal stopped the run after a checkpoint was committed; `fitune resume` continues it."""

    exit_code = 75
