"""Build the CUDA ray caster in place.

    cd lib/raycast && python setup.py build_ext --inplace

TORCH_CUDA_ARCH_LIST (e.g. "8.0;9.0") chooses the GPUs; without it the one present. The project's own
setup.py builds the same extension through ``ray_cast_extension``.
"""
import os

SOURCES = ('ray_cast.cpp', 'ray_cast_cuda.cu')


def ray_cast_extension(name: str = 'raycast_cuda', folder: str = ''):
    """The extension module.

    Args:
        name: ``raycast_cuda`` in this folder, ``lib.raycast.raycast_cuda`` from the top level.
        folder: this folder as seen from the running setup.py ('' in this folder, ``lib/raycast`` at the top).
    """
    from torch.utils.cpp_extension import CUDAExtension
    # --fmad=false: a fused multiply-add would round differently from the CPU, and grazing rays hang on that.
    return CUDAExtension(name, [os.path.join(folder, 'csrc', source) for source in SOURCES],
                         extra_compile_args={'cxx': ['-O3'], 'nvcc': ['-O3', '--fmad=false']})


if __name__ == '__main__':
    from setuptools import setup
    from torch.utils.cpp_extension import BuildExtension
    setup(name='sparseocc_raycast', version='1.0', ext_modules=[ray_cast_extension()], py_modules=[],
          packages=[], cmdclass={'build_ext': BuildExtension})
