"""Whether a training goes well: shares that the losses count on the way, and warnings when they look wrong."""

from collections import deque
from typing import Deque, Dict, List, Mapping, Sequence

import torch

from ..dist import Counted, Number, all_reduce_sum

_IN_A_ROW = 3  # windows in which something must be wrong before it is told
_START = 3  # windows that the first loss is averaged over
_LONG = 20  # windows after which a loss must have fallen
_EMPTY, _FALLEN, _FLAT = 0.98, 0.7, 0.98


def shares(passes: Sequence[Dict[str, Counted]]) -> Dict[str, float]:
    """Shares over the total batch from what each forward pass of a step counted; one exchange between processes.

    Args:
        passes: per forward pass, by name; the names are the same in every process.
    """
    names = sorted(passes[0]) if passes else []
    if not names:
        return {}
    sums = [_sum([of_pass[name][i] for of_pass in passes]) for i in (0, 1) for name in names]
    device = next((value.device for value in sums if isinstance(value, torch.Tensor)), torch.device('cpu'))
    totals = all_reduce_sum(torch.stack([torch.as_tensor(value, device=device).float() for value in sums])).tolist()
    return {name: part / whole for name, part, whole in zip(names, totals, totals[len(names) :]) if whole > 0}


def _sum(values: Sequence[Number]) -> Number:
    return sum(value.detach() if isinstance(value, torch.Tensor) else value for value in values)


def describe_health(values: Mapping[str, float]) -> str:
    """The part of a log line about shares, in percent; those of single classes are left to the files."""
    percent = {name: f'{100 * value:.0f}' for name, value in values.items() if '/' not in name}
    recall = [percent[name] for name in sorted(percent) if name.startswith('recall_')]
    parts = [f'recall {" / ".join(recall)} %'] if recall else []
    parts += [f'{title} {percent[name]} %' for name, title in TITLES.items() if name in percent]
    return ', '.join(parts)


TITLES = dict(right_class='right class', empty_masks='empty masks')


class HealthWatch:
    """Looks at the averages of every log line and says once what looks wrong, again after it was right."""

    def __init__(self):
        self._losses: List[float] = []
        self._recalls: Deque[float] = deque(maxlen=_LONG)
        self._bad: Dict[str, int] = {}

    def look(self, values: Mapping[str, float]) -> List[str]:
        """Warnings, mostly none.

        Args:
            values: averages since the last log line, by name.
        """
        findings = dict(
            free=(self._only_free(values), 'almost every mask is empty, so that only free would be predicted'),
            recall=(self._recall_falls(values), 'the last stage keeps fewer and fewer of the occupied voxels'),
            flat=(self._is_flat(values), 'the loss is where it began'),
        )
        warnings = []
        for name, (is_bad, text) in findings.items():
            self._bad[name] = self._bad.get(name, 0) + 1 if is_bad else 0
            if self._bad[name] == _IN_A_ROW:
                warnings.append(f'{text}; see "When it does not go well" in docs/training.md')
        return warnings

    def _only_free(self, values) -> bool:
        return values.get('empty_masks', 0.0) > _EMPTY

    def _recall_falls(self, values) -> bool:
        names = sorted(name for name in values if name.startswith('recall_'))
        if not names:
            return False
        self._recalls.append(values[names[-1]])
        return self._recalls[-1] < _FALLEN * max(self._recalls)

    def _is_flat(self, values) -> bool:
        if 'loss' not in values or len(self._losses) > 2 * _LONG:
            return False
        self._losses.append(values['loss'])
        if len(self._losses) < _LONG:
            return False
        first, last = self._losses[:_START], self._losses[-_START:]
        return sum(last) > _FLAT * sum(first)
