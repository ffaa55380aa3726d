"""Time inference: latency and frames per second, with and without data loading and the feature cache.

    python timing.py --config configs/r50_nuimg_704x256_8f_v1.1.py --weights W
    python timing.py --config C --weights W --amp fp16 --cuda-graph      # fastest
    python timing.py --config C                               # random weights: speed only

Batch 1, samples in the data set's order. History "cached" keeps the features of earlier frames between
samples, as a car driving along would; "full" encodes all frames of every sample. "With loading" starts the
clock before the sample's files are opened, in this process. Results are on the CPU when the clock stops.
"""

import argparse

from lib.cli import run_main


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--config', required=True)
    add('--weights', help='checkpoint of the model that the config builds (default: random weights)')
    add('--override', nargs='+', default=[], metavar='KEY=VALUE', help='change values of the config')
    add('--split', default='val', choices=('train', 'val', 'test'), help='section of data (default: val)')
    add('--samples', type=int, default=50, help='timed samples (default: 50)')
    add('--warmup', type=int, default=10, help='samples before the clock runs (default: 10)')
    add('--history', default='both', choices=('cached', 'full', 'both'), help='default: both')
    add('--amp', choices=('fp16', 'bf16'), help='mixed precision (default: float32)')
    add('--tf32', choices=('on', 'off'), help='TF32 in convolutions and matrix products (default: in convolutions)')
    add(
        '--cuda-graph',
        action='store_true',
        help='on a GPU: replay encoder and head as CUDA graphs (model.test_cfg.cuda_graph); the same results',
    )
    add('--device', choices=('cpu', 'cuda'), help='default: cuda if there is one')
    add('--out', metavar='JSON', help='write the figures to this file as well')
    add('--trust-weights', action='store_true', help='let the checkpoint run code; for known sources only')
    add('--debug', action='store_true', help='show the traceback of an error')
    return parser.parse_args(argv)


def components():
    """SparseOcc's parts for timing."""
    from lib.metrics import OccEvaluator
    from lib.run.components import Components
    from loaders import build_dataset, collate
    from models import build_model

    return Components(build_model, build_dataset, collate, OccEvaluator)


def main():
    args = parse_args()
    from lib.run.arguments import check_files

    check_files(args.config, None, args.weights)
    from lib.run.timing_script import run_timing

    run_timing(args, components)


if __name__ == '__main__':
    run_main(main)
