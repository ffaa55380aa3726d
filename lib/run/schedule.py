"""Learning rate as a function of the iteration alone: warm-up, then cosine, steps or constant."""

import math
from dataclasses import dataclass, fields
from typing import Mapping, Optional, Sequence, Union

from ..errors import ConfigError
from ..names import check_keys, did_you_mean, section

_POLICIES = ('CosineAnnealing', 'step', 'fixed')
_WARMUPS = (None, 'linear', 'constant', 'exp')


@dataclass(frozen=True)
class Schedule:
    """mmcv's ``lr_config``, as far as it is used here.

    Attributes:
        policy: 'CosineAnnealing' (to ``min_lr_ratio`` of the rate), 'step' (times ``gamma`` at each of
            ``step``) or 'fixed'.
        by_epoch: progress counts in whole epochs (mmcv's default), otherwise in iterations.
        warmup: None, 'linear', 'constant' or 'exp', over ``warmup_iters`` iterations from ``warmup_ratio``.
        min_lr_ratio: final rate of the cosine over the base rate.
        step: epochs (or iterations) after which the rate falls.
        gamma: factor of each fall.
        epochs, iterations: length of the whole run, set by the trainer.
        steps_per_epoch: optimizer steps per epoch.
    """

    policy: str = 'fixed'
    by_epoch: bool = True
    warmup: Optional[str] = None
    warmup_iters: int = 0
    warmup_ratio: float = 0.1
    min_lr_ratio: float = 0.0
    step: Union[int, Sequence[int]] = ()
    gamma: float = 0.1
    epochs: int = 1
    iterations: int = 1
    steps_per_epoch: int = 1

    def __post_init__(self):
        if self.policy not in _POLICIES:
            raise ConfigError(
                'lr_config.policy must be one of {}, got {!r}{}'.format(
                    ', '.join(_POLICIES), self.policy, did_you_mean(self.policy, _POLICIES)
                )
            )
        if self.warmup not in _WARMUPS:
            raise ConfigError(f'lr_config.warmup must be one of {_WARMUPS}, got {self.warmup!r}')
        if self.warmup and (self.warmup_iters < 1 or not 0 < self.warmup_ratio <= 1):
            raise ConfigError(
                'lr_config: warm-up needs warmup_iters of at least 1 and warmup_ratio in '
                f'(0, 1], got {self.warmup_iters!r} and {self.warmup_ratio!r}'
            )

    @classmethod
    def from_config(cls, cfg: Optional[Mapping], epochs: int, iterations: int, steps_per_epoch: int) -> 'Schedule':
        cfg = section(cfg, 'lr_config')
        own = ('epochs', 'iterations', 'steps_per_epoch')
        check_keys(cfg, [f.name for f in fields(cls) if f.name not in own], 'lr_config')
        return cls(epochs=epochs, iterations=iterations, steps_per_epoch=steps_per_epoch, **cfg)

    def factor(self, iteration: int) -> float:
        """Learning rate over base rate at a 0-based iteration."""
        regular = self._regular(iteration)
        if self.warmup is None or iteration >= self.warmup_iters:
            return regular
        left = 1 - iteration / self.warmup_iters
        if self.warmup == 'linear':
            return regular * (1 - left * (1 - self.warmup_ratio))
        if self.warmup == 'exp':
            return regular * self.warmup_ratio**left
        return regular * self.warmup_ratio

    def _regular(self, iteration):
        progress = iteration // self.steps_per_epoch if self.by_epoch else iteration
        if self.policy == 'CosineAnnealing':
            done = progress / (self.epochs if self.by_epoch else self.iterations)
            fall = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
            return self.min_lr_ratio + (1 - self.min_lr_ratio) * fall
        if self.policy == 'step':
            steps = (self.step,) if isinstance(self.step, int) else self.step
            falls = progress // steps[0] if isinstance(self.step, int) else sum(s <= progress for s in steps)
            return self.gamma**falls
        return 1.0
