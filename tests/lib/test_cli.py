"""What all scripts share on the command line."""

import subprocess
import sys

import pytest

from lib.cli import run_main

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
