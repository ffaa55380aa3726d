"""Metadata, version and CUDA extensions of SparseOcc.

    pip install ".[eval]"                  # the evaluator alone, sparseocc-eval, in any environment
    pip install --no-build-isolation .     # "import sparseocc" and the console commands, see tools/package
    pip install --no-build-isolation -e .  # the same, from this folder (make install brings the packages it needs)
    python setup.py build_ext --inplace    # the CUDA extensions beside their sources (also: make build-ops)

TORCH_CUDA_ARCH_LIST chooses the GPU architectures (default: that of the GPU here), CUDA_HOME the toolkit; its
major version must be the one torch was built with. pip builds them too where there is a GPU.
"""

import importlib.util
import os
import re
import shutil
import sys

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, ROOT)

from lib.extension import reason_not_to_build  # noqa: E402

CONTENT = ('configs', 'lib', 'loaders', 'models', 'requirements', 'tools')  # of the package, beside the scripts
SCRIPTS = ('train.py', 'val.py', 'timing.py', 'gen_sweep_info.py', 'gen_instance_info.py')
COMMANDS = dict.fromkeys(('train', 'val', 'infer', 'check-data', 'toy'), 'sparseocc.__main__:run_command')
COMMANDS['eval'] = 'sparseocc.lib.metrics.command:main'  # needs nothing but the packages of EVALUATOR
EVALUATOR = ['numpy>=1.22', 'numba>=0.56', 'tqdm>=4.60']
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
    package = 'sparseocc.' + folder.replace('/', '.')
    spec = importlib.util.spec_from_file_location(f'{package}.setup', os.path.join(ROOT, folder, 'setup.py'))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.cuda_extensions(package, folder)


def cuda_build():
    """(the extensions, the command that builds them); none where they cannot or need not be built."""
    explicit = 'build_ext' in sys.argv
    reason = reason_not_to_build() or ('' if explicit else why_not_by_the_way())
    if reason and explicit:
        sys.exit('error: the CUDA extensions cannot be built. ' + reason)
    if reason:
        print('CUDA extensions are not built. ' + reason, file=sys.stderr)
        return [], {}
    from torch.utils.cpp_extension import BuildExtension

    modules = extensions_of('models/csrc') + extensions_of('lib/raycast')
    return modules, dict(build_ext=BuildExtension)


def why_not_by_the_way():
    """An installation compiles only for GPUs that are here or named; '' if there are."""
    if os.environ.get('SPARSEOCC_BUILD_OPS') == '0':
        return 'They are not asked for ("make build-ops" builds them).'
    import torch

    if torch.cuda.is_available() or os.environ.get('TORCH_CUDA_ARCH_LIST'):
        return ''
    return 'There is no GPU here, and TORCH_CUDA_ARCH_LIST is not set.'


class BuildPackage(build_py):
    """Puts the repository's folders and scripts into the package as they are."""

    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False):  # the package finds the repository
            return
        package = os.path.join(self.build_lib, 'sparseocc')
        ignore = shutil.ignore_patterns('__pycache__', '*.so', 'package', 'build')
        for folder in CONTENT:
            shutil.rmtree(os.path.join(package, folder), ignore_errors=True)
            shutil.copytree(folder, os.path.join(package, folder), ignore=ignore)
        for script in SCRIPTS:
            self.copy_file(script, os.path.join(package, script))


def main():
    os.chdir(ROOT)
    extensions, commands = cuda_build() if BUILDING.intersection(sys.argv) else ([], {})
    setup(
        name='sparseocc',
        version=version(),
        description='Fully sparse 3D occupancy prediction from multi-camera images',
        long_description=read('README.md'),
        long_description_content_type='text/markdown',
        license='Apache-2.0',
        python_requires='>=3.8',
        packages=['sparseocc'],
        package_dir={'sparseocc': 'tools/package', 'sparseocc.models': 'models', 'sparseocc.lib': 'lib'},
        entry_points=dict(console_scripts=[f'sparseocc-{name} = {function}' for name, function in COMMANDS.items()]),
        # No install_requires: OpenMMLab 1.x must come without its dependencies, which metadata cannot say.
        extras_require={'eval': EVALUATOR, 'accel': pins('accel.txt'), 'test': pins('test.txt')},
        ext_modules=extensions,
        cmdclass=dict(commands, build_py=BuildPackage),
    )


if __name__ == '__main__':
    main()
