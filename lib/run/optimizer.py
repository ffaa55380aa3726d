"""Optimizer from the config, with learning-rate factors by parts of parameter names."""

from collections import OrderedDict
from typing import Dict, List, Mapping

import torch
from torch import nn

from ..errors import ConfigError
from ..names import check_keys, did_you_mean, section

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
    if name not in _OPTIMIZERS:
        raise ConfigError(
            'optimizer.type must be one of {}, got {!r}{}'.format(
                ', '.join(_OPTIMIZERS), name, did_you_mean(name, _OPTIMIZERS)
            )
        )
    custom_keys = _custom_keys(cfg.pop('paramwise_cfg', None))
    if 'lr' not in cfg:
        raise ConfigError("optimizer: key 'lr' is missing; give the learning rate")
    groups = _parameter_groups(model, custom_keys, cfg['lr'], cfg.get('weight_decay'))
    try:
        return _OPTIMIZERS[name](groups, **cfg)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'optimizer {name}: {error}; correct its config') from error


def _custom_keys(paramwise) -> Dict[str, Mapping]:
    paramwise = section(paramwise, 'optimizer.paramwise_cfg')
    check_keys(paramwise, ('custom_keys',), 'optimizer.paramwise_cfg')
    keys = section(paramwise.get('custom_keys'), 'optimizer.paramwise_cfg.custom_keys')
    for part, factors in keys.items():
        where = f'optimizer.paramwise_cfg.custom_keys.{part}'
        check_keys(section(factors, where), ('lr_mult', 'decay_mult'), where)
    return keys


def _parameter_groups(model, custom_keys, lr, weight_decay) -> List[Dict]:
    """One group per (lr factor, decay factor), in order of first use."""
    order = sorted(sorted(custom_keys), key=len, reverse=True)
    groups, used = OrderedDict(), set()
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
