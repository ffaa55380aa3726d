"""Custom operators, a folder each: public function with its checks, PyTorch reference, binding and kernel.

The compiled kernels are loaded on first use; without them the references run. Kernels in Triton, which comes with
PyTorch for NVIDIA GPUs and compiles on first use, serve training and what inference does between its products.

At the end what PyTorch's releases call by different names.
"""

import functools
import importlib.util
import inspect
import os
import shutil
import sysconfig
import warnings
from pathlib import Path
from types import ModuleType
from typing import List, Optional

import torch
from torch.utils.checkpoint import checkpoint

from lib.extension import Extension

BUILD_COMMAND = 'cd models/csrc && python setup.py build_ext --inplace'

# What the Python side of each operator expects of `interface_version` in its extension.
INTERFACE_VERSIONS = {'_adaptive_mixing': 1, '_distance_attention': 1, '_msmv_sampling': 3}

_EXTENSIONS = {
    name: Extension(
        f'models.csrc.{name}', version, BUILD_COMMAND, 'the GPU runs the slower PyTorch version of its operators'
    )
    for name, version in INTERFACE_VERSIONS.items()
}


def find_kernels(name: str, device: torch.device) -> Optional[ModuleType]:
    """The extension ``models.csrc.<name>`` if it can run on the device, else None; see ``Extension.find``."""
    return _EXTENSIONS[name].find(device)


def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on the device: an NVIDIA GPU since Ampere, with what Triton needs to compile."""
    if device.type != 'cuda':
        return False
    return _compiles_triton(torch.cuda.current_device() if device.index is None else device.index)


@functools.lru_cache(maxsize=None)
def _compiles_triton(index: int) -> bool:
    """Tried once; a warning says why not, or what is missing: Triton compiles C as well, against Python's headers."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(index) < (8, 0):
        return False
    problem = _missing_for_triton()
    if not problem:
        try:
            from models.csrc.triton_probe import check_triton

            problem = '' if check_triton(torch.device('cuda', index)) else 'its kernels compute something else'
        except Exception as error:  # whatever a compiler may say
            problem = f'{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ""}'
    if problem:
        warnings.warn(
            f'Triton cannot be used ({problem}), so the GPU runs slower PyTorch operators', RuntimeWarning, stacklevel=3
        )
    return not problem


def _missing_for_triton() -> str:
    if importlib.util.find_spec('triton') is None:
        return 'it is not installed'
    if not (os.environ.get('CC') or shutil.which('gcc') or shutil.which('clang')):
        return 'there is no C compiler'
    if not (Path(sysconfig.get_paths()['include']) / 'Python.h').exists():
        return "Python's headers are missing; install python3-dev"
    return ''


def compiled_operators(device: torch.device) -> List[str]:
    """Names of the operators whose compiled kernels run on the device; none on the CPU."""
    return [name.lstrip('_') for name in sorted(_EXTENSIONS) if find_kernels(name, device) is not None]


def describe_operators(device: torch.device, graphs: bool) -> str:
    """One sentence on what runs on the device; ``graphs``: whether CUDA graphs replay it there."""
    if device.type != 'cuda':
        return 'PyTorch operators'
    operators = ', '.join(compiled_operators(device)) or 'none (make build-ops)'
    return f'compiled operators: {operators}; CUDA graphs {"on" if graphs else "off"}'


# -- PyTorch's releases


NON_REENTRANT = 'use_reentrant' in inspect.signature(checkpoint).parameters  # PyTorch 1.11 and later


def autocast_dtype(device_type: str) -> Optional[torch.dtype]:
    """The type that autocast computes in on this kind of device ('cpu' or 'cuda'), or None if it is off."""
    if hasattr(torch, 'get_autocast_dtype'):  # PyTorch 2.4 and later
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    if device_type == 'cuda':
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
    return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None


# ``recompute(function, *args)``: its intermediates are made again in the backward pass; random draws repeat there
recompute = functools.partial(checkpoint, use_reentrant=False) if NON_REENTRANT else checkpoint
