"""Checkpoints: read as data, fitted to a model, and written so that none is ever half there."""

from .files import check_checkpoint_file, is_complete, read_checkpoint, save_checkpoint, state_dict_of
from .fitting import WeightsKind, check_pretrained_file, fit_weights, load_model_weights, load_pretrained

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
