"""What changes the weights: optimizer, learning rate and clipping, from the config; and their average over training.

The average (EMA) is evaluated and shipped; training itself takes no notice of it.
"""

import contextlib
import inspect
import math
from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Dict, Iterator, List, Literal, Mapping, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..registry import check_fields, check_keys, check_value, did_you_mean, section

_HAS_FUSED = tuple(int(n) for n in torch.__version__.split('.')[:2]) >= (2, 2)  # in earlier ones it is young
_OPTIMIZERS = {name: getattr(torch.optim, name) for name in ('AdamW', 'Adam', 'SGD')}


def build_optimizer(model: nn.Module, cfg: Mapping) -> torch.optim.Optimizer:
    """Optimizer over the parameters that learn.

    Args:
        model: not wrapped in DDP.
        cfg: ``dict(type, lr, ..., paramwise_cfg=dict(custom_keys={part: dict(lr_mult, decay_mult)}))``, where
            a part is looked for in parameter names. The alphabetically first of the longest parts found in
            a name counts, as in mmcv.

    Raises:
        ConfigError: unknown type or key, or a part that is in no parameter's name.
    """
    cfg = section(cfg, 'optimizer')
    name = cfg.pop('type', None)
    if not isinstance(name, str) or name not in _OPTIMIZERS:
        raise ConfigError(
            f'optimizer.type must be one of {", ".join(_OPTIMIZERS)}, got {name!r}{did_you_mean(name, _OPTIMIZERS)}'
        )
    arguments = [key for key in inspect.signature(_OPTIMIZERS[name]).parameters if key != 'params']
    check_keys(cfg, ['type', 'paramwise_cfg', *arguments], 'optimizer')
    custom_keys = _custom_keys(cfg.pop('paramwise_cfg', None))
    if 'lr' not in cfg:
        raise ConfigError("optimizer: key 'lr' is missing; give the learning rate")
    for key in set(cfg) & {'lr', 'weight_decay'}:
        check_value(cfg[key], float, f'optimizer.{key}')
    groups = _parameter_groups(model, custom_keys, cfg['lr'], cfg.get('weight_decay'))
    if can_fuse(_OPTIMIZERS[name], model) and not set(cfg) & {'fused', 'foreach', 'capturable', 'differentiable'}:
        cfg['fused'] = True
    try:
        return _OPTIMIZERS[name](groups, **cfg)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'optimizer {name}: {error}; correct its config') from error


def can_fuse(kind: type, model: nn.Module) -> bool:
    """Whether PyTorch has one kernel for all of this optimizer's parameters; its rounding is that of the others."""
    on_gpu = all(p.is_cuda and p.is_floating_point() for p in model.parameters() if p.requires_grad)
    return on_gpu and _HAS_FUSED and 'fused' in inspect.signature(kind).parameters


def _custom_keys(paramwise) -> Dict[str, Mapping]:
    paramwise = section(paramwise, 'optimizer.paramwise_cfg')
    check_keys(paramwise, ('custom_keys',), 'optimizer.paramwise_cfg')
    keys = section(paramwise.get('custom_keys'), 'optimizer.paramwise_cfg.custom_keys')
    for part, factors in keys.items():
        where = f'optimizer.paramwise_cfg.custom_keys.{part}'
        check_keys(section(factors, where), ('lr_mult', 'decay_mult'), where)
        for key, factor in section(factors, where).items():
            check_value(factor, float, f'{where}.{key}')
    return keys


