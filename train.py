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

import argparse
import sys

from lib.cli import run_main


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--config', required=True)
    add('--override', nargs='+', default=[], metavar='KEY=VALUE', help='change values of the config')
    add('--work-dir', help='run folder (default: outputs/<config>/<date_time>; -1, -2, ... if it exists)')
    add(
        '--resume',
        metavar='auto|PATH',
        help='go on from the newest checkpoint of the last run or --work-dir (auto), of a folder, or a file',
    )
    add('--load-from', metavar='PATH', help='start from these weights instead of load_from of the config')
    add('--amp', choices=('fp16', 'bf16'), help='mixed precision (default: train.amp of the config, float32)')
    add('--tf32', choices=('on', 'off'), help='default: train.tf32 of the config')
    add('--seed', type=int, help='default: seed of the config')
    add('--accumulate', metavar='auto|N', help='forward passes per optimizer step')
    add('--max-epochs', type=int, help='default: runner.max_epochs')
    add('--max-iters', type=int, help='stop after so many optimizer steps in all')
    add('--device', choices=('cpu', 'cuda'), help='default: cuda if there is one')
    add('--no-eval', action='store_true', help='do not evaluate')
    add('--no-preflight', action='store_true', help='do not look for missing data files before training')
    add('--trust-weights', action='store_true', help='let checkpoint files run code; for known sources only')
    add('--debug', action='store_true', help='show the traceback of an error')
    return parser.parse_args(argv)


def components():
    """SparseOcc's parts for the training run."""
    from lib.metrics import OccEvaluator
    from lib.run.components import Components
    from loaders import build_dataset, collate
    from loaders.preflight import preflight
    from models import build_model

    return Components(build_model, build_dataset, collate, OccEvaluator, preflight)


def main():
    args = parse_args()
    from lib.run.arguments import check_files

    check_files(args.config, args.resume, args.load_from)
    from lib.run.train_script import run_training

    sys.exit(run_training(args, components))


if __name__ == '__main__':
    run_main(main)
