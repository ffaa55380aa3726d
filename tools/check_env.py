"""Show what is installed here beside what was tested, and what to do about each problem.

    make check-env
    python tools/check_env.py

Exits with 1 if something that is required is missing or does not work. Needs nothing installed to run.
"""

import ast
import contextlib
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
from typing import Dict, Iterator, List, NamedTuple, Sequence, Tuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from tools.install import STACKS, Stack  # noqa: E402

OK, DIFFERS, MISSING, BROKEN, NOTE = 'ok', 'other version', 'MISSING', 'BROKEN', '-'
PYTHONS = ['{}.{}'.format(*version) for version in sorted({v for stack in STACKS.values() for v in stack.pythons})]
REPLACEMENTS = {'pillow': 'pillow-simd'}  # distributions that install the same modules


class Row(NamedTuple):
    """A line of the table. ``remedy``: what to do, if anything. Only ``required`` rows fail the check."""

    name: str
    found: str
    tested: str
    state: str
    remedy: str = ''
    required: bool = False


def main() -> None:
    rows = [python_row()]
    rows += package_rows('build', 'torch', 'base', 'openmmlab', required=True)
    rows += package_rows('test', 'accel', required=False)
    rows += [libraries_row()] + gpu_rows() + compiled_rows()
    print(render(rows))
    sys.exit(1 if any(row.required and row.state in (MISSING, BROKEN) for row in rows) else 0)


# ---- what was tested: the requirement files ----


def stacks_here() -> List[Stack]:
    """The sets of pins that were tested with this Python, newest first; the newest of all for another Python."""
    fitting = [stack for stack in STACKS.values() if sys.version_info[:2] in stack.pythons]
    return fitting or list(STACKS.values())[:1]


def tested_versions(*kinds: str) -> List[Tuple[str, str]]:
    """(package, version tested) of requirement files; the versions of several stacks are joined by a comma.

    Args:
        kinds: names of files without ``.txt``; 'torch' is the stack's file for PyTorch.
    """
    versions: Dict[str, List[str]] = {}
    for kind in kinds:
        for stack in stacks_here():
            for package, version in pins_of(stack.path(stack.torch if kind == 'torch' else kind + '.txt')):
                found = versions.setdefault(package, [])
                if version not in found:
                    found.append(version)
    return [(package, ', '.join(found)) for package, found in versions.items()]


def pins_of(path: str) -> Iterator[Tuple[str, str]]:
    """(package, version) of each line of a requirement file; '>=' stays in front of a lower bound."""
    with open(os.path.join(ROOT, path)) as lines:
        for line in lines:
            match = re.match(r'([A-Za-z0-9_.-]+)\s*([=>]=)\s*([^\s;#]+)', line)
            if match:
                package, operator, version = match.groups()
                yield package, version if operator == '==' else operator + version


# ---- what is here ----


def installed_version(package: str) -> str:
    """Version of an installed distribution, '' if it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ''


def python_row() -> Row:
    found = '.'.join(map(str, sys.version_info[:3]))
    if found.rsplit('.', 1)[0] in PYTHONS:
        return Row('Python', found, ', '.join(PYTHONS), OK, required=True)
    return Row(
        'Python',
        found,
        ', '.join(PYTHONS),
        DIFFERS,
        'not tested with this Python; make install PYTHON=python3.13 VENV=.venv313',
        required=True,
    )


def package_rows(*kinds: str, required: bool) -> List[Row]:
    """A row per package of these requirement files; mmcv's stands for mmcv or mmcv-full."""
    tested = tested_versions(*kinds)
    rows = [package_row(package, version, required) for package, version in tested]
    return rows + ([mmcv_row()] if required else [])


def package_row(package: str, tested: str, required: bool) -> Row:
    found = installed_version(package)
    replacement = REPLACEMENTS.get(package)
    if not found and replacement and installed_version(replacement):  # make accel
        return Row(package, f'{replacement} {installed_version(replacement)}', tested, OK, required=required)
    if not found:
        remedy = 'make install' if required else ''
        return Row(package, 'no', tested, MISSING if required else NOTE, remedy, required)
    same = tested.startswith('>=') or found.split('+')[0] in tested.split(', ')
    return Row(package, found, tested, OK if same else DIFFERS, required=required)


def mmcv_row() -> Row:
    tested = ', '.join('{} {}'.format(*item) for item in tested_versions('mmcv', 'mmcv-ops'))
    found = [(name, installed_version(name)) for name in ('mmcv', 'mmcv-full') if installed_version(name)]
    text = ', '.join('{} {}'.format(*item) for item in found)
    if not found:
        return Row('mmcv', 'no', tested, MISSING, 'make install', required=True)
    if len(found) == 2:
        return Row(
            'mmcv',
            text,
            tested,
            BROKEN,
            f'two packages in one folder: pip uninstall mmcv mmcv-full, remove {stamp_hint()}, make install',
            required=True,
        )
    return Row('mmcv', text, tested, OK if text in tested else DIFFERS, required=True)


def stamp_hint() -> str:
    return os.path.join(os.path.basename(sys.prefix), '.installed-*')


