"""What all scripts share on the command line."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lib.cli import make_parser, real_number, run_main, whole_number

ROOT = Path(__file__).resolve().parents[2]

TALKS = """
from lib.cli import run_main
run_main(lambda: [print('a line of output', flush=True) for _ in range(100000)])
"""


def test_a_reader_that_goes_away_is_no_fault():
    with subprocess.Popen([sys.executable, '-c', TALKS], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as script:
        assert script.stdout.readline() == b'a line of output\n'
        script.stdout.close()
        assert script.stderr.read() == b''
    assert script.returncode == 141


@pytest.mark.parametrize('module', ['torch_of_tomorrow', 'torch_of_tomorrow.nn'])
def test_a_missing_package_is_told_in_a_sentence(module, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: __import__(module))
    assert stop.value.code == 2
    sentence = 'error: the Python package \'torch_of_tomorrow\' is not installed; run "make install" '
    assert capsys.readouterr().err.startswith(sentence)


def test_a_missing_module_of_the_project_is_a_fault_of_the_project():
    with pytest.raises(ModuleNotFoundError):
        run_main(lambda: __import__('lib.no_such_module'))


SCRIPTS = [
    path
    for path in (*ROOT.glob('*.py'), *(ROOT / 'tools').glob('*.py'), ROOT / 'lib' / 'metrics' / 'command.py')
    if 'add_argument' in path.read_text() and path.name != 'install.py'
]
JUNK = ('-1', '-7', '0', '1.5', '', 'x', 'nan', 'inf', '-inf', '1e400', '9' * 5000, '0x10', '1,5', '7 m', '1/0')


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.stem)
def test_every_number_of_the_command_line_has_its_limits(path):
    """A bare ``int`` or ``float`` takes -1 samples, which cuts a list at its other end, and what is no number."""
    types = re.findall(r'type=(\w+)', path.read_text())
    assert 'int' not in types and 'float' not in types


@pytest.mark.parametrize(
    'read, good',
    [
        (whole_number(0), '0 1 7 2147483647'),
        (whole_number(1), '1 7 2147483647'),
        (real_number(above=0), '0.5 1.5 1 1e9'),
        (real_number(least=0), '0 0.5 1.5 1e9'),
        (real_number(above=0, most=40), '0.5 1 1.5 7'),
        (real_number(), '-7 -1 -40 0 1.5 5.4'),
    ],
)
def test_numbers_within_limits_alone_are_read(read, good):
    assert [read(text) for text in good.split()] == [float(text) for text in good.split()]
    for text in set(JUNK) - set(good.split()):
        with pytest.raises(argparse.ArgumentTypeError, match='must be a (whole|finite) number.*, got .{,50}$'):
            read(text)


@pytest.mark.parametrize('arguments', [['--max-samples', '0'], ['--max-samples', '-2'], ['--workers', '-1']])
def test_a_wrong_number_is_answered_with_its_argument(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        make_parser('A script.', 'max-samples', 'workers').parse_args(arguments)
    assert stop.value.code == 2
    assert f'argument {arguments[0]}: must be a whole number of at least' in capsys.readouterr().err
