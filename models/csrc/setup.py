"""Build the CUDA operators in place, next to their Python wrappers:

    cd models/csrc && python setup.py build_ext --inplace

Builds for the GPU present, or for the architectures named in TORCH_CUDA_ARCH_LIST (for example
``TORCH_CUDA_ARCH_LIST="8.0;9.0"``). Needs nvcc of the CUDA version that PyTorch was built with; the
toolkit is found through CUDA_HOME, nvcc on the PATH, or /usr/local/cuda. The project also runs without
these operators. The top-level setup.py builds them too.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from lib import extension  # noqa: E402

# Extension module -> its sources, relative to this folder. Headers count as dependencies.
OPERATORS = {
    f'_{name}': [f'{name}/bindings.cpp', f'{name}/{name}.cu']
    for name in ('adaptive_mixing', 'distance_attention', 'msmv_sampling')
}
HEADERS = sorted(path.relative_to(HERE).as_posix() for path in HERE.rglob('*.h'))


def cuda_extensions(package='', folder=''):
    """The operators as modules of ``package``; see ``lib.extension.cuda_extensions``."""
    return extension.cuda_extensions(OPERATORS, HEADERS, package, folder, nvcc_flags=[])


if __name__ == '__main__':
    extension.build_in_place('sparseocc-operators', HERE, cuda_extensions)
