"""Train SparseOcc.

    python train.py --config configs/r50_nuimg_704x256_8f.py
    torchrun --nproc_per_node 8 train.py --config configs/r50_nuimg_704x256_8f_v1.1.py
    python train.py --config C --resume auto             # go on where the last run of this config stopped
    python train.py --config C --override optimizer.lr=1e-4 total_batch_size=4 --amp bf16
    python train.py --config C --accumulate 8            # total batch 8 in passes of one sample

Everything goes to a new folder outputs/<config>/<date_time>: config.py, environment.txt, log.txt,
metrics.jsonl, tensorboard/, checkpoints (latest.pth points at the newest) and scores. No folder is ever
overwritten. SIGTERM and Ctrl-C save a checkpoint and leave. docs/faults.md
lists what happens when something goes wrong.
"""

import sys

from lib.cli import check_files, make_parser, run_main, whole_number
from tools.components import components


def parse_args(argv=None):
    parser = make_parser(__doc__, 'config', 'override', 'amp', 'tf32', 'device', 'no-preflight', 'trust-weights')
    add = parser.add_argument
    add('--work-dir', help='run folder (default: outputs/<config>/<date_time>; -1, -2, ... if it exists)')
    add(
        '--resume',
        metavar='auto|PATH',
        help='go on from the newest checkpoint of the last run or --work-dir (auto), of a folder, or a file',
    )
    add('--load-from', metavar='PATH', help='start from these weights instead of load_from of the config')
    add('--seed', type=whole_number(0), help='default: seed of the config')
    add('--accumulate', metavar='auto|N', help='forward passes per optimizer step')
    add('--max-epochs', type=whole_number(1), help='default: runner.max_epochs')
    add('--max-iters', type=whole_number(1), help='stop after so many optimizer steps in all')
    add('--no-eval', action='store_true', help='do not evaluate')
    return parser.parse_args(argv)


def main():
    args = parse_args()
    check_files(args.config, args.resume, args.load_from)
    from lib.run.train_script import run_training

    sys.exit(run_training(args, components))


if __name__ == '__main__':
    run_main(main)
