"""Score saved predictions against the labels of a config: RayIoU, for panoptic models RayPQ, and mIoU.

    python tools/evaluate.py --predictions predictions/
    python tools/evaluate.py --predictions predictions/ --metrics ray_iou ray_pq --json scores.json
    python tools/evaluate.py --config C --predictions theirs/ --split val --only-predicted

The same as sparseocc-eval (lib/metrics/command.py), with samples, labels and infos taken from a config. Predictions
are a folder or zip of val.py --save-predictions, of tools/infer.py, or of another project: dense or sparse .npz or
.npy, one file a sample (lib/metrics/formats.py lists the forms). Every sample of the data set must have one, unless
--only-predicted is given. Prints a table.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli import make_parser, run_main  # noqa: E402


def parse_args(argv=None):
    from lib.metrics.command import add_arguments

    parser = make_parser(__doc__, 'override', 'max-samples')
    add = parser.add_argument
    add('--config', help='config of the data set (default: what is written beside the predictions)')
    add('--split', choices=('train', 'val', 'test'), help='section of data (default: that predicted, or val)')
    add('--predictions', required=True, metavar='DIR', help='folder or zip, one file a sample')
    add('--out', metavar='FILE', help='the same as --json')
    add_arguments(parser)
    args = parser.parse_args(argv)
    args.json = args.json or args.out
    return args


def samples_of(dataset, predictions, only_predicted=False, say=print):
    """``lib.metrics.command.Samples`` of a data set and its ``PredictionFiles``.

    Args:
        only_predicted: leave out samples without a prediction.
        say: takes lines about the predictions.
    """
    from lib.metrics.command import Sample, Samples

    tokens = [dataset.sample_token(index) for index in range(len(dataset))]
    chosen, note = predictions.choose(tokens, only_predicted)
    for line in filter(None, (predictions.describe(), note)):
        say(line)
    numbers = {tokens[index]: index for index in chosen}
    dataset.ray_origins(chosen[0])  # once, before threads ask for it together

    def read(token, needed):
        index = numbers[token]
        labels, origins = dataset.ground_truth(index, needed), dataset.ray_origins(index)
        return Sample(predictions.read(token, needed), labels, origins, dataset.scene_name(index))

    return Samples(list(numbers), read)


def main():
    args = parse_args()
    from tools.components import config_of_predictions

    cfg, split = config_of_predictions(args.predictions, args.config, args.override, args.split)
    from lib.metrics.command import say, score_and_report
    from lib.metrics.formats import open_predictions
    from lib.run import default_metrics, read_task
    from loaders import build_dataset

    task = read_task(cfg)
    changes = {} if args.max_samples is None else dict(max_samples=args.max_samples)
    dataset = build_dataset(dict(cfg.data[split], test_mode=True, **changes), task)
    metrics = args.metrics or default_metrics(task)
    needs = [name for name, metric in (('instances', 'ray_pq'), ('flow', 'occ_score')) if metric in metrics]
    predictions = open_predictions(args.predictions, task, needs)
    samples = samples_of(dataset, predictions, args.only_predicted, say)
    about = dict(config=args.config, override=list(args.override), predictions=args.predictions, split=split)
    score_and_report(samples, task, metrics, args, about)


if __name__ == '__main__':
    run_main(main)
