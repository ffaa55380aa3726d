"""Fitting a checkpoint's weights to a model: all of them, or the parts of another network's that fit."""

import os
import re
from collections import Counter, OrderedDict
from typing import Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .files import read_checkpoint, state_dict_of

_NAMES_SHOWN = 4


def load_model_weights(model: nn.Module, path: str, strict: bool = True, trust: bool = False) -> Dict:
    """Load a checkpoint's weights into a model of the same config.

    Args:
        model: receives the weights, on whatever device it is.
        path: checkpoint of ours, of mmcv's format or a bare state dict.
        strict: every name and shape must agree; otherwise only what fits is loaded.
        trust: see ``read_checkpoint``.

    Returns:
        The checkpoint's ``meta`` (plain dict, maybe empty).

    Raises:
        CheckpointError: as ``read_checkpoint``; or the weights belong to another model, which is named, or are
            not finite.
    """
    checkpoint = read_checkpoint(path, trust)
    weights = state_dict_of(checkpoint, path)
    fit_weights(model, weights, path, strict)
    meta = checkpoint.get('meta')
    return dict(meta) if isinstance(meta, Mapping) else {}


def fit_weights(model: nn.Module, weights: Mapping[str, Tensor], path: str, strict: bool = True) -> None:
    """Copy weights into a model; see ``load_model_weights``."""
    require_finite(weights, path)
    difference = compare(model.state_dict(), weights)
    if strict and any(difference):
        raise CheckpointError(_misfit(path, model.state_dict(), weights, difference))
    skip = set(difference.unexpected) | set(name for name, _, _ in difference.reshaped)
    model.load_state_dict(OrderedDict((k, v) for k, v in weights.items() if k not in skip), strict=False)


def require_finite(weights: Mapping[str, Tensor], path: str) -> None:
    """Raise CheckpointError if any weight is NaN or infinite; results would be wrong without a word."""
    bad = [
        name for name, value in weights.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if bad:
        raise CheckpointError(
            'checkpoint %s holds NaN or infinite values in %d tensors (%s%s); its training went '
            'wrong or the file is damaged: use an earlier one'
            % (path, len(bad), ', '.join(bad[:_NAMES_SHOWN]), ', ...' if len(bad) > _NAMES_SHOWN else '')
        )


class Difference(NamedTuple):
    """How a state dict differs from a model's.

    missing: names that only the model has. unexpected: names that only the checkpoint has.
    reshaped: (name, shape in the checkpoint, shape in the model).
    """

    missing: List[str]
    unexpected: List[str]
    reshaped: List[Tuple[str, tuple, tuple]]


def compare(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Difference:
    """How a checkpoint's weights differ from a model's; batch norm counters old files lack do not count."""
    missing = [k for k in own if k not in weights and not k.endswith('num_batches_tracked')]
    unexpected = [k for k in weights if k not in own]
    reshaped = [
        (k, tuple(weights[k].shape), tuple(own[k].shape))
        for k in own
        if k in weights and weights[k].shape != own[k].shape
    ]
    return Difference(missing, unexpected, reshaped)


def _misfit(path, own, weights, difference) -> str:
    theirs, ours = describe_weights(weights), describe_weights(own)
    if theirs is None:
        return (
            f'checkpoint {path} is not of a SparseOcc (it holds {count_modules(weights)}); for a pretrained backbone set load_from '
            'in the config'
        )
    if ours is not None and theirs != ours:
        return 'checkpoint {} is of {}, but the config builds {}; use {} instead'.format(
            path, theirs.in_words(), ours.in_words(), theirs.config() or 'the config it was trained with'
        )
    return f'checkpoint {path} does not fit the model of the config: {_list_difference(difference)}; use the config it was trained with'


def _list_difference(difference) -> str:
    reshaped = [f'{name} is {list(theirs)} there and {list(ours)} here' for name, theirs, ours in difference.reshaped]
    parts = [('missing', difference.missing), ('unexpected', difference.unexpected), ('of another shape', reshaped)]
    return '; '.join(
        '%d %s (%s%s)'
        % (len(names), title, ', '.join(names[:_NAMES_SHOWN]), ', ...' if len(names) > _NAMES_SHOWN else '')
        for title, names in parts
        if names
    )


class WeightsKind(NamedTuple):
    """What the names and shapes of a SparseOcc's weights tell.

    release: '1.0' (children scored by occupancy) or '1.1'. num_occupied: classes without free.
    Semantic and panoptic models have the same weights, so nothing tells these apart.
    """

    release: str
    num_occupied: int

    def in_words(self) -> str:
        return 'a release %s model with %d classes' % (self.release, self.num_occupied)

    def config(self) -> Optional[str]:
        return _CONFIGS.get(self)


_CONFIGS = {
    WeightsKind('1.0', 17): 'configs/r50_nuimg_704x256_8f.py (or _pano.py)',
    WeightsKind('1.1', 17): 'configs/r50_nuimg_704x256_8f_v1.1.py (or _v1.1_pano.py)',
    WeightsKind('1.1', 16): 'configs/r50_nuimg_704x256_8f_openocc.py',
}


def describe_weights(weights: Mapping[str, Tensor]) -> Optional[WeightsKind]:
    """Release and class count of a SparseOcc's weights; None for another network's."""
    classifier = [v for k, v in weights.items() if k.endswith('decoder_layer.classifier.weight')]
    if not classifier:
        return None
    release = '1.0' if any('.occ_pred_heads.' in k for k in weights) else '1.1'
    return WeightsKind(release, int(classifier[0].shape[0]))


def count_modules(names: Iterable[str]) -> str:
    """Names of weights in short: ``img_backbone 318, img_neck 16``."""
    counts = Counter(name.split('.')[0] for name in names)
    return ', '.join('%s %d' % item for item in counts.most_common(6)) or 'none'


# -- parts of another network's checkpoint


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
