"""Compiled code: extensions, built in place and loaded on first use, and loops that Numba compiles on their first call.

Without an extension its caller runs a slower version, and one clear sentence says so. Nothing here imports
PyTorch before an extension is built or asked for: the ``setup.py`` files use this module too.
"""

import importlib
import os
import shutil
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Dict, List, Mapping, Optional, Sequence, Set, Tuple

from .errors import UserError, missing_package, reason

_said: Set[Tuple[str, str]] = set()  # warnings given: (how to build it, what is wrong)


class Extension:
    """A compiled module, which has ``interface_version`` and ``runs_on_current_device()``.

    Args:
        name: of the module, e.g. ``lib.raycast.raycast_cuda``.
        interface_version: what the Python side expects.
        build_command: builds it; extensions with one command warn together.
        otherwise: end of the sentence "... , so": what happens without it.
    """

    def __init__(self, name: str, interface_version: int, build_command: str, otherwise: str):
        self.name, self.interface_version = name, interface_version
        self.build_command, self.otherwise = build_command, otherwise
        self._tried = False
        self._module: Optional[ModuleType] = None
        self._runs: Dict[int, bool] = {}

    def find(self, device) -> Optional[ModuleType]:
        """The module if it can run on the device (a ``torch.device`` or its name), else None.

        On a CUDA device without a usable module this warns, once per process and reason.
        """
        import torch  # its libraries must be loaded before the extension's

        device = torch.device(device)
        module = self._load() if device.type == 'cuda' else None
        if module is None:
            return None
        if not torch.cuda.is_available():
            self._warn('cannot run here (PyTorch sees no GPU)')
            return None
        index = torch.cuda.current_device() if device.index is None else device.index
        if index not in self._runs:
            with torch.cuda.device(index):
                self._runs[index] = module.runs_on_current_device()
            if not self._runs[index]:
                capability = '.'.join(str(part) for part in torch.cuda.get_device_capability(index))
                self._warn(f'was built for other GPUs than this one (compute capability {capability})')
        return module if self._runs[index] else None

    def _load(self) -> Optional[ModuleType]:
        if not self._tried:
            self._tried, self._module = True, self._import()
        return self._module

    def _import(self) -> Optional[ModuleType]:
        try:
            module = importlib.import_module(self.name)
        except ModuleNotFoundError:
            self._warn('is not built')
            return None
        except ImportError as error:
            self._warn(f'cannot be loaded ({str(error).splitlines()[0]})')
            return None
        if getattr(module, 'interface_version', None) != self.interface_version:
            self._warn('was built from other sources than these')
            return None
        return module

    def _warn(self, problem: str) -> None:
        if (self.build_command, problem) in _said:
            return
        _said.add((self.build_command, problem))
        text = f'{self.name} {problem}, so {self.otherwise}; to build it: {self.build_command}'
        warnings.warn(text, RuntimeWarning, stacklevel=3)


# -- loops


def jit(function):
    """Compile ``function`` on first call, to run without the GIL; keep the result on disk where possible.

    Strict floating point: nothing is reordered or fused, so results do not depend on the machine. A division by
    zero gives an infinity or NaN as in NumPy: checks for it would keep loops from becoming vector instructions.
    """
    numba = _import_numba()
    options = dict(nogil=True, error_model='numpy')
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to keep it in can be written
        return numba.njit(**options)(function)


def _import_numba() -> ModuleType:  # here, not when an extension is built
    try:
        return importlib.import_module('numba')
    except ModuleNotFoundError as error:
        raise missing_package(error) from error
    except ImportError as error:  # of another NumPy, most often
        raise UserError(
            f'Numba is installed but cannot be used ({reason(error)}); run "make install" in the repository, or '
            'install versions that fit each other'
        ) from error


# -- building


