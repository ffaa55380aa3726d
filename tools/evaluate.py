"""Score saved predictions against the labels: RayIoU, for panoptic models RayPQ, and mIoU.

    python tools/evaluate.py --predictions predictions/
    python tools/evaluate.py --predictions predictions/ --metrics ray_iou ray_pq --out scores.json
    python tools/evaluate.py --config C --predictions theirs/ --split val --only-predicted

Predictions are a folder or zip of val.py --save-predictions, of tools/infer.py, or of another project: dense or
sparse .npz or .npy, one file a sample (lib/metrics/formats.py lists the forms). Every sample of the data set must
have one, unless --only-predicted is given. Prints a table.
"""

import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli import make_parser, run_main  # noqa: E402

_SECONDS_BETWEEN_LINES = 10.0


def parse_args(argv=None):
    parser = make_parser(__doc__, 'override', 'max-samples')
    add = parser.add_argument
    add('--config', help='config of the data set (default: what is written beside the predictions)')
    add('--split', choices=('train', 'val', 'test'), help='section of data (default: that predicted, or val)')
    add('--predictions', required=True, metavar='DIR', help='folder or zip, one file a sample')
    add('--metrics', nargs='+', choices=('ray_iou', 'ray_pq', 'miou'), help='default: what suits the task')
    add('--only-predicted', action='store_true', help='leave out samples without a prediction')
    add('--device', default='cpu', help='where rays are cast: cpu (default) or cuda')
    add('--workers', type=int, default=0, help='threads (default: one per CPU)')
    add('--out', metavar='JSON', help='write the figures to this file as well')
    return parser.parse_args(argv)


def score(dataset, indices, predictions, evaluator, workers=1, say=None):
    """EvalResult of saved predictions.

    Args:
        indices: samples of the data set to score.
        predictions: ``PredictionFiles``.
        workers: threads; reading and scoring release Python's lock.
        say: takes progress lines.
    """

    def prepare(index):
        token = dataset.sample_token(index)
        return evaluator.prepare(
            predictions.read(token), dataset.ground_truth(index), dataset.ray_origins(index), token
        )

    dataset.ray_origins(indices[0])  # once, before threads ask for it together
    begin = reported = time.monotonic()
    for done, sample in enumerate(results_in_order(prepare, indices, workers), start=1):
        evaluator.add(sample)
        if say and time.monotonic() - reported > _SECONDS_BETWEEN_LINES:
            reported = time.monotonic()
            rate = done / (reported - begin)
            left = (len(indices) - done) / rate
            say(f'scored {done} of {len(indices)} samples, {rate:.1f} per second, {left:.0f} s left')
    result = evaluator.compute()
    if say:
        rate = len(indices) / max(time.monotonic() - begin, 1e-9)
        say(f'scored {len(indices)} samples, {rate:.1f} per second')
    return result


def results_in_order(work, items, workers):
    """``work(item)`` of every item, in their order, computed by threads a few items ahead."""
    waiting = deque()
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def main():
    args = parse_args()
    from lib.cli import config_of_predictions

    cfg, split = config_of_predictions(args.predictions, args.config, args.override, args.split)
    from lib.io import write_json
    from lib.metrics import Evaluator
    from lib.metrics.formats import open_predictions
    from lib.raycast import num_threads
    from lib.run import default_metrics, read_task
    from loaders import build_dataset

    task = read_task(cfg)
    changes = {} if args.max_samples is None else dict(max_samples=args.max_samples)
    dataset = build_dataset(dict(cfg.data[split], test_mode=True, **changes), task)
    metrics = args.metrics or default_metrics(task)
    predictions = open_predictions(args.predictions, task, needs=('instances',) if 'ray_pq' in metrics else ())
    tokens = [dataset.sample_token(index) for index in range(len(dataset))]
    indices, note = predictions.choose(tokens, args.only_predicted)
    for line in filter(None, (predictions.describe(), note)):
        print(line, file=sys.stderr, flush=True)
    evaluator = Evaluator(task, metrics, device=args.device, threads=1)
    result = score(
        dataset,
        indices,
        predictions,
        evaluator,
        args.workers or num_threads(),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(result.as_table())
    if args.out:
        about = dict(config=args.config, override=list(args.override), predictions=args.predictions, split=split)
        write_json(args.out, dict(result.as_dict(), run=about))


if __name__ == '__main__':
    run_main(main)
