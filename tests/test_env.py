"""The installation: pins, version, Makefile, report on the environment. Nothing here uses the network."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib import __version__
from tools import check_env, install

ROOT = Path(__file__).resolve().parents[1]
MAKE_VARIABLES = ('MAKEFLAGS', 'MFLAGS', 'MAKEOVERRIDES', 'PYTHON', 'VENV', 'STACK', 'MMCV_OPS')
FOLDERS = ('torch2.14', 'torch2.11', 'py38')
OTHER_STACK = 'torch2.14' if sys.version_info[:2] == (3, 8) else 'py38-torch2.0.0'


def run(*command, **environment):
    """The finished process. What "make test" was told is not passed on to a make that is tested."""
    inherited = {name: value for name, value in os.environ.items() if name not in MAKE_VARIABLES}
    return subprocess.run(
        [str(part) for part in command],
        cwd=str(ROOT),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        env=dict(inherited, **environment),
    )


def lines_of(path):
    stripped = (line.split('#')[0].strip() for line in path.read_text().splitlines())
    return [line for line in stripped if line]


def name_of(requirement):
    return re.match(r'[A-Za-z0-9_.-]+', requirement).group(0).lower()


# ---- check_env ----


def test_check_env_passes_here_and_lists_every_required_package():
    result = run(sys.executable, 'tools/check_env.py')
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith(f'SparseOcc {__version__}\n')
    table = result.stdout.lower()
    for name in ('torch.txt', 'base.txt', 'openmmlab.txt'):
        for requirement in lines_of(ROOT / 'requirements' / 'torch2.14' / name):
            assert f'\n{name_of(requirement)} ' in table
    for row in ('gpu', 'mmcv compiled ops', 'cuda sampling', 'cuda mixing', 'cuda attention', 'cuda ray casting'):
        assert f'\n{row} ' in table


def test_check_env_fails_and_tells_the_remedy_where_nothing_is_installed():
    result = run(sys.executable, '-I', '-S', 'tools/check_env.py')  # -S: without site-packages
    assert result.returncode == 1, result.stderr
    assert re.search(r'^numpy +no +\S.*? +MISSING$', result.stdout, re.M)
    assert re.search(r'^torch: make install$', result.stdout, re.M)
    assert 'Traceback' not in result.stderr


def test_other_version_than_tested_is_shown_but_is_no_failure(monkeypatch):
    monkeypatch.setattr(check_env, 'installed_version', lambda package: '9.9')
    assert check_env.package_row('numpy', '1.26.4', required=True).state == check_env.DIFFERS
    assert check_env.package_row('packaging', '>=23.0', required=True).state == check_env.OK
    monkeypatch.setattr(check_env, 'installed_version', lambda package: '2.0.0+cu118')
    assert check_env.package_row('torch', '1.10.2, 2.0.0', required=True).state == check_env.OK


def test_pillow_simd_stands_for_pillow(monkeypatch):
    monkeypatch.setattr(check_env, 'installed_version', {'pillow': '', 'pillow-simd': '9.5.0'}.get)
    row = check_env.package_row('pillow', '12.0.0', required=True)
    assert (row.found, row.state, row.remedy) == ('pillow-simd 9.5.0', check_env.OK, '')


def test_mmcv_and_mmcv_full_side_by_side_are_broken(monkeypatch):
    monkeypatch.setattr(check_env, 'installed_version', lambda package: '1.7.0')
    assert check_env.mmcv_row().state == check_env.BROKEN
    monkeypatch.setattr(check_env, 'installed_version', {'mmcv': '', 'mmcv-full': '1.7.2'}.get)
    assert check_env.mmcv_row().found == 'mmcv-full 1.7.2'
    monkeypatch.setattr(check_env, 'installed_version', lambda package: '')
    assert check_env.mmcv_row().state == check_env.MISSING


# ---- version and requirement files ----


def test_version_is_the_same_everywhere_and_needs_no_torch():
    code = (
        'import runpy, sys; sys.modules["torch"] = None; sys.argv = ["setup.py", "--version"]; '
        'runpy.run_path("setup.py", run_name="__main__")'
    )
    result = run(sys.executable, '-c', code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == __version__ == check_env.project_version()


@pytest.mark.parametrize('folder', FOLDERS)
def test_every_requirement_is_pinned(folder):
    files = (ROOT / 'requirements' / folder).glob('*.txt')
    loose = [line for path in files for line in lines_of(path) if '==' not in line]
    assert sorted(name_of(line) for line in loose) == ['packaging', 'pip']


@pytest.mark.parametrize('stack', install.STACKS.values(), ids=list(install.STACKS))
def test_lock_file_agrees_with_the_pins(stack):
    """It was made ("make lock") after the last change of a pin."""
    locked = lines_of(ROOT / stack.path(stack.lock))
    locked = {line.split(';')[0].strip().lower().replace('_', '-') for line in locked}
    pins = [line for kind in (stack.torch, 'base.txt', 'test.txt') for line in lines_of(ROOT / stack.path(kind))]
    missing = {pin.lower().replace('_', '-') for pin in pins if '==' in pin} - locked
    assert not missing and len(locked) > len(pins)


def test_all_folders_list_the_same_packages():
    files = ('build.txt', 'base.txt', 'mmcv.txt', 'mmcv-ops.txt', 'openmmlab.txt', 'test.txt', 'accel.txt')
    for name in files:
        packages = [sorted(map(name_of, lines_of(ROOT / 'requirements' / folder / name))) for folder in FOLDERS]
        assert packages[0] == packages[1] == packages[2], name


def test_ci_only_runs_make():
    commands = [line for line in lines_of(ROOT / '.ci/run') if not line.startswith('#')]
    assert commands[-3:] == ['make lint', 'make docs', 'exec make test'] and os.access(str(ROOT / '.ci/run'), os.X_OK)


@pytest.fixture(scope='module')
def package(tmp_path_factory):
    """Folder that holds ``sparseocc`` as an installation has it."""
    folder = tmp_path_factory.mktemp('site')
    result = run(sys.executable, 'setup.py', '-q', 'build_py', '--build-lib', folder, 'egg_info', '--egg-base', folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_package_has_its_commands(package):
    text = (package / 'sparseocc.egg-info' / 'entry_points.txt').read_text()
    commands = re.findall(r'^sparseocc-([\w-]+) = ', text, re.M)
    assert sorted(commands) == ['check-data', 'eval', 'infer', 'toy', 'train', 'val']
    assert {str(path.relative_to(package)) for path in package.iterdir()} == {'sparseocc', 'sparseocc.egg-info'}


@pytest.mark.parametrize('command', ['train', 'val', 'infer', 'eval', 'check-data', 'toy'])
def test_package_runs_the_scripts(package, tmp_path, command):
    code = f'import sys, sparseocc.__main__ as m; sys.argv = ["sparseocc-{command}", "--help"]; m.run_command()'
    result = run('env', '-C', tmp_path, sys.executable, '-c', code, PYTHONPATH=str(package))
    assert result.returncode == 0 and result.stdout.startswith('usage: '), result.stderr


@pytest.mark.parametrize(
    'command',
    [
        'val --config configs/toy/semantic.py --weights w',
        'infer --config configs/toy/semantic.py --weights w --out o',
        'check-data --config configs/toy/semantic.py',
        'toy --out o',
    ],
)
def test_a_command_names_the_package_that_it_lacks(package, tmp_path, command):
    """As where only the evaluator is installed."""
    (tmp_path / 'w').write_bytes(b'weights')
    words = f'sparseocc-{command}'.split()
    code = f'import sys, sparseocc.__main__ as m; sys.modules["torch"] = None; sys.argv = {words}; m.run_command()'
    result = run('env', '-C', tmp_path, sys.executable, '-c', code, PYTHONPATH=str(package))
    assert result.returncode == 2 and result.stderr.count('\n') == 1, result.stderr
    assert "error: the Python package 'torch' is not installed" in result.stderr


def test_the_package_knows_what_was_tested(package, tmp_path):
    result = run('env', '-C', tmp_path, sys.executable, '-m', 'sparseocc', 'check-env', PYTHONPATH=str(package))
    assert result.stdout.startswith(f'SparseOcc {__version__}\n') and 'Traceback' not in result.stderr


def test_package_finds_its_configs_and_loads_names_when_they_are_used(package, tmp_path):
    code = """if True:
        import sys, sparseocc
        from sparseocc.__main__ import find_config
        assert 'torch' not in sys.modules
        config = sparseocc.load_config(find_config('configs/toy/semantic.py'))
        assert all(getattr(sparseocc, name) for name in sparseocc.__all__)
        print(sparseocc.__version__, config.task.num_frames, sparseocc.build_model.__name__)
        try:
            sparseocc.nothing
        except AttributeError as error:
            assert 'build_model' in str(error)
    """
    result = run('env', '-C', tmp_path, sys.executable, '-c', code, PYTHONPATH=str(package))
    assert result.stdout.split() == [__version__, '1', 'build_model'], result.stderr


def test_the_evaluator_stands_alone(package, tmp_path):
    """Another project uses it beside folders of its own that are called lib and models."""
    for name in ('lib', 'models'):
        (tmp_path / name).mkdir()
        (tmp_path / name / '__init__.py').write_text('theirs = True')
    code = """if True:
        import sys, lib, sparseocc
        import numpy as np
        evaluator = sparseocc.Evaluator('occ3d', ['ray_iou', 'miou'])
        volume = np.full((200, 200, 16), 17)
        volume[:, :, 2] = 11
        evaluator.update(volume, volume, np.array([[1.0, 0.0, 1.8]]), token='a')
        import models
        assert lib.theirs and models.theirs and 'torch' not in sys.modules and 'mmcv' not in sys.modules
        print(evaluator.compute().totals['RayIoU'])
    """
    result = run('env', '-C', tmp_path, sys.executable, '-c', code, PYTHONPATH=str(package))
    assert result.stdout.split() == ['1.0'], result.stderr


def test_the_evaluators_command_and_what_it_needs(package, tmp_path):
    text = (package / 'sparseocc.egg-info' / 'entry_points.txt').read_text()
    assert 'sparseocc-eval = sparseocc.lib.metrics.command:main' in text
    requires = (package / 'sparseocc.egg-info' / 'requires.txt').read_text().split('[eval]')[1].split('[')[0]
    assert sorted(map(name_of, requires.split())) == ['numba', 'numpy', 'tqdm']
    code = 'from sparseocc.lib.metrics.command import main; main()'
    for words, status, output in (
        ('--help', 0, 'usage: sparseocc-eval'),
        ('origins --tables nowhere', 2, 'error: nowhere'),
    ):
        command = (sys.executable, '-c', code, *words.split())
        result = run('env', '-C', tmp_path, *command, PYTHONPATH=str(package))
        assert result.returncode == status and output in result.stdout + result.stderr


def test_source_distribution_makes_the_same_package(package, tmp_path):
    """A wheel is built from it; nothing that a package needs is left out, nor anything built or tested put in."""
    tree, out = tmp_path / 'tree', tmp_path / 'out'
    kept = ('configs', 'lib', 'loaders', 'models', 'requirements', 'tests', 'tools')
    for name in kept:
        shutil.copytree(
            str(ROOT / name), str(tree / name), ignore=shutil.ignore_patterns('__pycache__', '*.so', 'data')
        )
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(str(path), str(tree / path.name))
    (tree / 'lib' / 'raycast' / 'raycast_cuda.so').write_text('built')
    result = run('env', '-C', tree, sys.executable, 'setup.py', '-q', 'sdist', '-d', out)
    assert result.returncode == 0, result.stderr
    (archive,) = out.iterdir()
    shutil.unpack_archive(str(archive), str(tmp_path / 'unpacked'))
    (unpacked,) = (tmp_path / 'unpacked').iterdir()
    result = run('env', '-C', unpacked, sys.executable, 'setup.py', '-q', 'build_py', '--build-lib', tmp_path / 'site')
    assert result.returncode == 0, result.stderr
    files = [
        {
            path.relative_to(folder).as_posix()
            for path in (folder / 'sparseocc').rglob('*')
            if path.is_file() and '__pycache__' not in path.parts
        }
        for folder in (package, tmp_path / 'site')
    ]
    assert files[0] == files[1]
    for name in ('lib/metrics/command.py', 'lib/raycast/csrc/traversal.h', 'configs/toy/semantic.py', 'train.py'):
        assert f'sparseocc/{name}' in files[1]
    assert not any(name.endswith('.so') or '/tests/' in name for name in files[1])


# ---- Makefile and installer ----


def test_make_without_a_python_says_what_to_install(tmp_path):
    result = run('make', 'install', 'PYTHON=', f'VENV={tmp_path}/venv')
    assert result.returncode != 0
    assert 'apt install python3 python3-venv' in result.stderr
    assert not (tmp_path / 'venv').exists()


def test_make_passes_over_pythons_that_do_not_run(tmp_path):
    """pyenv's shims are on the path for Pythons that are not active; they fail when started."""
    for name, code in (('python3.13', 127), ('python3.14', 127), ('python3.12', 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\nexit {code}\n')
        (tmp_path / name).chmod(0o755)
    path = '{}:{}'.format(tmp_path, os.environ['PATH'])
    result = run('make', '-n', 'install', f'VENV={tmp_path}/venv', PATH=path)
    assert 'python3.12 tools/install.py' in result.stdout, result.stderr


@pytest.mark.parametrize('target', ['install', 'test', 'demo'])
def test_make_installs_before_it_runs_anything(tmp_path, target):
    venv = tmp_path / 'venv'
    result = run('make', '-n', target, f'PYTHON={sys.executable}', f'VENV={venv}', 'MMCV_OPS=1')
    assert result.returncode == 0, result.stderr
    assert f'tools/install.py --venv {venv} --stack current --mmcv-ops' in result.stdout


def test_make_passes_its_variables_on(tmp_path):
    result = run('make', '-n', 'install', f'PYTHON={sys.executable}', f'VENV={tmp_path}', 'UV=1', 'CPU=1')
    assert f'tools/install.py --venv {tmp_path} --stack current --uv --cpu' in result.stdout, result.stderr


@pytest.mark.parametrize(
    'python, folder',
    [((3, 8), 'py38'), ((3, 10), 'torch2.11'), ((3, 11), 'torch2.14'), ((3, 13), 'torch2.14'), ((3, 14), 'torch2.14')],
)
def test_the_newest_stack_that_fits_the_python(python, folder):
    assert install.choose_stack('current', python).folder == folder


@pytest.mark.parametrize('stack, python, named', [('current', (3, 9), '3.8 or 3.10'), ('torch2.11', (3, 14), '3.12')])
def test_no_stack_fits_the_python(stack, python, named):
    with pytest.raises(install.InstallError, match=named):
        install.choose_stack(stack, python)


@pytest.fixture
def commands(monkeypatch):
    """The commands that the installer would run; nothing is run."""
    called = []
    monkeypatch.setattr(install.subprocess, 'call', lambda command, **_: called.append([str(p) for p in command]) or 0)
    monkeypatch.setattr(install, '_runs', lambda python, code, quiet=True: code == install.IMPORT_CHECK)
    monkeypatch.setattr(install.shutil, 'which', lambda name: '/opt/uv')
    return called


@pytest.mark.parametrize('uv, start', [(False, ['py', '-m', 'pip']), (True, ['/opt/uv', 'pip', 'install'])])
def test_pip_and_uv_install_the_same_files(commands, uv, start):
    install.Installer('py', install.STACKS['torch2.14'], uv).install(cpu=False, mmcv_ops=False)
    assert [command[: len(start)] for command in commands] == [start] * 4
    assert commands[-1][-2:] == ['-e', '.']
    files = [[part for part in command if part.endswith('.txt')] for command in commands]
    names = [['build.txt'], ['torch.txt', 'base.txt', 'test.txt', 'lock.txt'], ['mmcv.txt', 'openmmlab.txt'], []]
    assert files == [['requirements/torch2.14/' + name for name in step] for step in names]


def test_torch_without_cuda_comes_first_and_from_its_own_index(commands):
    install.Installer('py', install.STACKS['torch2.14']).install(cpu=True, mmcv_ops=False)
    assert commands[1][-4:-2] == [line + '+cpu' for line in lines_of(ROOT / 'requirements/torch2.14/torch.txt')]
    assert commands[1][-2:] == ['--extra-index-url', install.TORCH_CPU_INDEX]


def test_setup_files_that_read_exec_from_locals_run(tmp_path):
    """What the setup.py of mmcv 1.x does; Python 3.13 changed what locals() holds."""
    (tmp_path / 'setup.py').write_text(
        'def version():\n    exec(compile("a = 1", "f", "exec"))\n    return locals()["a"]\nprint(version())\n'
    )
    result = run(sys.executable, tmp_path / 'setup.py', PYTHONPATH=install.SETUP_SHIM)
    assert result.stdout == '1\n', result.stderr


def test_install_refuses_a_python_that_the_stack_was_not_tested_with(tmp_path):
    result = run(sys.executable, 'tools/install.py', '--venv', tmp_path / 'venv', '--stack', OTHER_STACK)
    assert result.returncode == 1
    assert OTHER_STACK in result.stderr and 'Traceback' not in result.stderr


def test_install_does_not_touch_a_folder_that_is_no_environment(tmp_path):
    (tmp_path / 'results.txt').write_text('keep')
    result = run(sys.executable, 'tools/install.py', '--venv', tmp_path)
    assert result.returncode == 1 and 'not a virtual environment' in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ['results.txt']


def test_failed_download_is_plain_and_not_taken_as_installed(tmp_path):
    pytest.importorskip('ensurepip')
    venv = tmp_path / 'venv'
    run(sys.executable, '-m', 'venv', '--without-pip', venv)  # what an early stop leaves behind
    result = run(
        'make',
        'install',
        f'PYTHON={sys.executable}',
        f'VENV={venv}',
        PIP_NO_INDEX='1',
        PIP_FIND_LINKS=str(tmp_path),
        PIP_CONFIG_FILE=os.devnull,
    )
    assert result.returncode != 0
    assert 'error: could not install build tools' in result.stderr, result.stderr
    assert not list(venv.glob('.installed*'))


def test_badges_name_what_was_tested():
    pythons = sorted({version for stack in install.STACKS.values() for version in stack.pythons})
    torch = [dict(check_env.pins_of(stack.path(stack.torch)))['torch'] for stack in install.STACKS.values()]
    releases = [version.split('.')[:2] for version in torch]
    oldest, newest = (find(releases, key=lambda release: tuple(map(int, release))) for find in (min, max))
    assert '{}.{} | '.format(*pythons[0]) in badge('python') and ' - {}.{}<'.format(*pythons[-1]) in badge('python')
    assert f'>{".".join(oldest)} - {".".join(newest)}<' in badge('pytorch')


def badge(name):
    return (ROOT / 'docs' / 'images' / f'{name}.svg').read_text()
