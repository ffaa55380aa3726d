"""Errors that a user can mend.

``UserError`` is for bad input: its text is one clear sentence that names the culprit (file, key or
value) and the remedy. The scripts print it without a traceback (``lib.cli.run_main``).
"""

import traceback

_LONGEST_REASON = 200


def reason(error: BaseException) -> str:
    """What an error of another library says, on one line of at most 200 characters; where it says nothing, as a
    bare assertion does, the line of code that raised it."""
    text = ' '.join(str(error).split())
    if not text:
        frames = traceback.extract_tb(error.__traceback__)
        text = (frames[-1].line if frames else '') or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + '...'


class UserError(Exception):
    """Bad input. The message names the file, key or value and what to do about it.

    It stays on one line, also where a name in it has several.
    """

    def __init__(self, message):
        super().__init__(' '.join(str(message).splitlines()))


def missing_package(error: ModuleNotFoundError) -> UserError:
    """The sentence for a Python package that is not there."""
    return UserError(
        f'the Python package {error.name!r} is not installed; run "make install" in the repository and use '
        '.venv/bin/python'
    )


class ConfigError(UserError):
    """A config file, key or ``--override`` is wrong."""


class DataError(UserError):
    """A data file is missing, unreadable, or not what it should be."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or of another model."""
