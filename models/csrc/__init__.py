"""Custom operators, a folder each: public function with its checks, PyTorch reference, binding and kernel.

The compiled kernels are loaded on first use; without them the references run.
"""

from types import ModuleType
from typing import List, Optional

import torch

from lib.extension import Extension

BUILD_COMMAND = 'cd models/csrc && python setup.py build_ext --inplace'

# What the Python side of each operator expects of `interface_version` in its extension.
INTERFACE_VERSIONS = {'_adaptive_mixing': 1, '_distance_attention': 1, '_msmv_sampling': 2}

_EXTENSIONS = {
    name: Extension(
        f'models.csrc.{name}', version, BUILD_COMMAND, 'the GPU runs the slower PyTorch version of its operators'
    )
    for name, version in INTERFACE_VERSIONS.items()
}


def find_kernels(name: str, device: torch.device) -> Optional[ModuleType]:
    """The extension ``models.csrc.<name>`` if it can run on the device, else None; see ``Extension.find``."""
    return _EXTENSIONS[name].find(device)


def compiled_operators(device: torch.device) -> List[str]:
    """Names of the operators whose compiled kernels run on the device; none on the CPU."""
    return [name.lstrip('_') for name in sorted(_EXTENSIONS) if find_kernels(name, device) is not None]
