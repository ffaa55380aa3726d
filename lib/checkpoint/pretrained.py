"""Taking over the parts of another network's checkpoint that fit: a detector's backbone and pyramid."""

import os
import re
from collections import OrderedDict
from typing import List, NamedTuple, Sequence, Tuple

from torch import nn

from ..errors import CheckpointError
from .fitting import count_modules, require_finite
from .reading import read_checkpoint, state_dict_of


class PretrainedReport(NamedTuple):
    """What ``load_pretrained`` did; names are the model's for ``used`` and the file's for the others."""

    path: str
    used: List[str]
    reshaped: List[str]
    unknown: List[str]
    untouched: List[str]

    def lines(self) -> List[str]:
        """The report as text, one line per fact."""
        lines = [
            f'pretrained weights from {self.path}',
            '  used:      %d tensors (%s)' % (len(self.used), count_modules(self.used)),
        ]
        if self.reshaped:
            lines.append(
                '  not used:  %d tensors of another shape (%s)' % (len(self.reshaped), count_modules(self.reshaped))
            )
        if self.unknown:
            lines.append(
                '  not used:  %d tensors the model does not have (%s)'
                % (len(self.unknown), count_modules(self.unknown))
            )
        lines.append('  untouched: %d tensors of the model (%s)' % (len(self.untouched), count_modules(self.untouched)))
        return lines


# mmdet calls the pyramid 'neck'; its weights fit where the pyramid's widths agree.
_NECK = (r'^neck\.', 'img_neck.')


def check_pretrained_file(path: str) -> None:
    """Raise CheckpointError unless the file of ``load_from`` exists."""
    if not os.path.exists(path):
        raise CheckpointError(
            f'pretrained weights {path} (load_from) do not exist; download them to that path '
            '(docs/nuscenes.md), or start without them: --override load_from=None'
        )


def load_pretrained(
    model: nn.Module, path: str, revise_keys: Sequence[Tuple[str, str]] = (), trust: bool = False
) -> PretrainedReport:
    """Load the parts of another network's checkpoint that fit by name and shape, e.g. a detector's backbone.

    Args:
        model: receives what fits.
        path: checkpoint file.
        revise_keys: (regular expression, replacement) applied to its names, as in mmcv; ``neck`` becomes
            ``img_neck`` by itself.
        trust: see ``read_checkpoint``.

    Raises:
        CheckpointError: as ``read_checkpoint``; or nothing fits, or what fits is not finite.
    """
    check_pretrained_file(path)
    weights = state_dict_of(read_checkpoint(path, trust), path)
    own, used, reshaped, unknown = model.state_dict(), OrderedDict(), [], []
    for name, value in weights.items():
        target = _revise(name, list(revise_keys or ()) + [_NECK], own)
        if target not in own:
            unknown.append(name)
        elif own[target].shape != value.shape:
            reshaped.append(name)
        else:
            used[target] = value
    if not used:
        raise CheckpointError(
            'none of the %d tensors in %s (%s) fits the model; check load_from and '
            'revise_keys' % (len(weights), path, count_modules(weights))
        )
    require_finite(used, path)
    model.load_state_dict(used, strict=False)
    return PretrainedReport(path, list(used), reshaped, unknown, [k for k in own if k not in used])


def _revise(name, revise_keys, own):
    if name in own:
        return name
    for pattern, replacement in revise_keys:
        name = re.sub(pattern, replacement, name)
    return name
