"""Errors that a user can mend.

``UserError`` is for bad input: its text is one clear sentence that names the culprit (file, key or
value) and the remedy. The scripts print it without a traceback (``lib.cli.run_main``).
"""


class UserError(Exception):
    """Bad input. The message names the file, key or value and what to do about it."""


class ConfigError(UserError):
    """A config file, key or ``--override`` is wrong."""


class DataError(UserError):
    """A data file is missing, unreadable, or not what it should be."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or of another model."""
