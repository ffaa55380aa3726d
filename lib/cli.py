"""What the command-line scripts share: their arguments, early checks of files, errors in one sentence.

Importing this is quick: ``--help`` and a wrong file name are answered before anything heavy is loaded.
"""

import argparse
import math
import multiprocessing
import os
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Optional

from .config import check_config_file
from .errors import CheckpointError, UserError, missing_package

_ROOT = Path(__file__).resolve().parents[1]
_PRECISION = 'TF32 in convolutions and matrix products (default: in convolutions; in training train.tf32 of the config)'

_MOST = 2**31 - 1


def whole_number(least: int) -> Callable[[str], int]:
    """Type of an argument: a whole number of at least ``least``."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= _MOST:
            raise argparse.ArgumentTypeError(f'must be a whole number of at least {least}, got {text[:40]!r}')
        return value

    return read


def real_number(least: float = -math.inf, above: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """Type of an argument: a finite number of at least ``least``, more than ``above`` and at most ``most``."""
    limit = f' of at least {least:g}' if least > -math.inf else f' above {above:g}' if above > -math.inf else ''
    limit += f' and at most {most:g}' if most < math.inf else ''

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and least <= value <= most and value > above):
            raise argparse.ArgumentTypeError(f'must be a finite number{limit}, got {text[:40]!r}')
        return value

    return read


SHARED_ARGUMENTS: Dict[str, Dict[str, Any]] = {
    'config': dict(required=True, help='config file, e.g. one of configs/'),
    'override': dict(nargs='+', default=[], metavar='KEY=VALUE', help='change values of the config'),
    'split': dict(default='val', choices=('train', 'val', 'test'), help='section of data (default: val)'),
    'max-samples': dict(type=whole_number(1), help='at most so many samples (the first)'),
    'amp': dict(
        choices=('fp16', 'bf16'), help='mixed precision (default: float32; in training train.amp of the config)'
    ),
    'tf32': dict(choices=('on', 'off'), help=_PRECISION),
    'device': dict(choices=('cpu', 'cuda'), help='default: cuda if there is one'),
    'workers': dict(type=whole_number(0), help='data-loading processes (default: data.workers_per_gpu)'),
    'no-preflight': dict(action='store_true', help='do not look for missing data files first'),
    'trust-weights': dict(action='store_true', help='let checkpoint files run code; for known sources only'),
    'debug': dict(action='store_true', help='show the traceback of an error'),
}


def make_parser(description: str, *shared: str) -> argparse.ArgumentParser:
    """Parser of a script, with the named ones of ``SHARED_ARGUMENTS`` and ``--debug``.

    Args:
        description: the script's docstring, printed as it is.
        shared: names without their dashes.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in (*shared, 'debug'):
        parser.add_argument(f'--{name}', **SHARED_ARGUMENTS[name])
    return parser


def check_files(config: str, resume: Optional[str] = None, *weights: Optional[str]) -> None:
    """Raise the sentence for the first of the files named on the command line that is not there.

    Args:
        config: config file.
        resume: 'auto', or a checkpoint file or run folder, or None.
        weights: checkpoint files, or None.
    """
    check_config_file(config)
    if resume and resume != 'auto' and not os.path.exists(resume):
        raise CheckpointError(f'checkpoint {resume} (--resume) does not exist; give a .pth file, a folder or auto')
    for path in filter(None, weights):
        from .checkpoint import check_checkpoint_file

        check_checkpoint_file(path)


def run_main(main: Callable[[], object]) -> None:
    """Run a script's ``main``; print a :class:`UserError`, or what package is missing, as one line and exit 2.

    With ``--debug`` on the command line or ``SPARSEOCC_DEBUG=1`` the traceback is shown instead. Where the reader of
    the output goes away, the script ends in silence with the shell's status for it, 141.
    """
    debug = '--debug' in sys.argv or os.environ.get('SPARSEOCC_DEBUG', '') not in ('', '0')
    try:
        main()
    except (UserError, ModuleNotFoundError) as error:
        if debug or _is_missing_here(error):
            raise
        sentence = missing_package(error) if isinstance(error, ModuleNotFoundError) else error
        print(f'error: {sentence}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('stopped by the user', file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # what reads the output has enough, as "| head" has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        sys.exit(141)


def end_with_parent() -> None:
    """In a process of a pool: end when the one that started it is killed.

    It would wait for tasks for ever otherwise, because it holds both ends of the pipe that they come through.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(process) -> None:
    process.join()
    os._exit(1)


def _is_missing_here(error: Exception) -> bool:
    """The error is about a module of this project, or of unknown name: no package that one could install."""
    if not isinstance(error, ModuleNotFoundError):
        return False
    top = (error.name or 'sparseocc').split('.')[0]
    return top == 'sparseocc' or (_ROOT / top).exists() or (_ROOT / f'{top}.py').exists()