def libraries_row() -> Row:
    """OpenMMLab and nuscenes-devkit can be imported, as the project imports them."""
    name = 'import mmdet, nuscenes'
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from lib.openmmlab import prepare_openmmlab

            prepare_openmmlab()
            for module in ('mmdet.models', 'mmdet.datasets', 'nuscenes.nuscenes'):
                importlib.import_module(module)
    except Exception as error:  # whatever a broken library raises belongs in the table
        remedy = f'{first_line(error)} (make install, or in a new place: make install VENV=.venv2)'
        return Row(name, 'no', '', BROKEN, remedy, required=True)
    return Row(name, 'yes', '', OK, required=True)


def first_line(error: Exception) -> str:
    return (f'{type(error).__name__}: {error}').splitlines()[0]


def gpu_rows() -> List[Row]:
    try:
        torch = importlib.import_module('torch')
    except (ImportError, OSError):
        return [Row('GPU', 'unknown', '', NOTE)]
    built_for = f'torch for CUDA {torch.version.cuda}' if torch.version.cuda else 'torch without CUDA'
    if not torch.cuda.is_available():
        remedy = (
            'a GPU is here, but this torch cannot use it: see docs/install.md for other CUDA versions'
            if shutil.which('nvidia-smi')
            else ''
        )
        return [Row('GPU', f'none ({built_for})', 'H200', NOTE, remedy), nvcc_row(torch)]
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    found = f'{len(names)} x {names[0]} ({built_for})'
    return [Row('GPU', found, 'H200', OK), nvcc_row(torch)]


def nvcc_row(torch) -> Row:
    version = nvcc_version()
    wanted = torch.version.cuda or ''
    if not version:
        return Row('nvcc', 'no', wanted, NOTE)
    same_major = version.split('.')[0] == wanted.split('.')[0]
    remedy = '' if same_major else f'to compile the ops, set CUDA_HOME to a toolkit of CUDA {wanted}'
    return Row('nvcc', version, wanted, OK if same_major else DIFFERS, remedy)


def nvcc_version() -> str:
    """Release of the CUDA compiler on the path or under CUDA_HOME, '' if there is none."""
    home = os.environ.get('CUDA_HOME') or os.environ.get('CUDA_PATH')
    nvcc = os.path.join(home, 'bin', 'nvcc') if home else shutil.which('nvcc')
    try:
        text = subprocess.check_output([nvcc or 'nvcc', '--version'], universal_newlines=True)
    except (OSError, subprocess.CalledProcessError):
        return ''
    match = re.search(r'release (\d+\.\d+)', text)
    return match.group(1) if match else ''


def compiled_rows() -> List[Row]:
    """mmcv's ops and the project's CUDA extensions: compiled or not."""
    build = 'make build-ops (used on a GPU only)'
    return [
        mmcv_ops_row(),
        extension_row('CUDA sampling', 'models.csrc._msmv_sampling', build),
        extension_row('CUDA mixing', 'models.csrc._adaptive_mixing', build),
        extension_row('CUDA attention', 'models.csrc._distance_attention', build),
        extension_row('CUDA ray casting', 'lib.raycast.raycast_cuda', build),
    ]


def mmcv_ops_row() -> Row:
    name, remedy = 'mmcv compiled ops', 'not needed; make install MMCV_OPS=1 compiles them'
    try:
        from lib.openmmlab import has_compiled_ops

        compiled = has_compiled_ops()
    except Exception as error:  # as above
        return Row(name, 'no', '', NOTE, first_line(error))
    return Row(name, 'yes' if compiled else 'no', '', OK if compiled else NOTE, '' if compiled else remedy)


def extension_row(name: str, module: str, remedy: str) -> Row:
    try:
        importlib.import_module('torch')  # the extension is linked against its libraries
        importlib.import_module(module)
    except ModuleNotFoundError:
        return Row(name, 'no', '', NOTE, remedy)
    except Exception as error:  # as above: an extension built for another torch raises what it likes
        return Row(name, 'no', '', NOTE, f'{first_line(error)}; {remedy}')
    return Row(name, 'yes', '', OK)


# ---- the table ----


def render(rows: Sequence[Row]) -> str:
    """The table, then one line per remedy."""
    header = Row('', 'found', 'tested', '')
    widths = [max(len(row[column]) for row in list(rows) + [header]) for column in range(4)]
    lines = [f'SparseOcc {project_version()}']
    for row in [header] + list(rows):
        lines.append('  '.join(text.ljust(width) for text, width in zip(row[:4], widths)).rstrip())
    remedies = [f'{row.name}: {row.remedy}' for row in rows if row.remedy]
    return '\n'.join(lines + [''] + (remedies or ['Nothing to mend.']))


def project_version() -> str:
    with open(os.path.join(ROOT, 'lib', '__init__.py')) as file:
        for statement in ast.parse(file.read()).body:
            if isinstance(statement, ast.Assign) and statement.targets[0].id == '__version__':
                return ast.literal_eval(statement.value)
    raise ValueError('lib/__init__.py does not set __version__')


if __name__ == '__main__':
    main()
