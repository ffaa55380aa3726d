"""Score a checkpoint: RayIoU, for panoptic models RayPQ, and mIoU.

    python val.py --config configs/r50_nuimg_704x256_8f.py --weights outputs/RUN/latest.pth
    torchrun --nproc_per_node 8 val.py --config C --weights W
    python val.py --config C --weights W --max-samples 100 --save-predictions predictions/

Prints a table and writes the same figures to <weights>.eval.json (or --out). The figures are equal to the
bit whatever the number of processes. Saved predictions are DIR/<sample-token>.npz; tools/evaluate.py scores
them again.
"""

import sys

from lib.cli import check_files, make_parser, run_main, whole_number
from tools.components import components

SHARED = ('config', 'override', 'split', 'max-samples', 'amp', 'tf32', 'device', 'workers')


def parse_args(argv=None):
    parser = make_parser(__doc__, *SHARED, 'no-preflight', 'trust-weights')
    add = parser.add_argument
    add('--weights', required=True, help='checkpoint of the model that the config builds')
    add('--metrics', nargs='+', choices=('ray_iou', 'ray_pq', 'miou'), help='default: evaluation.metrics')
    add('--save-predictions', metavar='DIR', help='write every prediction into this folder')
    add(
        '--seed',
        type=whole_number(0),
        help="of what is drawn where model.test_cfg.draws is 'random' (default: PyTorch's own)",
    )
    add('--out', metavar='JSON', help='where the figures go (default: beside the checkpoint)')
    return parser.parse_args(argv)


def main():
    args = parse_args()
    check_files(args.config, None, args.weights)
    from lib.run.evaluation import run_validation

    sys.exit(run_validation(args, components))


if __name__ == '__main__':
    run_main(main)
