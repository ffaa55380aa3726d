"""Set up the Python environment. Usually called by the Makefile; needs nothing but Python itself.

    make install                                          # the same as the next line, once
    python3.13 tools/install.py --venv .venv
    python3.13 tools/install.py --venv .venv --uv         # with uv in pip's place
    python3.13 tools/install.py --venv .venv --cpu        # PyTorch without CUDA, from PyTorch's own index
    python3.13 tools/install.py --venv .venv --mmcv-ops   # and compile mmcv's ops for the torch present
    python3.13 tools/install.py --venv .venv --accel      # Pillow-SIMD in Pillow's place, TurboJPEG's wrapper
    python3.8  tools/install.py --venv .venv-py38 --stack py38-torch1.10.2

Without --venv the packages go into the environment of the Python that runs this. Without --stack it takes the
newest set of pins that was tested with this Python. OpenMMLab 1.x and nuscenes-devkit are installed without their
dependencies, whose old pins cannot be met any more; base.txt of a stack lists them in versions that work.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from typing import List, NamedTuple, Tuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Stack(NamedTuple):
    """A set of pins in a folder of ``requirements/``, and the Pythons its tests passed on."""

    folder: str
    torch: str  # file of PyTorch's pins
    lock: str  # file with the version of every package that the others bring along
    pythons: Tuple[Tuple[int, int], ...]
    editable: bool = True  # its setuptools can install this project from its folder

    def path(self, name: str) -> str:
        """A file of the stack, relative to the repository."""
        return f'requirements/{self.folder}/{name}'


CURRENT = 'current'
STACKS = {  # newest first: 'current' is the first that was tested with the Python at hand
    'torch2.14': Stack('torch2.14', 'torch.txt', 'lock.txt', ((3, 11), (3, 12), (3, 13), (3, 14))),
    'torch2.11': Stack('torch2.11', 'torch.txt', 'lock.txt', ((3, 10), (3, 11), (3, 12))),
    'py38-torch2.0.0': Stack('py38', 'torch-2.0.0.txt', 'lock-2.0.0.txt', ((3, 8),), editable=False),
    'py38-torch1.10.2': Stack('py38', 'torch-1.10.2.txt', 'lock-1.10.2.txt', ((3, 8),), editable=False),
}
SETUP_SHIM = os.path.join(ROOT, 'tools', 'setup_shim')  # for old setup.py files on new Pythons: see the module there
TORCH_CPU_INDEX = 'https://download.pytorch.org/whl/cpu'
IMPORT_CHECK = (
    'from lib.openmmlab import prepare_openmmlab; prepare_openmmlab(); '
    'import mmdet.models, mmdet.datasets, mmseg, mmdet3d, nuscenes'
)
OPS_CHECK = 'from lib.openmmlab import has_compiled_ops; raise SystemExit(not has_compiled_ops())'


class InstallError(Exception):
    """One sentence for the user."""


def main() -> None:
    args = parse_args()
    try:
        stack = choose_stack(args.stack, sys.version_info[:2])
        python = make_venv(args.venv) if args.venv else sys.executable
        installer = Installer(python, stack, args.uv)
        if args.accel:
            installer.accelerate()
        else:
            installer.install(args.cpu, args.mmcv_ops)
    except InstallError as error:
        print(f'\nerror: {error}', file=sys.stderr)
        sys.exit(1)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--venv', help='folder of the virtual environment; made if missing')
    parser.add_argument(
        '--stack',
        choices=[CURRENT, *STACKS],
        default=CURRENT,
        help='set of pinned versions; current: the newest tested with this Python',
    )
    parser.add_argument('--uv', action='store_true', help='install with uv in place of pip')
    parser.add_argument('--cpu', action='store_true', help=f"PyTorch's build without CUDA, from {TORCH_CPU_INDEX}")
    parser.add_argument(
        '--mmcv-ops', action='store_true', help='compile mmcv-full for the torch present (20 minutes and more)'
    )
    parser.add_argument(
        '--accel', action='store_true', help='only: put Pillow-SIMD in the place of Pillow, and add PyTurboJPEG'
    )
    return parser.parse_args()


def choose_stack(name: str, python: Tuple[int, int]) -> Stack:
    """The stack called ``name``, which must be one that was tested with ``python`` (major, minor)."""
    candidates = list(STACKS.values()) if name == CURRENT else [STACKS[name]]
    fitting = [stack for stack in candidates if python in stack.pythons]
    if not fitting:
        tested = sorted({version for stack in candidates for version in stack.pythons})
        names = ' or '.join(map(_dotted, tested))
        what = 'the project' if name == CURRENT else f'stack {name}'
        raise InstallError(
            f'{sys.executable} is Python {_dotted(python)}; {what} needs Python {names}. '
            'Name it: make PYTHON=/path/to/it'
        )
    return fitting[0]


def _dotted(version: Tuple[int, int]) -> str:
    return '{}.{}'.format(*version)


def make_venv(folder: str) -> str:
    """Make the virtual environment if ``folder`` has none that works; return the path of its Python."""
    python = os.path.join(os.path.abspath(folder), 'bin', 'python')
    here, version = sys.version_info[:2], _version_of(python)
    if version is None:
        _check_not_in_use(folder)
        print(f'virtual environment of Python {_dotted(here)} in {folder}', flush=True)
        if subprocess.call([sys.executable, '-m', 'venv', '--clear', folder]) != 0:
            raise InstallError(
                f'{sys.executable} cannot make a virtual environment (see above); on Debian and Ubuntu: '
                f'apt install python{_dotted(here)}-venv'
            )
    elif version != here:
        raise InstallError(
            f'{folder} holds Python {_dotted(version)}, and {sys.executable} is {_dotted(here)}; name another '
            'folder (make VENV=...) or remove it'
        )
    if not _runs(python, 'import pip'):  # an earlier run was stopped early
        subprocess.call([python, '-m', 'ensurepip'])
    return python


def _check_not_in_use(folder: str) -> None:
    """Only an empty folder, or a virtual environment whose Python does not run, is (re)made."""
    is_venv = os.path.exists(os.path.join(folder, 'pyvenv.cfg'))
    if not is_venv and os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise InstallError(f'{folder} exists and is not a virtual environment; name another folder (make VENV=...)')


def _version_of(python: str):
    """(major, minor) of an interpreter, None if it is missing or does not run."""
    code = 'import sys; print(*sys.version_info[:2])'
    try:
        text = subprocess.check_output([python, '-c', code], stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return None
    return tuple(int(part) for part in text.split())


class Installer:
    """Brings the environment of ``python`` to a stack's pins; quick where they are met already."""

    def __init__(self, python: str, stack: Stack, uv: bool = False):
        self.python, self.stack = python, stack
        self.uv = _find_uv() if uv else ''

    def install(self, cpu: bool, mmcv_ops: bool) -> None:
        compiled = _runs(self.python, OPS_CHECK)  # a compiled mmcv stays
        unresolved = ['--no-deps', '--no-build-isolation']
        mmcv = [] if compiled else self.files('mmcv.txt')
        self.step('build tools', 'install', *self.files('build.txt'))
        if cpu:
            self.step('PyTorch without CUDA', 'install', *self.cpu_torch())
        self.step(
            'PyTorch and libraries (a first time downloads up to 3 GB)',
            'install',
            *self.files(self.stack.torch, 'base.txt', 'test.txt'),
            '-c',
            self.stack.path(self.stack.lock),
        )
        self.step(
            'OpenMMLab 1.x, nuscenes-devkit',
            'install',
            *unresolved,
            *mmcv,
            *self.files('openmmlab.txt'),
            MMCV_WITH_OPS='0',
            PYTHONPATH=SETUP_SHIM,
        )
        if self.stack.editable:
            self.step('import sparseocc, its commands', 'install', *unresolved, '-e', '.', SPARSEOCC_BUILD_OPS='0')
        if mmcv_ops and not compiled:
            self.compile_mmcv()
        self.check_imports()

    def accelerate(self) -> None:
        self.step('removing Pillow', 'uninstall', 'pillow')
        self.step('Pillow-SIMD, PyTurboJPEG', 'install', *self.files('accel.txt'))

    def files(self, *names: str) -> List[str]:
        return [part for name in names for part in ('-r', self.stack.path(name))]

    def cpu_torch(self) -> List[str]:
        """What asks PyTorch's own index for the pinned releases, built without CUDA."""
        with open(os.path.join(ROOT, self.stack.path(self.stack.torch))) as lines:
            pins = [line.strip() + '+cpu' for line in lines if line.startswith('torch')]
        return [*pins, '--extra-index-url', TORCH_CPU_INDEX]

    def check_imports(self) -> None:
        print('checking that everything can be imported', flush=True)
        if not _runs(self.python, IMPORT_CHECK, quiet=False):
            raise InstallError(
                'the packages are installed but cannot be imported (see above); '
                'run "make check-env", or remove the environment and install again'
            )

    def compile_mmcv(self) -> None:
        """Compile mmcv-full for the torch present, and only then let it take mmcv's place.

        By pip, which can compile without installing. Its cache is left out: it knows wheels by version, and this
        one belongs to one build of torch.
        """
        with tempfile.TemporaryDirectory() as wheels:
            self.step(
                'mmcv with compiled ops (compiling takes 20 minutes and more)',
                'wheel',
                *['--no-deps', '--no-build-isolation', '--no-cache-dir', '-w', wheels],
                *self.files('mmcv-ops.txt'),
                MMCV_WITH_OPS='1',
                PYTHONPATH=SETUP_SHIM,
            )
            self.step('removing mmcv without ops', 'uninstall', 'mmcv', 'mmcv-full')
            built = [os.path.join(wheels, name) for name in os.listdir(wheels)]
            self.step('mmcv with compiled ops in its place', 'install', '--no-deps', *built)
        if not _runs(self.python, OPS_CHECK, quiet=False):
            raise InstallError('mmcv-full was compiled but its ops cannot be loaded; run "make check-env"')

    def step(self, what: str, verb: str, *arguments: str, **environment: str) -> None:
        """One call of pip or uv; its own messages tell of a failure."""
        print(f'installing: {what}', flush=True)
        start = time.time()
        command = self.command(verb) + list(arguments)
        if subprocess.call(command, cwd=ROOT, env=dict(os.environ, **environment)) != 0:
            raise InstallError(
                f'could not install {what} (see above). Is the package index reachable, and is '
                'there room on the disk? Then run the same command again.'
            )
        print(f'  {time.time() - start:.0f} s', flush=True)

    def command(self, verb: str) -> List[str]:
        if self.uv and verb != 'wheel':
            compiled = ['--compile-bytecode'] if verb == 'install' else []  # as pip does, once and quietly
            return [self.uv, 'pip', verb, '-q', '--python', self.python, *compiled]
        pip = [self.python, '-m', 'pip', '--disable-pip-version-check', '--no-input', verb, '-q']
        return pip + ['-y'] if verb == 'uninstall' else pip


def _find_uv() -> str:
    found = shutil.which('uv')
    if not found:
        raise InstallError('uv is not on the path; install it (https://docs.astral.sh/uv) or leave out UV=1 (--uv)')
    return found


def _runs(python: str, code: str, quiet: bool = True) -> bool:
    """The code runs in ``python`` and exits with 0."""
    output = subprocess.DEVNULL if quiet else None
    return subprocess.call([python, '-W', 'ignore', '-c', code], cwd=ROOT, stdout=output, stderr=output) == 0


if __name__ == '__main__':
    main()
