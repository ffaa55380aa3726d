"""Metadata, version and CUDA extensions of SparseOcc.

    pip install -e .                       # the project on the Python path (make install brings its packages)
    python setup.py build_ext --inplace    # the CUDA extensions beside their sources (also: make build-ops)

TORCH_CUDA_ARCH_LIST chooses the GPU architectures (default: those of the GPUs here), CUDA_HOME the toolkit;
its major version must be the one torch was built with.
"""
import glob
import os
import re
import sys

from setuptools import find_packages, setup

ROOT = os.path.dirname(os.path.abspath(__file__))
# extension module -> folder of its .cpp and .cu sources
EXTENSIONS = {
    'models.csrc.msmv_sampling_cuda': 'models/csrc/msmv_sampling',
    'lib.raycast.raycast_cuda': 'lib/raycast/csrc',
}
BUILDING = {'build_ext', 'build', 'develop', 'install', 'bdist_wheel', 'editable_wheel'}


def read(name):
    path = os.path.join(ROOT, name)
    if not os.path.exists(path):
        return ''
    with open(path, encoding='utf-8') as file:
        return file.read()


def version():
    return re.search(r"__version__ = '([^']+)'", read('lib/version.py')).group(1)


def pins(name):
    """Requirements of a file, comments left out."""
    lines = (line.split('#')[0].strip() for line in read('requirements/' + name).splitlines())
    return [line for line in lines if line]


def why_no_cuda(explicit):
    """'' if the CUDA extensions can be built here, else the reason. An explicit build needs no GPU."""
    try:
        from torch.utils.cpp_extension import CUDA_HOME
        import torch
    except ImportError:
        return 'torch cannot be imported in this build (pip: --no-build-isolation)'
    if not torch.version.cuda:
        return 'this torch was built without CUDA'
    if not CUDA_HOME or not os.path.exists(os.path.join(CUDA_HOME, 'bin', 'nvcc')):
        return 'nvcc is not found; set CUDA_HOME to a CUDA %s toolkit' % torch.version.cuda
    if not (explicit or torch.cuda.is_available() or os.environ.get('TORCH_CUDA_ARCH_LIST')):
        return 'there is no GPU here, and TORCH_CUDA_ARCH_LIST is not set'
    return ''


def cuda_build():
    """Arguments of ``setup`` for the extensions; empty where they cannot be built."""
    explicit = 'build_ext' in sys.argv
    if not BUILDING.intersection(sys.argv):
        return {}
    reason = why_no_cuda(explicit)
    if reason:
        message = 'CUDA extensions are not built: %s' % reason
        if explicit:
            sys.exit(message)
        print(message, file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension
    modules = [CUDAExtension(name, sources(folder), extra_compile_args={'cxx': ['-O3'], 'nvcc': ['-O3']})
               for name, folder in EXTENSIONS.items()]
    return dict(ext_modules=modules, cmdclass={'build_ext': BuildExtension})


def sources(folder):
    """.cpp and .cu files of a folder, relative to the repository as setuptools wants them."""
    found = [path for suffix in ('*.cpp', '*.cu') for path in glob.glob(os.path.join(ROOT, folder, suffix))]
    return sorted(os.path.relpath(path, ROOT) for path in found)


if __name__ == '__main__':
    os.chdir(ROOT)
    setup(
        name='sparseocc',
        version=version(),
        description='Fully sparse 3D occupancy prediction from multi-camera images',
        long_description=read('README.md'),
        long_description_content_type='text/markdown',
        license='Apache-2.0',
        python_requires='>=3.8',
        packages=find_packages(include=[name + part for name in ('lib', 'loaders', 'models', 'configs')
                                        for part in ('', '.*')]),
        # No install_requires: OpenMMLab 1.x must come without its dependencies, which metadata cannot say.
        extras_require={'accel': pins('accel.txt'), 'test': pins('test.txt')},
        **cuda_build())
