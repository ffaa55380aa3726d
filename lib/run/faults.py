"""Runs that cannot go on: what is written down, and what the user is told."""

import math
import os
from pathlib import Path
from typing import Dict, List, Mapping

from ..checkpoint import save_checkpoint
from ..errors import UserError
from ..io import write_json


class RunStopped(UserError):
    """The run cannot go on; the message says why and what was saved. Every process raises it."""


class NonFinite(Exception):
    """A loss or the gradient is NaN or infinite; the weights have not been touched.

    Args:
        what: a sentence without its end.
        values: losses, and the gradient norm as far as it is known.
    """

    def __init__(self, what: str, values: Mapping[str, float]):
        super().__init__(what)
        self.values = dict(values)

    def bad_names(self) -> str:
        """Names of the values that are not finite."""
        return ', '.join(name for name, value in self.values.items() if not math.isfinite(value))


def report_non_finite(
    error: NonFinite, iteration: int, tokens: List, facts: Dict, state: Mapping, folder: Path
) -> RunStopped:
    """Write the state before a bad step and what is known about it; the error to raise.

    Args:
        error: what was not finite.
        iteration: 1-based number of the bad step.
        tokens: sample tokens by process and forward pass.
        facts: learning rate and the like; plain values.
        state: checkpoint of the state before the step.
        folder: run folder; ``nonfinite_iter_N.json`` and ``.pth`` go there. Resuming does not look at them.
    """
    stem = folder / ('nonfinite_iter_%d' % iteration)
    evidence = dict(
        facts,
        what=str(error),
        iteration=iteration,
        sample_tokens_by_process_and_pass=tokens,
        values={name: repr(value) for name, value in error.values.items()},
    )
    try:
        write_json(f'{stem}.json', evidence)
        save_checkpoint(f'{stem}.pth', state)
        saved = f'the state before it is in {stem}.pth, the facts in {os.path.basename(str(stem))}.json'
    except UserError as failure:
        saved = str(failure)
    flat = [str(token) for of_process in tokens for of_pass in of_process for token in of_pass]
    return RunStopped(
        '%s at iteration %d (%s), samples %s; %s; lower optimizer.lr, check those samples, or '
        'use no --amp' % (error, iteration, error.bad_names(), ', '.join(flat), saved)
    )
