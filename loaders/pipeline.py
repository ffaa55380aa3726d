"""The steps of a pipeline from their configs."""

import inspect
from typing import Callable, Dict, List, Mapping, Sequence

from mmdet.datasets.builder import PIPELINES

from lib.errors import ConfigError
from lib.names import did_you_mean
from lib.task import Task


def build_pipeline(configs: Sequence[Mapping], task: Task) -> List[Callable[[Dict], Dict]]:
    """Steps from their configs; those that take a ``task`` get it.

    Raises:
        ConfigError: an unknown step or argument.
    """
    return [_build_step(dict(config), task) for config in configs]


def _build_step(config, task):
    name = config.pop('type', None)
    step_class = PIPELINES.get(name) if isinstance(name, str) else None
    if step_class is None:
        raise ConfigError(f'unknown pipeline step {name!r}{did_you_mean(name, PIPELINES.module_dict)}')
    accepted = [p for p in inspect.signature(step_class.__init__).parameters if p != 'self']
    unknown = [key for key in config if key not in accepted or key == 'task']
    if unknown:
        raise ConfigError(
            '{}: unknown key {!r}{} (the keys are {})'.format(
                name,
                unknown[0],
                did_you_mean(unknown[0], accepted),
                ', '.join(key for key in accepted if key != 'task'),
            )
        )
    if 'task' in accepted:
        config['task'] = task
    try:
        return step_class(**config)
    except TypeError as error:
        raise ConfigError(f'{name}: {error}') from error
