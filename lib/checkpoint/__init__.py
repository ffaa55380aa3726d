"""Checkpoints: read as data, fitted to a model, and written so that none is ever half there."""

from .fitting import compare, describe_weights, fit_weights, load_model_weights
from .pretrained import PretrainedReport, check_pretrained_file, load_pretrained
from .reading import check_checkpoint_file, read_checkpoint, state_dict_of
from .writing import is_complete, save_checkpoint

__all__ = [
    'PretrainedReport',
    'check_checkpoint_file',
    'check_pretrained_file',
    'compare',
    'describe_weights',
    'fit_weights',
    'is_complete',
    'load_model_weights',
    'load_pretrained',
    'read_checkpoint',
    'save_checkpoint',
    'state_dict_of',
]
