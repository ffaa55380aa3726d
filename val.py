"""Score a checkpoint: RayIoU, for panoptic models RayPQ, and mIoU.

    python val.py --config configs/r50_nuimg_704x256_8f.py --weights outputs/RUN/latest.pth
    torchrun --nproc_per_node 8 val.py --config C --weights W
    python val.py --config C --weights W --max-samples 100 --save-predictions predictions/

Prints a table and writes the same figures to <weights>.eval.json (or --out). The figures are equal to the
bit whatever the number of processes. Saved predictions are DIR/<sample-token>.npz; tools/evaluate.py scores
them again.
"""

import argparse
import sys

from lib.cli import run_main


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--config', required=True)
    add('--weights', required=True, help='checkpoint of the model that the config builds')
    add('--override', nargs='+', default=[], metavar='KEY=VALUE', help='change values of the config')
    add('--split', default='val', choices=('train', 'val', 'test'), help='section of data (default: val)')
    add('--metrics', nargs='+', choices=('ray_iou', 'ray_pq', 'miou'), help='default: evaluation.metrics')
    add('--max-samples', type=int, help='at most so many samples (the first)')
    add('--save-predictions', metavar='DIR', help='write every prediction into this folder')
    add('--out', metavar='JSON', help='where the figures go (default: beside the checkpoint)')
    add('--amp', choices=('fp16', 'bf16'), help='mixed precision (default: float32)')
    add('--tf32', choices=('on', 'off'), help='TF32 in convolutions and matrix products (default: in convolutions)')
    add('--device', choices=('cpu', 'cuda'), help='default: cuda if there is one')
    add('--workers', type=int, help='data-loading processes (default: data.workers_per_gpu)')
    add('--no-preflight', action='store_true', help='do not look for missing data files first')
    add('--trust-weights', action='store_true', help='let the checkpoint run code; for known sources only')
    add('--debug', action='store_true', help='show the traceback of an error')
    return parser.parse_args(argv)


def components():
    """SparseOcc's parts for an evaluation."""
    from lib.metrics import OccEvaluator
    from lib.run.components import Components
    from loaders import build_dataset, collate
    from loaders.preflight import preflight
    from models import build_model

    return Components(build_model, build_dataset, collate, OccEvaluator, preflight)


def main():
    args = parse_args()
    from lib.run.arguments import check_files

    check_files(args.config, None, args.weights)
    from lib.run.val_script import run_validation

    sys.exit(run_validation(args, components))


if __name__ == '__main__':
    run_main(main)
