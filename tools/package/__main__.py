"""The console commands: each runs a script of the repository.

    sparseocc-train --config configs/r50_nuimg_704x256_8f_v1.1.py       # or: python -m sparseocc train --config ...
    torchrun --nproc_per_node 8 -m sparseocc train --config configs/r50_nuimg_704x256_8f_v1.1.py

``sparseocc-eval`` is a command of its own (lib/metrics/command.py), which needs no config; ``python -m sparseocc eval``
is tools/evaluate.py, which takes samples and labels from one. A config that is not found from the folder at hand is
looked for in the package.
"""

import os
import runpy
import sys

from . import ROOT
from .lib.cli import run_main

SCRIPTS = {
    'train': 'train.py',
    'val': 'val.py',
    'timing': 'timing.py',
    'infer': 'tools/infer.py',
    'eval': 'tools/evaluate.py',
    'check-data': 'tools/check_data.py',
    'check-env': 'tools/check_env.py',
    'toy': 'tools/make_toy_nuscenes.py',
    'sweep-info': 'gen_sweep_info.py',
    'instance-info': 'gen_instance_info.py',
    'visualize': 'tools/visualize.py',
}


def main() -> None:
    """``python -m sparseocc COMMAND ...``"""
    if len(sys.argv) < 2 or sys.argv[1] not in SCRIPTS:
        print(f'usage: python -m sparseocc {{{",".join(SCRIPTS)}}} ...', file=sys.stderr)
        sys.exit(2)
    run(sys.argv[1], sys.argv[2:])


def run_command() -> None:
    """``sparseocc-COMMAND ...``: the command is part of the program's name."""
    run(os.path.basename(sys.argv[0]).split('-', 1)[1], sys.argv[1:])


def run(command, arguments) -> None:
    script = str(ROOT / SCRIPTS[command])
    sys.path.insert(0, str(ROOT))
    sys.argv = [script] + [find_config(text) for text in arguments]
    run_main(lambda: runpy.run_path(script, run_name='__main__'))


def find_config(text: str) -> str:
    """``configs/...`` of the package where there is no such file here; any other argument as it is."""
    inside = ROOT / text
    is_config = text.startswith('configs/') and not os.path.exists(text) and inside.is_file()
    return str(inside) if is_config else text


if __name__ == '__main__':
    main()
