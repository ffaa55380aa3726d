"""Build the CUDA ray caster in place, beside its Python wrapper.

    cd lib/raycast && python setup.py build_ext --inplace

Builds for the GPU present, or for those named in TORCH_CUDA_ARCH_LIST (e.g. "8.0;9.0"). Needs nvcc of the
CUDA version that PyTorch was built with. The project also runs without: rays are then cast on the CPU. The
top-level setup.py builds the same extension.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from lib import extension  # noqa: E402

SOURCES = {'raycast_cuda': ['csrc/ray_cast.cpp', 'csrc/ray_cast_cuda.cu']}
HEADERS = ['csrc/ray_cast.h', 'csrc/traversal.h']


def cuda_extensions(package='', folder=''):
    """The ray caster as a module of ``package``; see ``lib.extension.cuda_extensions``."""
    # --fmad=false: depths must have the CPU's bits. traversal.h sees to that by itself; this makes sure.
    return extension.cuda_extensions(SOURCES, HEADERS, package, folder, nvcc_flags=['--fmad=false'])


if __name__ == '__main__':
    extension.build_in_place('sparseocc-raycast', HERE, cuda_extensions)
