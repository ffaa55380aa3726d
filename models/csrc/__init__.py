"""Custom operators, a folder each: public function with its checks, PyTorch reference, binding and kernel.

The compiled kernels are loaded on first use; without them the references run.
"""

import functools
import importlib.util
import os
import shutil
import sysconfig
import warnings
from pathlib import Path
from types import ModuleType
from typing import List, Optional

import torch

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


def runs_fused(operator: str, device: torch.device) -> bool:
    """Whether Triton's kernels of 'attention', 'mixing' or 'input' serve the device: an NVIDIA GPU since Ampere."""
    if device.type != 'cuda' or not tries(operator):
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0) and _has_triton()


def tries(name: str) -> bool:
    """Whether a faster way that has not been measured yet is asked for: SPARSEOCC_TRY=attention,mixing,neck."""
    return name in os.environ.get('SPARSEOCC_TRY', '').split(',')


@functools.lru_cache(maxsize=None)
def _has_triton() -> bool:
    """Whether Triton is there and can compile, for which it needs a C compiler and Python's headers."""
    missing = []
    if importlib.util.find_spec('triton') is None:
        missing.append('the package triton')
    if not (os.environ.get('CC') or shutil.which('gcc') or shutil.which('clang')):
        missing.append('a C compiler')
    if not (Path(sysconfig.get_paths()['include']) / 'Python.h').exists():
        missing.append("Python's header files")
    if missing:
        warnings.warn(
            f'training takes the slower PyTorch operators, because {" and ".join(missing)} cannot be found',
            stacklevel=2,
        )
    return not missing


def compiled_operators(device: torch.device) -> List[str]:
    """Names of the operators whose compiled kernels run on the device; none on the CPU."""
    return [name.lstrip('_') for name in sorted(_EXTENSIONS) if find_kernels(name, device) is not None]
