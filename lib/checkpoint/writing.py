"""Writing checkpoints so that none is ever half there."""

import zipfile
from typing import Mapping

import torch

from ..errors import CheckpointError, UserError
from ..io import atomic_write
from .reading import check_archive


def save_checkpoint(path: str, checkpoint: Mapping) -> None:
    """Write a checkpoint; it appears under its name only once it is complete and on the disk.

    Raises:
        UserError: it cannot be written (disk full, no permission); an older file of that name is untouched.
    """
    try:
        with atomic_write(path) as temporary, open(str(temporary), 'wb') as stream:
            patient = _PatientStream(stream)
            torch.save(checkpoint, patient)
            patient.raise_error()
    except OSError as error:
        raise UserError(
            f'cannot write {path}: {error.strerror or error}; free some space or choose another folder (earlier checkpoints '
            'are untouched)'
        ) from error


class _PatientStream:
    """Keeps the first error until asked for it: torch 1.10 dies of an exception inside torch.save."""

    def __init__(self, stream):
        self._stream, self._error = stream, None

    def write(self, data):
        if self._error is None:
            try:
                self._stream.write(data)
            except OSError as error:
                self._error = error
        return len(data)

    def flush(self):
        """Closing the file flushes it, and raises what there is to raise."""

    def raise_error(self):
        if self._error is not None:
            raise self._error


def is_complete(path: str) -> bool:
    """Whether a checkpoint that this project wrote is whole: a zip archive whose check sums all agree."""
    try:
        check_archive(str(path))
        return zipfile.is_zipfile(str(path))
    except (CheckpointError, OSError):
        return False
