"""Finding the compiled operators: loaded on first use, and one clear sentence where they are missing."""

import functools
import importlib
import warnings
from types import ModuleType
from typing import List, Optional

import torch

BUILD_COMMAND = 'cd models/csrc && python setup.py build_ext --inplace'

# What the Python side of each operator expects of `interface_version` in its extension.
INTERFACE_VERSIONS = {'_adaptive_mixing': 1, '_distance_attention': 1, '_msmv_sampling': 2}

_said = set()  # problems that were warned of


def find_kernels(name: str, device: torch.device) -> Optional[ModuleType]:
    """The extension ``models.csrc.<name>`` if it can run on the device, else None.

    On a CUDA device without usable extension this warns, once per process and reason for all operators.
    """
    if device.type != 'cuda':
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return _load_for_device(name, index)


def compiled_operators(device: torch.device) -> List[str]:
    """Names of the operators whose compiled kernels run on the device; none on the CPU."""
    return [name.lstrip('_') for name in sorted(INTERFACE_VERSIONS) if find_kernels(name, device) is not None]


@functools.lru_cache(maxsize=None)
def _load_for_device(name: str, index: int) -> Optional[ModuleType]:
    module = _load(name)
    if module is None:
        return None
    with torch.cuda.device(index):
        if module.runs_on_current_device():
            return module
    capability = '%d.%d' % torch.cuda.get_device_capability(index)
    _warn(name, f'was built for other GPUs than this one (compute capability {capability})')
    return None


@functools.lru_cache(maxsize=None)
def _load(name: str) -> Optional[ModuleType]:
    full_name = 'models.csrc.' + name
    try:
        module = importlib.import_module(full_name)
    except ModuleNotFoundError:
        _warn(name, 'is not built')
        return None
    except ImportError as error:
        _warn(name, f'cannot be loaded ({str(error).splitlines()[0]})')
        return None
    if getattr(module, 'interface_version', None) != INTERFACE_VERSIONS[name]:
        _warn(name, 'was built from other sources than these')
        return None
    return module


def _warn(name: str, problem: str) -> None:
    if problem in _said:
        return
    _said.add(problem)
    warnings.warn(
        f'models.csrc.{name} {problem}, so the GPU runs the slower PyTorch version of its operators; '
        f'to build it: {BUILD_COMMAND}',
        RuntimeWarning,
        stacklevel=2,
    )
