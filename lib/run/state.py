"""What a checkpoint holds besides the weights, so that a run continues as if it had never stopped.

Random numbers need no state: they are a function of seed and iteration (``lib.run.seeding``).
"""

import time
from typing import Dict, List, Mapping

from torch import nn

from ..checkpoint import fit_weights, read_checkpoint, state_dict_of
from ..errors import CheckpointError
from .environment import versions

# A run that continues in the middle must deal the same samples as before.
_MUST_AGREE = ('seed', 'total_batch_size', 'num_samples')


def capture(model: nn.Module, optimizer, scaler, meta: Mapping, progress: Mapping) -> Dict:
    """Content of a checkpoint.

    Args:
        model: not wrapped in DDP.
        optimizer, scaler: their states are taken.
        meta: facts of the run (seed, total_batch_size, num_samples, config text, ...); plain values.
        progress: ``iteration`` (optimizer steps done) and whatever else the loop wants back; plain values.
    """
    return dict(
        meta=dict(meta, versions=versions(), time=time.strftime('%Y-%m-%d %H:%M:%S')),
        state_dict={name: value.detach().cpu() for name, value in model.state_dict().items()},
        optimizer=optimizer.state_dict(),
        scaler=scaler.state_dict(),
        progress=dict(progress),
    )


def read_training_state(path: str, trust: bool = False) -> Dict:
    """A checkpoint written with ``capture``.

    Raises:
        CheckpointError: it cannot be read, or holds weights only.
    """
    checkpoint = read_checkpoint(path, trust)
    if not all(isinstance(checkpoint.get(key), Mapping) for key in ('progress', 'optimizer', 'meta')):
        raise CheckpointError(
            f'checkpoint {path} holds weights only and no training state; start from its '
            f'weights with --load-from {path}'
        )
    return checkpoint


def restore(checkpoint: Mapping, path: str, model: nn.Module, optimizer, scaler, meta: Mapping) -> Dict:
    """Put a checkpoint's state back and return its ``progress``.

    Args:
        checkpoint: from ``read_training_state``.
        path: where it was read, for messages.
        meta: facts of the run that continues.

    Raises:
        CheckpointError: it does not fit the model or optimizer, or its run dealt other samples.
    """
    _check_agreement(path, checkpoint['meta'], meta)
    fit_weights(model, state_dict_of(checkpoint, path), path)
    rates = [group['base_lr'] for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(checkpoint['optimizer'])
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f'checkpoint {path} has another optimizer state than the config builds ({error}); '
            'continue with the config it was trained with'
        ) from error
    for group, rate in zip(optimizer.param_groups, rates):  # the config's rate counts, should it have changed
        group['base_lr'] = rate
    if checkpoint.get('scaler'):
        scaler.load_state_dict(checkpoint['scaler'])
    return dict(checkpoint['progress'])


def _check_agreement(path, theirs, ours):
    for key in _MUST_AGREE:
        if theirs.get(key) != ours[key]:
            raise CheckpointError(
                f'checkpoint {path} was trained with {key} = {theirs.get(key)!r}, this run has {ours[key]!r}; continue with the same data, '
                'total_batch_size and seed, or start a new run from its weights with --load-from'
            )


def config_differences(theirs: str, ours: str) -> List[str]:
    """Lines that differ between two dumped configs, ``-`` then and ``+`` now."""
    then, now = theirs.splitlines(), ours.splitlines()
    return ['- ' + line for line in then if line and line not in now] + [
        '+ ' + line for line in now if line and line not in then
    ]
