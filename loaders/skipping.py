"""Counting samples that could not be read and were replaced."""

import sys

import torch

from lib.errors import DataError

_MAX_WORKERS = 1024


class SkipCounter:
    """Replaced samples of one process and its workers, with a limit.

    Each worker counts in a slot of its own in shared memory, so no count is lost.

    Args:
        limit: how many samples may be replaced.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._slots = torch.zeros(_MAX_WORKERS, dtype=torch.int64).share_memory_()

    @property
    def total(self) -> int:
        return int(self._slots.sum())

    def count(self, error: DataError) -> None:
        """Count one more and say so.

        Raises:
            DataError: that was one too many.
        """
        worker = torch.utils.data.get_worker_info()
        self._slots[0 if worker is None else 1 + worker.id % (_MAX_WORKERS - 1)] += 1
        print('warning: sample replaced by the next one (%d so far): %s' % (self.total, error), file=sys.stderr)
        if self.total > self.limit:
            raise DataError(
                '%d samples could not be read, more than max_skipped=%d allows; the last one: %s'
                % (self.total, self.limit, error)
            ) from error
