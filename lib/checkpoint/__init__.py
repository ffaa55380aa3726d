"""Checkpoints: read as data, written so that none is ever half there (``files``), and fitted to a model: all of the
weights, or the parts of another network's that fit.
"""

import ast
import os
import re
from collections import Counter, OrderedDict
from typing import Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..dist import rank
from ..errors import CheckpointError, ConfigError
from ..task import Task
from .files import check_checkpoint_file, is_complete, read_checkpoint, save_checkpoint, state_dict_of

__all__ = [
    'check_checkpoint_file',
    'check_pretrained_file',
    'WeightsKind',
    'fit_weights',
    'is_complete',
    'load_model_weights',
    'load_pretrained',
    'read_checkpoint',
    'save_checkpoint',
    'state_dict_of',
]
_NAMES_SHOWN = 4


def load_model_weights(model: nn.Module, path: str, trust: bool = False) -> Dict:
    """Load a checkpoint's weights into a model of the same config.

    Args:
        model: receives the weights, on whatever device it is.
        path: checkpoint of ours, of mmcv's format or a bare state dict.
        trust: see ``read_checkpoint``.

    Returns:
        The checkpoint's ``meta`` (plain dict, maybe empty).

    Raises:
        CheckpointError: as ``read_checkpoint``; or the weights belong to another model, which is named, or are
            not finite.
    """
    checkpoint = read_checkpoint(path, trust)
    weights = state_dict_of(checkpoint, path)
    meta = checkpoint.get('meta')
    meta = dict(meta) if isinstance(meta, Mapping) else {}
    other = other_task(meta, getattr(model, 'task', None))
    fit_weights(model, _without_training_parts(model, weights, path), path, other)
    if meta.get('ema_decay'):
        _say(f'{path}: weights averaged over training (EMA with decay {meta["ema_decay"]:g})')
    if other:
        _say(f'warning: checkpoint {path} was trained for {other}; its weights fit, its predictions may not')
    return meta


def _say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)


def _without_training_parts(model: nn.Module, weights: Mapping[str, Tensor], path: str) -> Mapping[str, Tensor]:
    """The weights, but of what only training uses (``model.training_only``, beginnings of names) what the model has.

    So weights trained with such a part fit a model without it, which says so, and the other way round.
    """
    begins, own = tuple(getattr(model, 'training_only', ())), model.state_dict()
    left_out = [name for name in weights if name.startswith(begins) and name not in own]
    if left_out:
        parts = ', '.join(sorted({name.split('.')[0] for name in left_out}))
        _say(f'{path}: {len(left_out)} tensors that only training uses are left out ({parts})')
    kept = OrderedDict((name, value) for name, value in weights.items() if name not in left_out)
    kept.update((name, own[name]) for name in own if name.startswith(begins) and name not in weights)
    return kept


def trained_task(meta: Mapping) -> Optional[Task]:
    """Task that a checkpoint of ours was trained for, from the config in its ``meta``; None if it does not say."""
    fields: Dict = {}
    try:
        for line in str(meta.get('config', '')).splitlines():
            name, _, value = line.partition(' = ')
            first, *path = name.split('.')
            if first == 'task' and path:
                node = fields
                for part in path[:-1]:
                    node = node.setdefault(part, {})
                node[path[-1]] = ast.literal_eval(value)
        return Task.from_config(fields) if fields else None
    except (ConfigError, ValueError, SyntaxError, AttributeError, TypeError):
        return None  # of another version


def other_task(meta: Mapping, ours: Optional[Task]) -> str:
    """What a checkpoint was trained for, where that differs from the task of the model; an empty string else."""
    theirs = trained_task(meta)
    if theirs is None or ours is None:
        return ''
    facts = [(_describe_labels(theirs), _describe_labels(ours)), (_describe_grid(theirs), _describe_grid(ours))]
    facts += [(f'{theirs.num_frames} frames', f'{ours.num_frames} frames')]
    different = [f'{then}, not {now}' for then, now in facts if then != now]
    return '; '.join(different)


