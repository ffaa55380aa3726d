"""Score a guess that never looks at the images: the most frequent label of each voxel over the training set.

    python tools/baseline.py --config configs/toy/semantic.py
    python tools/baseline.py --config configs/r50_nuimg_704x256_8f.py --max-train-samples 2000 --json baseline.json

The guess is one fixed volume in the ego frame, free included; it is scored on the validation set with the
evaluator that val.py uses. A trained model that does not beat it has learned nothing from its cameras.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli import make_parser, run_main, whole_number  # noqa: E402


def parse_args(argv=None):
    parser = make_parser(__doc__, 'config', 'override', 'max-samples')
    parser.add_argument(
        '--max-train-samples', type=whole_number(1), help='count labels of this many training samples only'
    )
    parser.add_argument('--json', help='write the scores to this file as well')
    return parser.parse_args(argv)


def most_frequent_labels(dataset, task, max_samples=None):
    """The label that each voxel has most often; the lowest id among equals.

    Args:
        dataset: NuSceneOcc with labels.
    Returns:
        uint8 [X, Y, Z].
    """
    import numpy as np

    counts = np.zeros((task.label_set.num_classes,) + task.grid_shape, np.int32)
    for index in range(min(len(dataset), max_samples or len(dataset))):
        semantics = dataset.ground_truth(index)['semantics']
        for label in range(len(counts)):
            counts[label] += semantics == label
    return counts.argmax(axis=0).astype(np.uint8)


def score(volume, dataset, task, metrics, max_samples=None):
    """EvalResult of predicting ``volume`` for every sample of ``dataset``."""
    import numpy as np

    from lib.metrics import Evaluator

    evaluator = Evaluator(task, metrics=metrics)
    prediction = dict(semantics=volume, instances=np.zeros(volume.shape, np.int16))
    for i in range(min(len(dataset), max_samples or len(dataset))):
        evaluator.update(prediction, dataset.ground_truth(i), dataset.ray_origins(i), dataset.sample_token(i))
    return evaluator.compute()


def main():
    args = parse_args()
    from lib.config import load_config
    from lib.io import check_outputs, write_json
    from lib.task import Task
    from loaders import build_dataset

    check_outputs(args.json)
    cfg = load_config(args.config, args.override)
    task = Task.from_config(cfg.task)
    train = build_dataset(cfg.data.train, task)
    volume = most_frequent_labels(train, task, args.max_train_samples)
    result = score(volume, build_dataset(cfg.data.val, task), task, ('ray_iou', 'miou'), args.max_samples)
    print(
        f'Most frequent label of each voxel over {min(len(train), args.max_train_samples or len(train))} '
        'training samples, scored on the validation set:'
    )
    print(result.as_table())
    if args.json:
        write_json(args.json, result.as_dict())
        print(f'wrote {args.json}')


if __name__ == '__main__':
    run_main(main)
