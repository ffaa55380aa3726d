"""Set up the Python environment. Usually called by the Makefile; needs nothing but Python itself.

    make install                                          # the same as the next line, once
    python3.11 tools/install.py --venv .venv
    python3.11 tools/install.py --venv .venv --mmcv-ops   # and compile mmcv's ops for the torch present
    python3.8  tools/install.py --venv .venv-py38 --stack py38-torch2.0.0

Without --venv the packages go into the environment of the Python that runs this. OpenMMLab 1.x and
nuscenes-devkit are installed without their dependencies, whose old pins cannot be met any more;
requirements/base.txt lists them in versions that work.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CURRENT_PYTHONS = ((3, 10), (3, 11), (3, 12))
# stack -> (folder of requirement files, torch's requirement file, Pythons it was tested with)
STACKS = {
    'current': ('requirements', 'torch.txt', CURRENT_PYTHONS),
    'py38-torch2.0.0': ('requirements/py38', 'torch-2.0.0.txt', ((3, 8),)),
    'py38-torch1.10.2': ('requirements/py38', 'torch-1.10.2.txt', ((3, 8),)),
}
IMPORT_CHECK = (
    'from lib.openmmlab import prepare_openmmlab; prepare_openmmlab(); '
    'import mmdet.models, mmdet.datasets, mmseg, mmdet3d, nuscenes'
)
OPS_CHECK = 'from lib.openmmlab import has_compiled_ops; raise SystemExit(not has_compiled_ops())'


class InstallError(Exception):
    """One sentence for the user."""


def main():
    args = parse_args()
    try:
        check_python(args.stack)
        python = make_venv(args.venv) if args.venv else sys.executable
        install(python, args.stack, args.mmcv_ops)
    except InstallError as error:
        print(f'\nerror: {error}', file=sys.stderr)
        sys.exit(1)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--venv', help='folder of the virtual environment; made if missing')
    parser.add_argument('--stack', choices=sorted(STACKS), default='current', help='set of pinned versions')
    parser.add_argument(
        '--mmcv-ops', action='store_true', help='compile mmcv-full for the torch present (20 minutes and more)'
    )
    return parser.parse_args()


def check_python(stack):
    """The Python that runs this is one the stack was tested with."""
    tested = STACKS[stack][2]
    if sys.version_info[:2] not in tested:
        raise InstallError(
            '%s is Python %d.%d; stack %s needs Python %s. Name it: make PYTHON=/path/to/it'
            % ((sys.executable,) + sys.version_info[:2] + (stack, ' or '.join('%d.%d' % version for version in tested)))
        )


def make_venv(folder):
    """Make the virtual environment if ``folder`` has none that works; return the path of its Python."""
    python = os.path.join(os.path.abspath(folder), 'bin', 'python')
    version = _version_of(python)
    if version is None:
        _check_not_in_use(folder)
        print('virtual environment of Python %d.%d in %s' % (sys.version_info[:2] + (folder,)), flush=True)
        if subprocess.call([sys.executable, '-m', 'venv', '--clear', folder]) != 0:
            raise InstallError(
                '%s cannot make a virtual environment (see above); on Debian and Ubuntu: '
                'apt install python%d.%d-venv' % ((sys.executable,) + sys.version_info[:2])
            )
    elif version != sys.version_info[:2]:
        raise InstallError(
            '%s holds Python %d.%d, and %s is %d.%d; name another folder (make VENV=...) or '
            'remove it' % ((folder,) + version + (sys.executable,) + sys.version_info[:2])
        )
    if not _runs(python, 'import pip'):  # an earlier run was stopped early
        subprocess.call([python, '-m', 'ensurepip'])
    return python


def _check_not_in_use(folder):
    """Only an empty folder, or a virtual environment whose Python does not run, is (re)made."""
    is_venv = os.path.exists(os.path.join(folder, 'pyvenv.cfg'))
    if not is_venv and os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise InstallError(f'{folder} exists and is not a virtual environment; name another folder (make VENV=...)')


def _version_of(python):
    """(major, minor) of an interpreter, None if it is missing or does not run."""
    code = 'import sys; print(*sys.version_info[:2])'
    try:
        text = subprocess.check_output([python, '-c', code], stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return None
    return tuple(int(part) for part in text.split())


def install(python, stack, mmcv_ops):
    """Bring the environment of ``python`` to the stack's pins; quick where they are met already."""
    folder, torch_file, _ = STACKS[stack]

    def files(*names):
        return [part for name in names for part in ('-r', os.path.join(folder, name))]

    unresolved = ['--no-deps', '--no-build-isolation']
    mmcv = [] if _runs(python, OPS_CHECK) else files('mmcv.txt')  # a compiled one stays
    _step('build tools', python, ['install'] + files('build.txt'))
    _step(
        'PyTorch and libraries (a first time downloads up to 3 GB)',
        python,
        ['install'] + files(torch_file, 'base.txt', 'test.txt'),
    )
    _step(
        'OpenMMLab 1.x, nuscenes-devkit',
        python,
        ['install'] + unresolved + mmcv + files('openmmlab.txt'),
        MMCV_WITH_OPS='0',
    )
    if mmcv_ops and not _runs(python, OPS_CHECK):
        _compile_mmcv(python, files('mmcv-ops.txt'))
    print('checking that everything can be imported', flush=True)
    if not _runs(python, IMPORT_CHECK, quiet=False):
        raise InstallError(
            'the packages are installed but cannot be imported (see above); '
            'run "make check-env", or remove the environment and install again'
        )


def _step(what, python, arguments, **environment):
    """One call of pip; its own messages tell of a failure."""
    print(f'installing: {what}', flush=True)
    start = time.time()
    command = [python, '-m', 'pip', '--disable-pip-version-check', '--no-input'] + arguments[:1] + ['-q']
    if subprocess.call(command + arguments[1:], cwd=ROOT, env=dict(os.environ, **environment)) != 0:
        raise InstallError(
            f'could not install {what} (see pip above). Is the package index reachable, and is '
            'there room on the disk? Then run the same command again.'
        )
    print('  %.0f s' % (time.time() - start), flush=True)


def _compile_mmcv(python, requirement):
    """Compile mmcv-full for the torch of ``python``, and only then let it take mmcv's place.

    pip's cache is left out: it knows wheels by version, and this one belongs to one build of torch.
    """
    with tempfile.TemporaryDirectory() as wheels:
        _step(
            'mmcv with compiled ops (compiling takes 20 minutes and more)',
            python,
            ['wheel', '--no-deps', '--no-build-isolation', '--no-cache-dir', '-w', wheels] + requirement,
            MMCV_WITH_OPS='1',
        )
        _step('removing mmcv without ops', python, ['uninstall', '-y', 'mmcv', 'mmcv-full'])
        _step(
            'mmcv with compiled ops in its place',
            python,
            ['install', '--no-deps'] + [os.path.join(wheels, name) for name in os.listdir(wheels)],
        )
    if not _runs(python, OPS_CHECK, quiet=False):
        raise InstallError('mmcv-full was compiled but its ops cannot be loaded; run "make check-env"')


def _runs(python, code, quiet=True):
    """The code runs in ``python`` and exits with 0."""
    output = subprocess.DEVNULL if quiet else None
    return subprocess.call([python, '-c', code], cwd=ROOT, stdout=output, stderr=output) == 0


if __name__ == '__main__':
    main()
