"""Checkpoint files: read as data, never as code, nothing that is damaged; written so that none is ever half there.

A file holds ``dict(meta=..., state_dict=..., ...)`` as mmcv's do, or a bare state dict; names may begin with
``module.``.
"""

import contextlib
import inspect
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from types import SimpleNamespace
from typing import Dict, Mapping

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, UserError, reason
from ..io import UNREADABLE, PathLike, atomic_write
from ..pickles import SafeUnpickler, find_damage

_OLD_PICKLES = 5  # of the older format: magic number, version, system, content, keys of the storages


def check_checkpoint_file(path: str) -> None:
    """Raise CheckpointError unless ``path`` is an existing, non-empty file."""
    if os.path.isdir(path):
        raise CheckpointError(f'checkpoint {path} is a folder; give the .pth file inside it')
    if not os.path.isfile(path):
        raise CheckpointError(
            f'checkpoint {path} does not exist; check the path, train one with train.py or download it'
        )
    if os.path.getsize(path) == 0:
        raise CheckpointError(f'checkpoint {path} is empty; it was not written or fetched to its end')


def read_checkpoint(path: str, trust: bool = False) -> Dict:
    """What a checkpoint file holds, on the CPU, read as data.

    Args:
        path: ``.pth`` file.
        trust: let the file build (and so run) anything; only for files whose source is known.

    Raises:
        CheckpointError: missing or damaged file, or one that asks for code.
    """
    check_checkpoint_file(path)
    check_archive(path)
    try:
        checkpoint = _torch_load(path, trust)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, error)) from error
    except UNREADABLE as error:
        raise CheckpointError(
            f'checkpoint {path} is damaged or no PyTorch checkpoint ({type(error).__name__}: {reason(error)}); fetch '
            'or write it again'
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f'checkpoint {path} holds a {type(checkpoint).__name__} instead of a dict with weights')
    return dict(checkpoint)


def check_archive(path: PathLike) -> None:
    """Compare the check sums of a zip file (torch >= 1.6): PyTorch itself does not notice a changed byte.

    Of the older format the pickles in front are looked at, which could ask for any amount of memory.

    Raises:
        CheckpointError: the file is cut short or a byte in it has changed.
    """
    with open(path, 'rb') as stream:
        start = stream.read(4)
    if start != b'PK\x03\x04':  # PyTorch's old format, or no checkpoint at all
        if find_damage(path, _OLD_PICKLES) is not None:
            raise CheckpointError(
                f'checkpoint {path} is cut short, damaged or no PyTorch checkpoint; fetch or write it again'
            )
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except UNREADABLE as error:
        raise CheckpointError(
            f'checkpoint {path} is cut short or damaged ({reason(error)}); fetch or write it again'
        ) from error
    if damaged is not None:
        raise CheckpointError(
            f'checkpoint {path} is damaged (the check sum of {damaged} is wrong); fetch or write it again'
        )


def _refusal(path, error) -> str:
    asked = re.search(r'(?:GLOBAL|global:?|Unsupported class|it names)\s+(?:GLOBAL\s+)?(\w[\w.]*\w)', str(error))
    if asked is None:
        return f'checkpoint {path} is damaged or not written by torch.save; fetch or write it again'
    return (
        f'checkpoint {path} was refused: it asks for {asked.group(1)}, and only tensors and plain data are read; if '
        'you trust where the file is from, add --trust-weights'
    )


def _torch_load(path, trust):
    if 'weights_only' not in inspect.signature(torch.load).parameters:  # before torch 1.13
        return torch.load(path, map_location='cpu', pickle_module=pickle if trust else RESTRICTED_PICKLE)
    if trust:
        return torch.load(path, map_location='cpu', weights_only=False)
    with _numpy_numbers_allowed():
        return torch.load(path, map_location='cpu', weights_only=True)


def _numpy_numbers_allowed():
    """Files of mmcv hold NumPy numbers in ``meta``; torch >= 2.6 can be told that these are harmless."""
    if tuple(int(n) for n in torch.__version__.split('.')[:2]) < (2, 6):
        return contextlib.nullcontext()
    scalar = np.float64(0).__reduce__()[0]
    modules = ('numpy.core.multiarray', 'numpy._core.multiarray')  # as NumPy 1 and NumPy 2 write it
    kinds = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]
    return torch.serialization.safe_globals([(scalar, f'{m}.scalar') for m in modules] + [np.dtype] + kinds)


