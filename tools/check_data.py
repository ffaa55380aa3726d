#!/usr/bin/env python
"""Look at a config's data before long work: counts, missing or damaged files, labels, calibration.

    python tools/check_data.py --config configs/r50_nuimg_704x256_8f.py
    python tools/check_data.py --config configs/r50_nuimg_704x256_8f.py --splits train val --full

The quick look reads small data sets whole and spot-checks large ones in seconds; train.py and val.py take
it too. --full looks at every file on all cores; --decode decodes every image as well.
Ends with status 2 if something is missing or damaged.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from lib.cli import make_parser, run_main, whole_number  # noqa: E402
from lib.errors import DataError, UserError  # noqa: E402


def parse_args():
    parser = make_parser(__doc__, 'config', 'override')
    parser.add_argument(
        '--splits',
        nargs='+',
        choices=('train', 'val', 'test'),
        default=['train', 'val'],
        help='data sets to look at (default: train val)',
    )
    parser.add_argument('--full', action='store_true', help='look at every file')
    parser.add_argument('--decode', action='store_true', help='decode the images looked at')
    parser.add_argument('--processes', type=whole_number(1), help='worker processes (default: all cores)')
    parser.add_argument(
        '--shown', type=whole_number(1), default=1000, help='most files named per kind (default: %(default)s)'
    )
    return parser.parse_args()


def check_split(cfg, split, task, args) -> int:
    """Print the findings on one data set; number of errors."""
    from loaders import build_dataset
    from loaders.checks import ERROR, Finding, Look
    from loaders.preflight import inspect_dataset, needs_mask

    look = Look(args.full, args.decode, args.processes, shown=args.shown, needs_mask=needs_mask(cfg, split))
    try:
        findings = inspect_dataset(build_dataset(cfg.data[split], task), look)
    except UserError as error:
        findings = [Finding(ERROR, str(error))]
    for finding in findings:
        print(f'{split}: {finding.line()}', flush=True)
    return sum(finding.level == ERROR for finding in findings)


def main():
    args = parse_args()
    from lib.config import load_config
    from lib.task import Task

    cfg = load_config(args.config, args.override)
    task = Task.from_config(cfg.task)
    errors = sum(check_split(cfg, split, task, args) for split in args.splits)
    if errors:
        raise DataError(f'{errors} errors, listed above')


if __name__ == '__main__':
    run_main(main)
