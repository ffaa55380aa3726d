"""The README, docs/ and other pages: every command parses, names what exists, and is run by a test or says why not;
options and configs load; links hold."""

import functools
import json
import os
import re
import runpy
import shlex
from pathlib import Path

import pytest

import tools.package
from lib.config import load_config
from lib.metrics.command import command as evaluate
from lib.metrics.command import parse as parse_evaluator
from tools.package.__main__ import SCRIPTS as COMMANDS_OF_PACKAGE

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').rglob('*.md'), ROOT / 'weights' / 'README.md'])
PROGRAMS = (
    'python',
    'torchrun',
    'srun',
    'make',
    'nox',
    'pip',
    'docker',
    'cd',
    'apt',
    'uv',
    'sparseocc-',
    'toybench.sh',
)
PROGRAMS += ('tensorboard', 'pre-commit', 'nvidia-smi')
BASE = 'configs/r50_nuimg_704x256_8f_v1.1.py'  # of options and configs in the text
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
    'tools/benchmark.py': 'tests/tools/test_benchmark.py',
    'tools/benchmark_growth.py': 'tests/tools/test_benchmark.py',
    'tools/benchmark_table.py': 'tests/tools/test_benchmark.py',
    'tools/bench_evaluation.py': 'tests/tools/test_bench_evaluation.py',
    'tools/watch_folder.py': 'tests/tools/test_api.py',
    'tools/visualize.py': 'tests/tools/test_visualize_infer.py',
    'tools/plot_run.py': 'tests/tools/test_plot_run.py',
    '-m tools.toy.label_table': 'tests/tools/test_toybench.py',
    'srun': 'tests/run/test_slurm.py',
    'sparseocc-eval': 'tests/metrics/test_command.py',
    'sparseocc-': 'tests/test_env.py',
    '-m sparseocc': 'tests/test_env.py',
    'python - <<END': 'tests/test_docs.py',
}
NOT_RUN = {
    'make install': 'downloads gigabytes; tests/test_env.py has what it would run, and how it fails',
    'make PYTHON=': 'is make install',
    'make test': 'runs the tests themselves',
    'make lint': 'needs packages from the index; CI runs it',
    'make demo': 'minutes; its steps are scripts, which are tested, and its own part is by tests/tools/test_demo.py',
    'make fuzz': 'minutes; a few hundred of its cases are tests',
    'make chaos': 'minutes; tests/run/test_chaos.py kills less often',
    'tools/toybench.sh': 'hours on several GPUs; its commands are tested one by one',
    'tools/ship_weights.py': 'takes a finished run of the toy benchmark',
    'make build-ops': 'compiles for a GPU',
    'setup.py build_ext': 'compiles for a GPU',
    'make accel': 'compiles, and changes the environment',
    'make check-env': 'runs tools/check_env.py, which is tested',
    'make docs': 'needs packages from the index; CI runs it',
    'make lock': 'needs uv and the index',
    'make clean': 'removes files',
    'nox': 'installs an environment per stack',
    'pip install': 'changes the environment',
    'pip uninstall': 'changes the environment',
    'apt install': 'needs an administrator',
    'tensorboard': "somebody else's program",
    'pre-commit': "somebody else's program, which runs what make lint runs",
    'docker': 'needs a container engine',
    'tools/measure_code.py': 'about the code, not of use to anybody who runs it',
    'tools/benchmark_operators.py': 'minutes on a GPU',
    'tests/parity_table.py': 'minutes; tests/test_parity.py compares the same figures',
    '-m pytest': 'runs the tests themselves',
}


def commands():
    """(page, command) of every code block and of code in the text, continued lines joined."""
    return [(page, line) for page, line in lines_of_code() if split(line) and program(split(line)[0])]


def lines_of_code():
    """(page, line) of every code block, and of code in the text that can be pasted as it is."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding='utf-8')
        lines = [line for block in code_blocks(text) for line in block.replace('\\\n', ' ').splitlines()]
        for line in lines + list(filter(is_whole, code_in_text(text))):
            found.append((str(page.relative_to(ROOT)), ' '.join(line.split())))
    return found


def code_in_text(text):
    """Code outside of blocks, each piece on one line."""
    plain = re.sub(r'^```.*?^```$', '', text, flags=re.M | re.S)
    return [' '.join(code.split()) for code in re.findall(r'`([^`]+)`', plain)]


def is_whole(code):
    """More than a name, and not one with an option or two that are talked about."""
    words = split(code)
    return len(words) > 1 and not words[0].startswith(('sparseocc-', 'torchrun')) and '...' not in words


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


def configs_in_pages():
    """(page, text) of the Python blocks that are configs and name nothing of one's own."""
    blocks = [
        (str(page.relative_to(ROOT)), block)
        for page in PAGES
        for block in re.findall(r'^```python\n(.*?)^```$', page.read_text(encoding='utf-8'), re.M | re.S)
    ]
    return [(page, block) for page, block in blocks if '_base_ = ' in block and 'custom_imports' not in block]


COMMANDS = commands()
OPTIONS = sorted({(page, line) for page, line in lines_of_code() if line.startswith('--override ')})
CONFIGS = configs_in_pages()
SCRIPTS = [(page, line) for page, line in COMMANDS if script_and_arguments(split(line))[0]]


def test_there_are_commands():
    assert len(COMMANDS) > 150 and len(SCRIPTS) > 60 and len(OPTIONS) > 12 and len(CONFIGS) > 3
    assert {'README.md', 'docs/training.md', 'docs/benchmark.md', 'docs/common_changes.md'} < {p for p, _ in COMMANDS}


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


@pytest.mark.parametrize('page, line', OPTIONS)
def test_options_are_ones_that_the_config_has(page, line):
    load_checked(str(ROOT / BASE), tuple(split(line)[1:]))


@pytest.mark.parametrize('page, text', CONFIGS, ids=lambda value: value if value.endswith('.md') else '')
def test_configs_load(page, text, tmp_path):
    (tmp_path / 'mine.py').write_text(text.replace("_base_ = './", f"_base_ = '{ROOT.as_posix()}/configs/"))
    assert load_config(str(tmp_path / 'mine.py')).task.num_frames


def test_the_evaluator_is_tried_without_data(tmp_path, monkeypatch):
    """The paste of docs/evaluate_your_model.md, but for the installation."""
    page = (ROOT / 'docs' / 'evaluate_your_model.md').read_text(encoding='utf-8')
    (paste,) = [block for block in code_blocks(page) if "python - <<'END'" in block]
    program_text, lines = re.search(r"^python - <<'END'\n(.*)^END\n(.*)", paste, re.M | re.S).groups()
    monkeypatch.chdir(tmp_path)
    exec(compile(program_text, 'docs/evaluate_your_model.md', 'exec'), {})
    for line in lines.splitlines():
        evaluate([*split(line)[1:], *([] if 'compare' in line else ['--workers', '1'])])
    further, empty = (json.loads((tmp_path / 'toy' / f'{name}.json').read_text()) for name in ('further', 'empty'))
    assert further['num_samples'] == empty['num_samples'] == 6 and further['RayIoU'] > empty['RayIoU'] > 0.5
    assert '<svg' in (tmp_path / 'toy' / 'comparison.html').read_text(encoding='utf-8')


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