def state_dict_of(checkpoint: Mapping, path: str) -> 'OrderedDict[str, Tensor]':
    """The weights in a checkpoint, without a leading ``module.``.

    Raises:
        CheckpointError: there are none.
    """
    state = checkpoint
    for key in ('state_dict', 'model'):
        if isinstance(checkpoint.get(key), Mapping):
            state = checkpoint[key]
            break
    weights = OrderedDict(
        (re.sub(r'^module\.', '', name), value)
        for name, value in state.items()
        if isinstance(value, Tensor) and isinstance(name, str)
    )
    if not weights:
        keys = ', '.join(sorted(map(str, checkpoint))[:8]) or 'none'
        raise CheckpointError(f'checkpoint {path} holds no weights (its keys: {keys})')
    return weights


# -- reading with PyTorch releases that have no ``weights_only`` (before 1.13)

_ALLOWED = frozenset(
    (
        ('torch', 'Size'),
        ('torch', 'device'),
        ('torch._utils', '_rebuild_tensor'),
        ('torch._utils', '_rebuild_tensor_v2'),
        ('torch._utils', '_rebuild_parameter'),
        ('torch.nn.parameter', 'Parameter'),
        ('torch.storage', 'UntypedStorage'),
        ('torch.storage', 'TypedStorage'),
        ('torch.storage', '_UntypedStorage'),
        ('torch.storage', '_TypedStorage'),
    )
)
_TORCH_DTYPES = frozenset(
    ('float16', 'float32', 'float64', 'bfloat16', 'uint8', 'int8', 'int16', 'int32', 'int64', 'bool')
)


class _Unpickler(SafeUnpickler):
    """Rebuilds tensors as well."""

    def find_class(self, module, name):
        is_storage = module in ('torch', 'torch.cuda') and name.endswith('Storage')
        is_dtype = module == 'torch' and name in _TORCH_DTYPES
        if is_storage or is_dtype or (module, name) in _ALLOWED:
            return pickle.Unpickler.find_class(self, module, name)
        return super().find_class(module, name)


def _no_nested_pickle(data, **options):
    raise pickle.UnpicklingError('a pickle within the pickle')


# What torch.load looks up in its ``pickle_module``.
RESTRICTED_PICKLE = SimpleNamespace(
    __name__='pickle',
    Unpickler=_Unpickler,
    UnpicklingError=pickle.UnpicklingError,
    load=lambda file, **options: _Unpickler(file, **options).load(),
    loads=_no_nested_pickle,
)


# -- writing


def save_checkpoint(path: PathLike, checkpoint: Mapping) -> None:
    """Write a checkpoint; it appears under its name only once it is complete and on the disk.

    Raises:
        UserError: it cannot be written (disk full, no permission); an older file of that name is untouched.
    """
    try:
        with atomic_write(path) as temporary, open(temporary, 'wb') as stream:
            patient = _PatientStream(stream)
            torch.save(checkpoint, patient)
            patient.raise_error()
    except OSError as error:
        raise UserError(
            f'cannot write {path}: {error.strerror or error}; free some space or choose another folder (earlier '
            'checkpoints are untouched)'
        ) from error


class _PatientStream:
    """Keeps the first error until asked for it: torch 1.10 dies of an exception inside torch.save."""

    def __init__(self, stream):
        self._stream, self._error = stream, None

    def write(self, data):
        if self._error is None:
            try:
                self._stream.write(data)
            except OSError as error:
                self._error = error
        return len(data)

    def flush(self):
        """Closing the file flushes it, and raises what there is to raise."""

    def raise_error(self):
        if self._error is not None:
            raise self._error


def is_complete(path: PathLike) -> bool:
    """Whether a checkpoint that this project wrote is whole: a zip archive whose check sums all agree."""
    try:
        check_archive(path)
        return zipfile.is_zipfile(path)
    except (CheckpointError, OSError):
        return False
