"""Metadata, version and CUDA extensions of SparseOcc.

    pip install -e .                       # the project on the Python path (make install brings its packages)
    python setup.py build_ext --inplace    # the CUDA extensions beside their sources (also: make build-ops)

TORCH_CUDA_ARCH_LIST chooses the GPU architectures (default: that of the GPU here), CUDA_HOME the toolkit; its
major version must be the one torch was built with. "pip install --no-build-isolation -e ." builds them too
where there is a GPU.
"""

import importlib.util
import os
import re
import sys

from setuptools import find_packages, setup

ROOT = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, ROOT)

from lib.extension import reason_not_to_build  # noqa: E402

BUILDING = {'build_ext', 'build', 'develop', 'install', 'bdist_wheel', 'editable_wheel'}


def read(name):
    """Text of a file of the repository, '' if it is not there."""
    path = os.path.join(ROOT, name)
    if not os.path.exists(path):
        return ''
    with open(path, encoding='utf-8') as file:
        return file.read()


def version():
    return re.search(r"__version__ = '([^']+)'", read('lib/__init__.py')).group(1)


def pins(name):
    """Requirements of a file, comments left out."""
    lines = (line.split('#')[0].strip() for line in read('requirements/torch2.14/' + name).splitlines())
    return [line for line in lines if line]


def extensions_of(folder):
    """The extensions that the ``setup.py`` of a folder describes."""
    package = folder.replace('/', '.')
    spec = importlib.util.spec_from_file_location(f'{package}.setup', os.path.join(ROOT, folder, 'setup.py'))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.cuda_extensions(package, folder)


def cuda_build():
    """Arguments of ``setup`` for the extensions; none where they cannot or need not be built."""
    explicit = 'build_ext' in sys.argv
    reason = reason_not_to_build() or ('' if explicit else why_not_by_the_way())
    if reason and explicit:
        sys.exit('error: the CUDA extensions cannot be built. ' + reason)
    if reason:
        print('CUDA extensions are not built. ' + reason, file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import BuildExtension

    modules = extensions_of('models/csrc') + extensions_of('lib/raycast')
    return dict(ext_modules=modules, cmdclass=dict(build_ext=BuildExtension))


def why_not_by_the_way():
    """An installation compiles only for GPUs that are here or named; '' if there are."""
    import torch

    if torch.cuda.is_available() or os.environ.get('TORCH_CUDA_ARCH_LIST'):
        return ''
    return 'There is no GPU here, and TORCH_CUDA_ARCH_LIST is not set.'


def main():
    os.chdir(ROOT)
    building = BUILDING.intersection(sys.argv)
    setup(
        name='sparseocc',
        version=version(),
        description='Fully sparse 3D occupancy prediction from multi-camera images',
        long_description=read('README.md'),
        long_description_content_type='text/markdown',
        license='Apache-2.0',
        python_requires='>=3.8',
        packages=find_packages(include=['lib', 'lib.*', 'loaders', 'loaders.*', 'models', 'models.*']),
        # No install_requires: OpenMMLab 1.x must come without its dependencies, which metadata cannot say.
        extras_require={'accel': pins('accel.txt'), 'test': pins('test.txt')},
        **(cuda_build() if building else {}),
    )


if __name__ == '__main__':
    main()
