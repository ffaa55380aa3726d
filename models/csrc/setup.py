"""Build the CUDA operators in place, next to their Python wrappers:

    cd models/csrc && python setup.py build_ext --inplace

Builds for the GPU present, or for the architectures named in TORCH_CUDA_ARCH_LIST (for example
``TORCH_CUDA_ARCH_LIST="8.0;9.0"``). Needs nvcc of the CUDA version that PyTorch was built with; the
toolkit is found through CUDA_HOME, nvcc on the PATH, or /usr/local/cuda. The project also runs without
these operators.

The top-level setup.py takes ``cuda_extensions`` and ``build_extension_class`` from here. PyTorch is
imported only where nvcc is found.
"""

import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

# Extension module -> its sources, relative to this folder. Headers count as dependencies.
OPERATORS = {
    '_adaptive_mixing': ['adaptive_mixing/bindings.cpp', 'adaptive_mixing/adaptive_mixing.cu'],
    '_distance_attention': ['distance_attention/bindings.cpp', 'distance_attention/distance_attention.cu'],
    '_msmv_sampling': ['msmv_sampling/bindings.cpp', 'msmv_sampling/msmv_sampling.cu'],
}
HEADERS = [
    'include/device.h',
    'adaptive_mixing/adaptive_mixing.h',
    'adaptive_mixing/mixing_kernels.h',
    'adaptive_mixing/tensor_core_mixing.h',
    'distance_attention/distance_attention.h',
    'distance_attention/attention_kernels.h',
    'msmv_sampling/msmv_sampling.h',
    'msmv_sampling/sampling_kernels.h',
    'msmv_sampling/sampling_math.h',
]


def find_cuda_home():
    """Folder of the CUDA toolkit, or None."""
    named = [os.environ.get('CUDA_HOME'), os.environ.get('CUDA_PATH')]
    nvcc = shutil.which('nvcc')
    beside_nvcc = [Path(nvcc).resolve().parent.parent] if nvcc else []
    for candidate in [name for name in named if name] + beside_nvcc + ['/usr/local/cuda']:
        folder = Path(candidate)
        if (folder / 'bin' / 'nvcc').is_file() and (folder / 'include' / 'cuda_runtime_api.h').is_file():
            return folder
    return None


def reason_not_to_build():
    """One sentence that says why the operators cannot be built here, or None."""
    home = find_cuda_home()
    if home is None:
        return 'No CUDA toolkit found: install nvcc, or set CUDA_HOME to the folder that holds bin/nvcc.'
    try:
        import torch
    except ImportError:
        return 'PyTorch is not installed in this Python: install it first (pip: --no-build-isolation).'
    if torch.version.cuda is None:
        return f'This PyTorch ({torch.__version__}) has no CUDA: install a CUDA build of it.'
    return None


def default_architectures():
    """What to build for where no GPU is present and TORCH_CUDA_ARCH_LIST is not set."""
    import torch

    major, minor = [int(part) for part in torch.version.cuda.split('.')[:2]]
    if (major, minor) >= (13, 0):
        return '7.5;8.0;8.6;9.0;10.0;12.0+PTX'
    if (major, minor) >= (11, 8):
        return '7.0;7.5;8.0;8.6;9.0+PTX'
    return '7.0;7.5+PTX'


def prepare_environment():
    """Point PyTorch's build helpers to the toolkit and the architectures."""
    import torch

    os.environ['CUDA_HOME'] = str(find_cuda_home())
    if not os.environ.get('TORCH_CUDA_ARCH_LIST') and not torch.cuda.is_available():
        os.environ['TORCH_CUDA_ARCH_LIST'] = default_architectures()
        print(
            'No GPU here: building for {} (set TORCH_CUDA_ARCH_LIST to choose).'.format(
                os.environ['TORCH_CUDA_ARCH_LIST']
            )
        )


def cuda_extensions(package='', folder=''):
    """The extensions to pass to ``setup(ext_modules=...)``; where they cannot be built: none, and a sentence.

    Args:
        package: dotted prefix of the module names, for example 'models.csrc'.
        folder: path from the folder of the calling setup.py to this one, for example 'models/csrc'.
    """
    reason = reason_not_to_build()
    if reason is not None:
        print('CUDA operators are not built. ' + reason, file=sys.stderr)
        return []
    prepare_environment()
    from torch.utils.cpp_extension import CUDAExtension

    at = lambda names: [os.path.join(folder, name) for name in names]  # noqa: E731
    return [
        CUDAExtension(
            '.'.join([package, name] if package else [name]),
            at(sources),
            depends=at(HEADERS),
            extra_compile_args={'cxx': ['-O3'], 'nvcc': ['-O3', '-lineinfo']},
        )
        for name, sources in OPERATORS.items()
    ]


def build_extension_class():
    """The ``build_ext`` command that compiles CUDA sources."""
    from torch.utils.cpp_extension import BuildExtension

    return BuildExtension


def main():
    os.chdir(str(HERE))
    reason = reason_not_to_build()
    if reason is not None:
        raise SystemExit(reason)
    from setuptools import setup

    extensions = cuda_extensions()
    setup(
        name='sparseocc-operators',
        version='1',
        packages=[],
        ext_modules=extensions,
        cmdclass={'build_ext': build_extension_class()},
        options={'build': {'build_base': os.path.join('..', '..', 'build', 'csrc')}},
    )


if __name__ == '__main__':
    main()