def _parameter_groups(model, custom_keys, lr, weight_decay) -> List[Dict]:
    """One group per (lr factor, decay factor), in order of first use."""
    order = sorted(sorted(custom_keys), key=len, reverse=True)
    groups: Dict[Tuple[float, float], List[nn.Parameter]] = OrderedDict()
    used = set()
    for name, parameter in model.named_parameters():
        part = next((part for part in order if part in name), None)
        used.add(part)
        if not parameter.requires_grad:
            continue
        factors = custom_keys.get(part, {})
        key = (factors.get('lr_mult', 1.0), factors.get('decay_mult', 1.0))
        groups.setdefault(key, []).append(parameter)
    unused = [part for part in custom_keys if part not in used]
    if unused:
        raise ConfigError(
            f'optimizer.paramwise_cfg.custom_keys: no parameter has {unused[0]!r} in its name; correct or remove it'
        )
    if not groups:
        raise ConfigError('the model has no parameter that learns')
    return [_group(parameters, lr, weight_decay, *key) for key, parameters in groups.items()]


def _group(parameters, lr, weight_decay, lr_mult, decay_mult):
    group = dict(params=parameters, lr=lr * lr_mult, base_lr=lr * lr_mult)
    if weight_decay is not None:
        group['weight_decay'] = weight_decay * decay_mult
    return group


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to ``factor`` times its base rate."""
    for group in optimizer.param_groups:
        group['lr'] = group['base_lr'] * factor


def highest_learning_rate(optimizer: torch.optim.Optimizer) -> float:
    return max(group['lr'] for group in optimizer.param_groups)


# -- clipping


def clip_norm(optimizer_config) -> float:
    """``optimizer_config.grad_clip.max_norm``; infinite without clipping.

    Raises:
        ConfigError: a norm other than the Euclidean, or none.
    """
    cfg = section(optimizer_config, 'optimizer_config').get('grad_clip')
    cfg = section(cfg, 'optimizer_config.grad_clip')
    if not cfg:
        return math.inf
    check_keys(cfg, ('max_norm', 'norm_type'), 'optimizer_config.grad_clip')
    norm = cfg.get('max_norm', 0)
    if cfg.get('norm_type', 2) != 2 or not isinstance(norm, (int, float)) or not norm > 0:
        raise ConfigError(f'optimizer_config.grad_clip needs a positive max_norm (and norm_type=2), got {cfg!r}')
    return float(norm)


# -- learning rate


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

    policy: Literal['CosineAnnealing', 'step', 'fixed'] = 'fixed'
    by_epoch: bool = True
    warmup: Optional[Literal['linear', 'constant', 'exp']] = None
    warmup_iters: int = 0
    warmup_ratio: float = 0.1
    min_lr_ratio: float = 0.0
    step: Union[int, Sequence[int]] = ()
    gamma: float = 0.1
    epochs: int = 1
    iterations: int = 1
    steps_per_epoch: int = 1

    def __post_init__(self):
        check_fields(self, 'lr_config')
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


class WeightAverage:
    """Exponential moving average of a model's weights.

    After step n the average moves by 1 - min(decay, (1 + n) / (10 + n)) towards the weights, so that it does not hang
    on to its random start in a short run. Running means and variances of batch norm are averaged alike: they belong
    to the weights that they were gathered with. Counters are the model's.

    Args:
        model: on its device; its tensors must be changed in place from now on, as optimizers do.
        decay: in 0..1, e.g. 0.999.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay, self.updates = model, decay, 0
        own = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
        self._names, self._weights = list(own), list(own.values())
        self._average = [value.clone() for value in self._weights]

    def update(self) -> None:
        """After an optimizer step."""
        self.updates += 1
        step = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        if hasattr(torch, '_foreach_lerp_'):
            torch._foreach_lerp_(self._average, self._weights, step)
        else:  # an older PyTorch
            torch._foreach_mul_(self._average, 1 - step)
            torch._foreach_add_(self._average, self._weights, alpha=step)

    def state_dict(self) -> Dict[str, Tensor]:
        """The model's state dict with the average in place of its weights."""
        return dict(self.model.state_dict(), **dict(zip(self._names, self._average)))

    def begin(self, updates: int = 0) -> None:
        """Begin anew at the model's present weights, as an average of so many updates."""
        self.updates = updates
        for average, weight in zip(self._average, self._weights):
            average.copy_(weight)

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """Within the block the model computes with the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for average, weight in zip(self._average, self._weights):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
