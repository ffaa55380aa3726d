"""The detector from its config."""

import logging
from typing import Mapping

from mmdet.models.builder import DETECTORS

from lib.errors import ConfigError
from lib.task import Task


def build_model(cfg: Mapping, task: Task):
    """SparseOcc from the config's ``model`` dict.

    Args:
        cfg: ``model`` dict of a config file, with ``type`` and without ``task``.
        task: classes, range, grid, cameras and frames; handed to every part that needs them.

    Returns:
        the module with initialised weights, on the CPU, in training mode.

    Raises:
        ConfigError: an unknown or missing key, or a value that does not fit the task.
    """
    cfg = dict(cfg)
    if 'task' in cfg:
        raise ConfigError('model.task must not be given: the task comes from the top-level task dict')
    try:
        model = DETECTORS.build(dict(cfg, task=task))
    except (TypeError, KeyError) as error:
        raise ConfigError('model: {}'.format(' '.join(str(a) for a in error.args))) from error
    _init_quietly(model)
    return model.train()  # a ResNet fixes its running statistics (norm_eval) only when told to train


def _init_quietly(model):
    """mmcv logs one message per parameter while it initialises; nobody reads them."""
    previous = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        model.init_weights()
    finally:
        logging.disable(previous)