def _describe_labels(task: Task) -> str:
    names = task.label_set.class_names
    return f'label set {task.label_set.name!r} ({len(names) - 1} classes: {", ".join(names[:3])}, ...)'


def _describe_grid(task: Task) -> str:
    numbers = ', '.join(f'{number:g}' for number in task.point_cloud_range)
    frame = '' if task.frame == 'ego' else f' of {task.frame}'
    return f'{"x".join(map(str, task.grid_shape))} voxels over [{numbers}] m{frame}'


def fit_weights(model: nn.Module, weights: Mapping[str, Tensor], path: str, other: str = '') -> None:
    """Copy weights into a model; see ``load_model_weights``. ``other`` is what they are known to be for."""
    require_finite(weights, path)
    difference = compare(model.state_dict(), weights)
    if any(difference):
        if other:
            raise CheckpointError(f'checkpoint {path} was trained for {other}; use the config it was trained with')
        raise CheckpointError(_misfit(path, model, weights, difference))
    model.load_state_dict(dict(weights), strict=False)  # what old files may lack is no difference


def require_finite(weights: Mapping[str, Tensor], path: str) -> None:
    """Raise CheckpointError if any weight is NaN or infinite; results would be wrong without a word."""
    bad = [
        name for name, value in weights.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if bad:
        raise CheckpointError(
            f'checkpoint {path} holds NaN or infinite values in {len(bad)} tensors ({_first(bad)}); its training went '
            'wrong or the file is damaged: use an earlier one'
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


def _misfit(path, model, weights, difference) -> str:
    theirs, ours = _describe(model, weights), _describe(model, model.state_dict())
    if theirs is None and ours is not None:
        return (
            f'checkpoint {path} is not of a {type(model).__name__} (it holds {count_modules(weights)}); for a '
            'pretrained backbone set load_from in the config'
        )
    if theirs is not None and ours is not None and theirs != ours:
        instead = theirs.config or 'the config it was trained with'
        return f'checkpoint {path} is of {theirs.words}, but the config builds {ours.words}; use {instead} instead'
    return (
        f'checkpoint {path} does not fit the model of the config: {_list_difference(difference)}; use the config it '
        'was trained with'
    )


def _list_difference(difference) -> str:
    reshaped = [f'{name} is {list(theirs)} there and {list(ours)} here' for name, theirs, ours in difference.reshaped]
    parts = [('missing', difference.missing), ('unexpected', difference.unexpected), ('of another shape', reshaped)]
    return '; '.join(f'{len(names)} {title} ({_first(names)})' for title, names in parts if names)


def _first(names: Sequence[str]) -> str:
    return ', '.join(names[:_NAMES_SHOWN]) + (', ...' if len(names) > _NAMES_SHOWN else '')


class WeightsKind(NamedTuple):
    """What a model's class tells of weights by their names and shapes (its ``describe_weights(weights)``).

    words: e.g. 'a release 1.1 model with 17 classes'. config: config files of such models, if known.
    """

    words: str
    config: Optional[str] = None


def _describe(model: nn.Module, weights: Mapping[str, Tensor]) -> Optional[WeightsKind]:
    """None for another network's weights, or where the model's class knows nothing of them."""
    describe = getattr(model, 'describe_weights', None)
    return None if describe is None else describe(weights)


def count_modules(names: Iterable[str]) -> str:
    """Names of weights in short: ``backbone 318, neck 16``."""
    counts = Counter(name.split('.')[0] for name in names)
    return ', '.join(f'{name} {count}' for name, count in counts.most_common(6)) or 'none'


# -- parts of another network's checkpoint


class PretrainedReport(NamedTuple):
    """What ``load_pretrained`` did; names are the model's for ``used`` and the file's for the others."""

    path: str
    used: List[str]
    reshaped: List[str]
    unknown: List[str]
    untouched: List[str]
    hint: str = ''

    def lines(self) -> List[str]:
        """The report as text, one line per fact."""
        facts = (
            ('used:      ', self.used, ''),
            ('not used:  ', self.reshaped, ' of another shape'),
            ('not used:  ', self.unknown, ' the model does not have'),
            ('untouched: ', self.untouched, ' of the model'),
        )
        lines = [f'pretrained weights from {self.path}']
        for title, names, kind in facts:
            if names or title in ('used:      ', 'untouched: '):
                lines.append(f'  {title}{len(names)} tensors{kind} ({count_modules(names)})')
        for module, missing in _filled_in_part(self.used, self.untouched).items():
            lines.append(
                f'  WARNING: {module} is filled in part; {len(missing)} of its tensors begin anew ({_first(missing)})'
            )
        return lines + ([f'  {self.hint}'] if self.hint else [])


def _filled_in_part(used: Iterable[str], untouched: Iterable[str]) -> Dict[str, List[str]]:
    """By top-level module that got some of its weights: those it did not get."""
    touched = {name.split('.')[0] for name in used}
    missing: Dict[str, List[str]] = {}
    for name in untouched:
        if name.split('.')[0] in touched and not name.endswith('num_batches_tracked'):
            missing.setdefault(name.split('.')[0], []).append(name)
    return missing


def propose_keys(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """``revise_keys=[...]`` that would make most of the weights fit by name and shape, in words; '' if none would.

    Tried are all prefixes of the file's names, replaced by all prefixes of the model's; at least half of the names that
    begin so must fit.
    """
    ours = {''.join(f'{part}.' for part in name.split('.')[:depth]) for name in own for depth in (0, 1, 2)}
    theirs = {''.join(f'{part}.' for part in name.split('.')[:depth]) for name in weights for depth in (0, 1, 2)}
    best, proposal = 0, ('', '')
    for old in sorted(theirs):
        tails = {name[len(old) :]: value.shape for name, value in weights.items() if name.startswith(old)}
        if len(tails) <= best:
            continue
        for new in sorted(ours):
            fits = sum(new + tail in own and own[new + tail].shape == shape for tail, shape in tails.items())
            if fits > best and 2 * fits >= len(tails):  # a few equal shapes are chance
                best, proposal = fits, (f'^{re.escape(old)}', new)
    return f'revise_keys=[{proposal!r}] would make {best} of them fit' if best else ''


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
        revise_keys: (regular expression, replacement) applied to its names, as in mmcv; those of the model's own
            ``pretrained_names`` come after them.
        trust: see ``read_checkpoint``.

    Raises:
        CheckpointError: as ``read_checkpoint``; or nothing fits, or what fits is not finite.
    """
    check_pretrained_file(path)
    weights = state_dict_of(read_checkpoint(path, trust), path)
    own, used, reshaped, unknown = model.state_dict(), OrderedDict(), [], []
    for name, value in weights.items():
        target = _revise(name, [*(revise_keys or ()), *getattr(model, 'pretrained_names', ())], own)
        if target not in own:
            unknown.append(name)
        elif own[target].shape != value.shape:
            reshaped.append(name)
        else:
            used[target] = value
    if not used:
        proposal = propose_keys(weights, own)
        raise CheckpointError(
            f'none of the {len(weights)} tensors in {path} ({count_modules(weights)}) fits the model; '
            + (f'{proposal}, in the config beside load_from' if proposal else 'check load_from and revise_keys')
        )
    require_finite(used, path)
    model.load_state_dict(used, strict=False)
    untouched = [k for k in own if k not in used]
    proposal = propose_keys({k: weights[k] for k in unknown}, {k: own[k] for k in untouched})
    hint = f'of those that the model does not have, {proposal}' if proposal else ''
    return PretrainedReport(path, list(used), reshaped, unknown, untouched, hint)


def _revise(name, revise_keys, own):
    if name in own:
        return name
    for pattern, replacement in revise_keys:
        name = re.sub(pattern, replacement, name)
    return name