def find_cuda_home() -> Optional[Path]:
    """Folder of the CUDA toolkit: CUDA_HOME, CUDA_PATH, that of nvcc, or /usr/local/cuda; None without any."""
    nvcc = shutil.which('nvcc')
    beside_nvcc = Path(nvcc).resolve().parent.parent if nvcc else None
    for candidate in (os.environ.get('CUDA_HOME'), os.environ.get('CUDA_PATH'), beside_nvcc, '/usr/local/cuda'):
        folder = Path(candidate or os.devnull)
        if (folder / 'bin' / 'nvcc').is_file() and (folder / 'include' / 'cuda_runtime_api.h').is_file():
            return folder
    return None


def reason_not_to_build() -> Optional[str]:
    """One sentence that says why CUDA extensions cannot be built here, or None."""
    if find_cuda_home() is None:
        return 'No CUDA toolkit found: install nvcc, or set CUDA_HOME to the folder that holds bin/nvcc.'
    try:
        import torch
    except ImportError:
        return 'PyTorch is not installed in this Python: install it first (pip: --no-build-isolation).'
    if torch.version.cuda is None:
        return f'This PyTorch ({torch.__version__}) has no CUDA: install a CUDA build of it.'
    return None


def default_architectures() -> str:
    """What to build for where no GPU is present and TORCH_CUDA_ARCH_LIST is not set."""
    import torch

    major, minor = [int(part) for part in torch.version.cuda.split('.')[:2]]
    if (major, minor) >= (13, 0):
        return '7.5;8.0;8.6;9.0;10.0;12.0+PTX'
    if (major, minor) >= (11, 8):
        return '7.0;7.5;8.0;8.6;9.0+PTX'
    return '7.0;7.5+PTX'


def cuda_extensions(
    sources: Mapping[str, Sequence[str]], headers: Sequence[str], package: str, folder: str, nvcc_flags: Sequence[str]
) -> List:
    """Extensions to pass to ``setup(ext_modules=...)``; the environment is set for PyTorch to build them.

    Args:
        sources: files of each module, relative to their ``setup.py``.
        headers: files that all of them depend on, likewise.
        package: dotted prefix of the module names, or ''.
        folder: path from the running ``setup.py`` to the sources' own, or ''.
        nvcc_flags: beside ``-O3``.
    """
    _prepare_environment()
    from torch.utils.cpp_extension import CUDAExtension

    flags = dict(cxx=['-O3'], nvcc=['-O3', '-lineinfo', *nvcc_flags])
    depends = [os.path.join(folder, name) for name in headers]
    return [
        CUDAExtension(
            f'{package}.{name}' if package else name,
            [os.path.join(folder, file) for file in files],
            depends=depends,
            extra_compile_args=flags,
        )
        for name, files in sources.items()
    ]


def _prepare_environment() -> None:
    """Point PyTorch's build helpers to the toolkit and the architectures."""
    import torch

    os.environ['CUDA_HOME'] = str(find_cuda_home())
    if not os.environ.get('TORCH_CUDA_ARCH_LIST') and not torch.cuda.is_available():
        os.environ['TORCH_CUDA_ARCH_LIST'] = default_architectures()
        print(f'No GPU here: building for {default_architectures()} (set TORCH_CUDA_ARCH_LIST to choose).')


def build_in_place(name: str, folder: Path, make_extensions) -> None:
    """Run ``setup`` in an extension's own folder, as its ``setup.py`` is asked to.

    Args:
        name: of the distribution; what is compiled on the way goes to ``build/<name>`` of the repository.
        folder: of that ``setup.py``, two levels below the repository's root.
        make_extensions: gives the extensions; called once they are known to be buildable.
    """
    reason = reason_not_to_build()
    if reason is not None:
        sys.exit(reason)
    os.chdir(folder)
    extensions = make_extensions()
    from setuptools import setup
    from torch.utils.cpp_extension import BuildExtension

    setup(
        name=name,
        version='1',
        packages=[],
        ext_modules=extensions,
        cmdclass=dict(build_ext=BuildExtension),
        options=dict(build=dict(build_base=os.path.join('..', '..', 'build', name))),
    )
