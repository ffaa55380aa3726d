"""The README and docs/: every command parses, names what exists, and is run by a test or says why not; links hold."""

import functools
import os
import re
import runpy
import shlex
from pathlib import Path

import pytest

import tools.package
from lib.config import load_config
from lib.metrics.command import parse as parse_evaluator
from tools.package.__main__ import SCRIPTS as COMMANDS_OF_PACKAGE

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / 'README.md'] + list((ROOT / 'docs').rglob('*.md')))
PROGRAMS = ('python', 'torchrun', 'make', 'nox', 'pip', 'docker', 'cd', 'apt', 'uv', 'nvidia-smi', 'sparseocc-')
PLACEHOLDERS = {'C', 'W', 'DIR', 'FILE'}

# what a documented command starts: where it is run, or why it is not
RUN_BY = {
    'train.py': 'tests/run/test_end_to_end.py',
    'val.py': 'tests/run/test_end_to_end.py',
    'timing.py': 'tests/run/test_end_to_end.py',
    'gen_sweep_info.py': 'tests/conftest.py',
    'gen_instance_info.py': 'tests/conftest.py',
    'tools/make_toy_nuscenes.py': 'tests/conftest.py',
    'tools/check_data.py': 'tests/loaders/test_preflight.py',
    'tools/check_env.py': 'tests/test_env.py',
    'tools/baseline.py': 'tests/tools/test_toybench.py',
    'tools/upper_bounds.py': 'tests/tools/test_toybench.py',
    'tools/study.py': 'tests/tools/test_study.py',
    'tools/evaluate.py': 'tests/tools/test_evaluate.py',
    'tools/infer.py': 'tests/tools/test_visualize_infer.py',
    'tools/export.py': 'tests/models/test_export.py',
    'tools/benchmark.py': 'tests/models/test_architecture.py',
    'tools/benchmark_table.py': 'tests/tools/test_benchmark.py',
    'tools/watch_folder.py': 'tests/tools/test_api.py',
    'tools/visualize.py': 'tests/tools/test_visualize_infer.py',
    'make install': 'tests/test_env.py',
    'sparseocc-': 'tests/test_env.py',
    '-m sparseocc': 'tests/test_env.py',
    'make test': 'tests/test_env.py',
    'make demo': 'tests/test_env.py',
}
NOT_RUN = {
    'make build-ops': 'compiles for a GPU',
    'setup.py build_ext': 'compiles for a GPU',
    'make accel': 'compiles, and changes the environment',
    'make check-env': 'runs tools/check_env.py, which is tested',
    'make docs': 'needs packages from the index; CI runs it',
    'make lock': 'needs uv and the index',
    'make clean': 'removes files',
    'nox': 'installs an environment per stack',
    'pip install': 'changes the environment',
    'apt install': 'needs an administrator',
    'docker': 'needs a container engine',
    'tools/measure_code.py': 'about the code, not of use to anybody who runs it',
    'tools/benchmark_operators.py': 'minutes on a GPU',
    'tests/parity_table.py': 'minutes; tests/test_parity.py compares the same figures',
    '-m pytest': 'runs the tests themselves',
}


def commands():
    """(page, command) of every code block, continued lines joined."""
    found = []
    for page in PAGES:
        for block in code_blocks(page.read_text(encoding='utf-8')):
            for line in block.replace('\\\n', ' ').splitlines():
                words = split(line)
                if words and program(words[0]):
                    found.append((str(page.relative_to(ROOT)), ' '.join(line.split())))
    return found


def code_blocks(text):
    """Texts of the blocks of commands: fenced ones without a language or of a shell's, and indented ones."""
    blocks = re.findall(r'^```(\w*)\n(.*?)^```$', text, re.M | re.S)
    plain = re.sub(r'^```.*?^```$', '', text, flags=re.M | re.S)
    return [block for language, block in blocks if language in ('', 'sh', 'bash')] + re.findall(
        r'(?:^ {4}\S.*\n)+', plain, re.M
    )


def split(line):
    """Words of a command, without its comment and leading assignments."""
    try:
        words = shlex.split(line.strip(), comments=True)
    except ValueError:  # no command
        return []
    while words and re.match(r'[A-Z_]+=', words[0]):
        words = words[1:]
    return words


