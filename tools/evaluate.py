"""Score saved predictions against the labels: RayIoU, for panoptic models RayPQ, and mIoU.

    python tools/evaluate.py --config C --predictions predictions/
    python tools/evaluate.py --config C --predictions predictions/ --metrics ray_iou ray_pq --out scores.json
    python tools/evaluate.py --config C --predictions predictions/ --only-predicted

Predictions are files <sample-token>.npz, as val.py --save-predictions and tools/infer.py write them, anywhere
under the folder. Every sample of the data set must have one, unless --only-predicted is given. Prints a
table.
"""

import argparse
import os
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli import run_main  # noqa: E402

_SECONDS_BETWEEN_LINES = 10.0


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--config', required=True)
    add('--predictions', required=True, metavar='DIR', help='folder of <sample-token>.npz files')
    add('--override', nargs='+', default=[], metavar='KEY=VALUE', help='change values of the config')
    add('--split', default='val', choices=('train', 'val', 'test'), help='section of data (default: val)')
    add('--metrics', nargs='+', choices=('ray_iou', 'ray_pq', 'miou'), help='default: what suits the task')
    add('--max-samples', type=int, help='at most so many samples (the first)')
    add('--only-predicted', action='store_true', help='leave out samples without a prediction')
    add('--device', default='cpu', help='where rays are cast: cpu (default) or cuda')
    add('--workers', type=int, default=0, help='threads (default: one per CPU)')
    add('--out', metavar='JSON', help='write the figures to this file as well')
    add('--debug', action='store_true', help='show the traceback of an error')
    return parser.parse_args(argv)


def find_predictions(folder):
    """{sample token: path} of every .npz file under a folder.

    Raises:
        DataError: the folder is missing or has none, or a token has two files.
    """
    from lib.errors import DataError

    if not os.path.isdir(folder):
        raise DataError(f'prediction folder {folder} does not exist; give the folder of val.py --save-predictions')
    found = {}
    for path in sorted(Path(folder).rglob('*.npz')):
        if path.stem in found:
            raise DataError(
                f'{found[path.stem]} and {path} are both predictions of sample {path.stem}; give the folder of one run'
            )
        found[path.stem] = path
    if not found:
        raise DataError(f'{folder} holds no .npz files; give the folder of val.py --save-predictions')
    return found


def choose_samples(dataset, predictions, only_predicted):
    """Indices of the samples to score.

    Raises:
        DataError: samples have no prediction and may not be left out, or none has one.
    """
    from lib.errors import DataError

    indices = [index for index in range(len(dataset)) if dataset.sample_token(index) in predictions]
    missing = len(dataset) - len(indices)
    if not indices or (missing and not only_predicted):
        absent = next(
            dataset.sample_token(index)
            for index in range(len(dataset))
            if dataset.sample_token(index) not in predictions
        )
        remedy = ', or score the others with --only-predicted' if indices else ''
        raise DataError(
            '%d of %d samples have no prediction, e.g. %s; predict them, or choose the split '
            'they are of with --split%s' % (missing, len(dataset), absent, remedy)
        )
    return indices


def score(dataset, indices, predictions, evaluator, workers=1, say=None):
    """EvalResult of saved predictions.

    Args:
        indices: samples of the data set to score.
        predictions: {sample token: path}.
        workers: threads; reading and scoring release Python's lock.
        say: takes progress lines.
    """
    from lib.prediction import load_prediction, to_dense

    def process(index):
        token = dataset.sample_token(index)
        dense = to_dense(load_prediction(predictions[token]), evaluator.task)
        return evaluator.process(dense, dataset.ground_truth(index), dataset.ray_origins(index), key=token)

    dataset.ray_origins(indices[0])  # once, before threads ask for it together
    stats, begin, reported = [], time.monotonic(), time.monotonic()
    for one in results_in_order(process, indices, workers):
        stats.append(one)
        if say and time.monotonic() - reported > _SECONDS_BETWEEN_LINES:
            reported = time.monotonic()
            rate = len(stats) / (reported - begin)
            say(
                'scored %d of %d samples, %.1f per second, %.0f s left'
                % (len(stats), len(indices), rate, (len(indices) - len(stats)) / rate)
            )
    if say:
        rate = len(stats) / max(time.monotonic() - begin, 1e-9)
        say('scored %d samples, %.1f per second' % (len(stats), rate))
    return evaluator.summarize(stats)


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
    predictions = find_predictions(args.predictions)
    from lib.config import load_config

    cfg = load_config(args.config, args.override)
    from lib.io import write_json
    from lib.metrics import OccEvaluator
    from lib.raycast.cpu import num_threads
    from lib.run import default_metrics, read_task
    from loaders import build_dataset

    task = read_task(cfg)
    changes = {} if args.max_samples is None else dict(max_samples=args.max_samples)
    dataset = build_dataset(dict(cfg.data[args.split], test_mode=True, **changes), task)
    indices = choose_samples(dataset, predictions, args.only_predicted)
    metrics = args.metrics or default_metrics(task)
    evaluator = OccEvaluator(task, metrics, device=args.device, truth_cache_mb=0)
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
        about = dict(config=args.config, override=list(args.override), predictions=args.predictions, split=args.split)
        write_json(args.out, dict(result.as_dict(), run=about))


if __name__ == '__main__':
    run_main(main)
