"""Build the CUDA ray caster in place, beside its Python wrapper.

    cd lib/raycast && python setup.py build_ext --inplace

Builds for the GPU present, or for those named in TORCH_CUDA_ARCH_LIST (e.g. "8.0;9.0"). Needs nvcc of the
CUDA version that PyTorch was built with. The project also runs without: rays are then cast on the CPU. The
top-level setup.py builds the same extension.
"""

import os
import shutil

SOURCES = ('ray_cast.cpp', 'ray_cast_cuda.cu')
HEADERS = ('ray_cast.h', 'traversal.h')


def ray_cast_extension(name: str = 'raycast_cuda', folder: str = ''):
    """The extension module, to pass to ``setup(ext_modules=...)``.

    Args:
        name: ``raycast_cuda`` in this folder, ``lib.raycast.raycast_cuda`` from the top level.
        folder: this folder as seen from the running setup.py ('' in this folder, ``lib/raycast`` at the top).
    """
    from torch.utils.cpp_extension import CUDAExtension

    at = lambda names: [os.path.join(folder, 'csrc', name) for name in names]  # noqa: E731
    # --fmad=false: depths must have the CPU's bits. traversal.h sees to that by itself; this makes sure.
    return CUDAExtension(
        name,
        at(SOURCES),
        depends=at(HEADERS),
        extra_compile_args={'cxx': ['-O3'], 'nvcc': ['-O3', '--fmad=false', '-lineinfo']},
    )


def point_to_cuda():
    """Set CUDA_HOME, which PyTorch reads, to a toolkit that has compiler and headers."""
    nvcc = shutil.which('nvcc')
    beside_nvcc = nvcc and os.path.dirname(os.path.dirname(os.path.realpath(nvcc)))
    candidates = [os.environ.get('CUDA_HOME'), beside_nvcc, '/usr/local/cuda']
    for home in filter(None, candidates):
        parts = (os.path.join('bin', 'nvcc'), os.path.join('include', 'cuda_runtime_api.h'))
        if all(os.path.isfile(os.path.join(home, part)) for part in parts):
            os.environ['CUDA_HOME'] = home
            return
    raise SystemExit('No CUDA toolkit found: install nvcc, or set CUDA_HOME to the folder of bin/nvcc.')


def main():
    point_to_cuda()
    from setuptools import setup
    from torch.utils.cpp_extension import BuildExtension

    os.chdir(os.path.dirname(os.path.abspath(__file__)))
    setup(
        name='sparseocc-raycast',
        version='1',
        packages=[],
        ext_modules=[ray_cast_extension()],
        cmdclass={'build_ext': BuildExtension},
        options={'build': {'build_base': os.path.join('..', '..', 'build', 'raycast')}},
    )


if __name__ == '__main__':
    main()