def program(word):
    name = os.path.basename(word)
    return any(name == known or (known.endswith('-') and name.startswith(known)) for known in PROGRAMS)


def script_and_arguments(words):
    """The Python script that a command starts, and its arguments; (None, []) for other commands."""
    if words[0].startswith('sparseocc-') and words[0] != 'sparseocc-eval':
        return COMMANDS_OF_PACKAGE[words[0].split('-', 1)[1]], words[1:]
    for index, word in enumerate(words):
        if word == '-m':
            break
        if word.endswith('.py') and not words[index - 1].startswith('--'):
            return word, words[index + 1 :]
    return None, []


COMMANDS = commands()
SCRIPTS = [(page, line) for page, line in COMMANDS if script_and_arguments(split(line))[0]]


def test_there_are_commands():
    assert len(COMMANDS) > 50 and len(SCRIPTS) > 30


@pytest.mark.parametrize('page, line', COMMANDS)
def test_command_is_run_by_a_test_or_says_why_not(page, line):
    plain = ' '.join(split(line))
    assert any(part in plain for part in list(RUN_BY) + list(NOT_RUN)), f'{page}: name it in RUN_BY or NOT_RUN'


@pytest.mark.parametrize('what, where', RUN_BY.items())
def test_it_is_run_there(what, where):
    text = (ROOT / where).read_text()
    assert (what.split()[-1] if what.startswith(('make', '-m')) else Path(what).stem) in text


@pytest.mark.parametrize('page, line', SCRIPTS)
def test_script_takes_these_arguments(page, line, monkeypatch, capsys):
    words = split(line)
    script, arguments = script_and_arguments(words)
    folder = ROOT / (words[1] if words[0] == 'cd' else '')
    assert (folder / script).is_file(), f'{page}: there is no {script}'
    parse = parser_of(folder / script)
    if parse is None:
        assert not [word for word in arguments if word.startswith('--')] or script == 'setup.py'
        return
    monkeypatch.setattr('sys.argv', [script] + arguments)
    try:
        args = parse()
    except SystemExit:
        pytest.fail(f'{page}: {line}\n{capsys.readouterr().err}')
    check_config(args)


@pytest.mark.parametrize('page, line', [(page, line) for page, line in COMMANDS if split(line)[0] == 'sparseocc-eval'])
def test_the_evaluator_takes_these_arguments(page, line, capsys):
    try:
        parse_evaluator(split(line)[1:])
    except SystemExit:
        pytest.fail(f'{page}: {line}\n{capsys.readouterr().err}')


@functools.lru_cache(maxsize=None)
def parser_of(script):
    return runpy.run_path(str(script)).get('parse_args')


def check_config(args):
    """The config that the command names exists and has the sections that it changes."""
    config = getattr(args, 'config', None)
    if config and config not in PLACEHOLDERS:
        load_checked(str(ROOT / config), tuple(getattr(args, 'override', None) or ()))


@functools.lru_cache(maxsize=None)
def load_checked(path, overrides):
    return load_config(path, overrides)


@pytest.mark.parametrize('page, line', [(page, line) for page, line in COMMANDS if split(line)[0] == 'make'])
def test_make_knows_the_target(page, line):
    makefile = (ROOT / 'Makefile').read_text()
    for word in split(line)[1:]:
        name = word.split('=')[0]
        known = f'\n{name} ?= ' in makefile if '=' in word else f'\n{name}:' in makefile
        assert known, f'{page}: the Makefile has no {name}'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_and_files_in_code_exist(page):
    text = re.sub(r'^```.*?^```$', '', page.read_text(encoding='utf-8'), flags=re.M | re.S)
    for target in re.findall(r'\]\(([^)#\s]+)[^)]*\)', text):
        assert '://' in target or (page.parent / target).exists(), f'{page.name} links to {target}'
    for name in re.findall(r'`((?:configs|docs|lib|loaders|models|requirements|tests|tools)/[\w/.-]+)`', text):
        assert (ROOT / name).exists(), f'{page.name} names {name}'


def test_the_reference_lists_the_public_names():
    text = (ROOT / 'docs/reference/index.md').read_text()
    assert all(f'`{name}' in text for name in [*tools.package._HOMES, *tools.package._EVALUATOR])
