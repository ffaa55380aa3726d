"""Time inference: latency and throughput, with and without data loading and the feature cache.

    python timing.py --config configs/r50_nuimg_704x256_8f_v1.1.py --weights W
    python timing.py --config C --weights W --amp fp16 --cuda-graph      # fastest
    python timing.py --config C                               # random weights: speed only

Batch 1, samples in the data set's order. History "cached" keeps the features of earlier frames between
samples, as a car driving along would, and reads the images of new ones only; "full" reads and encodes all frames of
every sample. "With loading" starts the clock before the sample's files are opened, in this process. "Throughput" loads
samples in other processes while the model works and, on a GPU, begins with the next before it waits for a result, as
val.py does; it gives the time from one result to the next.
Results are on the CPU when the clock stops.
"""

from lib.cli import check_files, make_parser, run_main, whole_number
from tools.components import components


def parse_args(argv=None):
    parser = make_parser(__doc__, 'config', 'override', 'split', 'amp', 'tf32', 'device', 'workers', 'trust-weights')
    add = parser.add_argument
    add('--weights', help='checkpoint of the model that the config builds (default: random weights)')
    add('--samples', type=whole_number(1), default=50, help='timed samples (default: 50)')
    add('--warmup', type=whole_number(0), default=10, help='samples before the clock runs (default: 10)')
    add('--history', default='both', choices=('cached', 'full', 'both'), help='default: both')
    add(
        '--cuda-graph',
        action='store_true',
        help='on a GPU: replay encoder and head as a CUDA graph (model.test_cfg.cuda_graph); the same results',
    )
    add('--out', metavar='JSON', help='write the figures to this file as well')
    return parser.parse_args(argv)


def main():
    args = parse_args()
    check_files(args.config, None, args.weights)
    from lib.run.timing_script import run_timing

    run_timing(args, components)


if __name__ == '__main__':
    run_main(main)
