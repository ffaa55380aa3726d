"""What all scripts share on the command line."""

import subprocess
import sys

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
