"""Score anybody's occupancy predictions: RayIoU, RayPQ, mIoU, occupancy and flow.

    sparseocc-eval --predictions DIR --labels data/occ3d --infos nuscenes_infos_val.pkl
    sparseocc-eval --predictions DIR --labels data/occ3d --origins poses.json --metrics ray_iou ray_pq --device cuda
    sparseocc-eval --predictions DIR --labels data/occ3d --metrics miou --miou-mask camera --json scores.json
    sparseocc-eval --predictions DIR --labels data/openocc_v2 --infos FILE --label-set openocc_v2 --metrics occ_score
    sparseocc-eval --score-submission submission.gz --labels data/openocc_v2 --infos FILE --label-set openocc_v2
    sparseocc-eval origins --infos nuscenes_infos_val.pkl --out poses.json     (or --tables data/nuscenes/v1.0-trainval)
    sparseocc-eval compare a.json b.json --html comparison.html

Predictions are a folder or zip with one file a sample: dense or sparse .npz, or .npy, named <token>.npz or
<scene>/<token>/pred.npz. Labels are <scene>/<token>/labels.npz. Every sample of the infos must have a label and a
prediction, unless --only-predicted is given. mIoU alone needs neither infos nor origins.
"""

import argparse
import importlib.util
import re
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, List, Mapping, NamedTuple, Sequence, Tuple

from ..classes import LABEL_SETS
from ..cli import real_number, run_main, whole_number
from ..errors import DataError, UserError
from ..io import check_outputs, read_json, write_json
from ..label_formats import LABEL_FORMATS, NPZ
from ..task import Task
from . import METRICS, THRESHOLDS, Evaluator
from .result import MASKS, EvalResult

_PACKAGES = ('numba', 'tqdm')
_OF_FILES = ('label_files', 'label_range', 'label_voxel_size', 'label_frame')
_GRID_KEYS = ('point_cloud_range', 'voxel_size', 'frame', *_OF_FILES)
_AHEAD = 2  # samples per thread that may wait to be taken in


class Sample(NamedTuple):
    """What is compared in one sample; see ``Evaluator.update``."""

    prediction: Any
    labels: Mapping[str, Any]
    origins: Any
    scene: str


@dataclass
class Samples:
    """Samples to score, read when they are needed and by several threads.

    Attributes:
        tokens: their names, in order.
        read: sample of a token, given also the volumes that are needed (``Evaluator.needed``).
        night: {scene: it is by night}, as far as known.
    """

    tokens: Sequence[str]
    read: Callable[[str, Sequence[str]], Sample]
    night: Mapping[str, bool] = field(default_factory=dict)


def score(samples: Samples, evaluator: Evaluator, workers: int = 1, quiet: bool = False) -> EvalResult:
    """Read and score samples, with a line about progress and pace on standard error.

    Args:
        evaluator: made with ``threads=1``: threads share samples, not rays.
        workers: threads; reading and scoring release Python's lock.
        quiet: say nothing.
    """
    from tqdm import tqdm

    def prepare(token):
        sample = samples.read(token, evaluator.needed)
        return evaluator.prepare(sample.prediction, sample.labels, sample.origins, token, sample.scene)

    begin, every = time.monotonic(), 0.5 if sys.stderr.isatty() else 10.0
    with tqdm(
        total=len(samples.tokens), unit='sample', disable=quiet, mininterval=every, dynamic_ncols=True
    ) as progress:
        for prepared in results_in_order(prepare, samples.tokens, workers):
            evaluator.add(prepared)
            progress.update()
    result = evaluator.compute(samples.night)
    if not quiet:
        seconds = time.monotonic() - begin
        rate = len(samples.tokens) / max(seconds, 1e-9)
        say(f'scored {len(samples.tokens)} samples in {seconds:.1f} s, {rate:.1f} per second')
    return result


def results_in_order(work: Callable, items: Iterable, workers: int) -> Iterator:
    """``work(item)`` of every item, in their order, computed by threads a few items ahead."""
    waiting: deque = deque()
    with ThreadPoolExecutor(max_workers=workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > _AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def say(text: str) -> None:
    """A line that is no result."""
    print(text, file=sys.stderr, flush=True)


# -- arguments and results that tools/evaluate.py shares


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is scored, how, and where the figures go."""
    add = parser.add_argument
    add('--metrics', nargs='+', choices=METRICS, help='default: ray_iou and miou, as far as they can be scored')
    add('--miou-mask', choices=tuple(MASKS), help='voxels that mIoU counts (default: camera where labels have it)')
    add(
        '--thresholds',
        nargs='+',
        type=real_number(above=0),
        default=THRESHOLDS,
        metavar='M',
        help='metres (default: 1 2 4)',
    )
    add('--device', default='cpu', type=_device, help='where rays are cast and counted: cpu (default) or cuda')
    add('--workers', type=whole_number(1), metavar='N', help='threads (default: one per CPU)')
    add('--only-predicted', action='store_true', help='leave out samples without a prediction')
    add('--json', metavar='FILE', help='write all figures, and what "compare" needs')
    add('--csv', metavar='FILE', help='write all scores, one a line')
    add('--per-sample', metavar='FILE', help='write the scores of every sample, as .csv or .json')


def _device(text: str) -> str:
    """Type of an argument: cpu, cuda or cuda:N."""
    if not re.fullmatch(r'cpu|cuda(:\d{1,3})?', text):
        raise argparse.ArgumentTypeError(f'must be cpu, cuda or cuda:N, got {text!r}')
    return text


def score_and_report(
    samples: Samples, task: Task, metrics: Sequence[str], args, about: Mapping[str, Any]
) -> EvalResult:
    """Score samples as the arguments of :func:`add_arguments` say, print a table and write the files asked for.

    Args:
        about: what is written into the JSON file about the predictions.
    """
    from ..raycast import num_threads

    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'scoring needs {missing[0]}, which is not installed; run pip install {" ".join(missing)}')
    check_outputs(args.json, args.csv, args.per_sample)
    evaluator = Evaluator(
        task,
        metrics,
        device=args.device,
        thresholds=args.thresholds,
        miou_mask=args.miou_mask,
        breakdown=True,
        keep_samples=bool(args.per_sample),
        threads=1,
    )
    result = score(samples, evaluator, args.workers or num_threads())
    print(result.as_table())
    print(result.groups_table())
    if args.json:
        write_json(args.json, dict(result.as_dict(details=True), run=dict(about)))
    if args.csv:
        result.write_csv(args.csv)
    if args.per_sample:
        result.write_samples(args.per_sample)
    for path in filter(None, (args.json, args.csv, args.per_sample)):
        say(f'wrote {path}')
    return result


# -- the command


def parse(argv: Sequence[str]) -> Tuple[Callable[[argparse.Namespace], None], argparse.Namespace]:
    """What the arguments ask for: the function, and what it takes."""
    if argv[:1] == ['origins']:
        return origins_command, _parse_origins(argv[1:])
    if argv[:1] == ['compare']:
        from .compare import compare_command, parse_compare

        return compare_command, parse_compare(argv[1:])
    return evaluate_command, _parse_evaluate(argv)


def _parse_evaluate(argv):
    parser = argparse.ArgumentParser(
        'sparseocc-eval', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--predictions', metavar='DIR', help='folder or zip, one file a sample')
    add('--score-submission', metavar='FILE', help='score a submission.gz of the occupancy and flow challenge instead')
    add('--labels', required=True, metavar='DIR', help='folder of <scene>/<token>/labels.npz')
    add('--infos', metavar='FILE', help='info pickle of MMDetection3D: the samples, and where rays begin')
    add('--origins', metavar='FILE', help='the same from a small file: see "sparseocc-eval origins"')
    add(
        '--label-set',
        default='occ3d',
        metavar='NAME',
        help=f'{", ".join((*LABEL_SETS, *LABEL_FORMATS))}, or a JSON file (default: occ3d)',
    )
    add('--max-samples', type=whole_number(1), metavar='N', help='at most so many samples (the first)')
    add('--submission', metavar='FILE', help='write the predictions as submission.gz (CVPR 2024), or .zip (Occ3D 2023)')
    add('--about', metavar='FILE', help='JSON file that says whose submission it is')
    add_arguments(parser)
    add('--debug', action='store_true', help='show the traceback of an error')
    args = parser.parse_args(argv)
    if bool(args.predictions) == bool(args.score_submission):
        parser.error('give --predictions, or --score-submission')
    if args.submission and not args.submission.endswith(('.gz', '.zip')):
        parser.error(f'--submission must end in .gz (CVPR 2024) or .zip (Occ3D 2023), got {args.submission!r}')
    if args.infos and args.origins:
        parser.error('give --infos or --origins, not both')
    return args


def read_task(label_set: str) -> Task:
    """Grid and classes: a known label set with the grid of Occ3D, a label format with its own, or a JSON file's.

    Raises:
        ConfigError: an unknown name, or a file with wrong fields.
    """
    if label_set in LABEL_FORMATS:
        volume = LABEL_FORMATS[label_set].grid._asdict()
        return Task.from_config(dict(label_set='lidarseg', label_files=label_set, **volume))
    if not label_set.endswith('.json'):
        return Task.from_config(dict(label_set=label_set))
    content = read_json(label_set)
    if not isinstance(content, dict):
        raise DataError(f'{label_set} must hold a label set: name, class_names, things; see docs/configs.md')
    grid = {key: content.pop(key) for key in _GRID_KEYS if key in content}
    return Task.from_config(dict(content if 'label_set' in content else dict(label_set=content), **grid))


class _Inputs:
    """Labels and keyframes that the arguments name."""

    def __init__(self, args, task: Task):
        from ..labels import LabelFolder
        from .origins import Keyframes, read_keyframes

        self.task = task
        self._folder = LabelFolder(args.labels, args.labels, files=task.label_files)
        source = args.infos or args.origins
        where = (task.point_cloud_range, task.frame)
        self.keyframes = read_keyframes(source, *where) if source else Keyframes({}, {}, {})
        self.known = bool(source)

    def tokens(self, predicted: Iterable[str]) -> List[str]:
        """Names of the samples to score: those of the infos, or else those predicted."""
        return list(self.keyframes.origins) if self.known else sorted(predicted)

    def check_labels(self, tokens: Sequence[str]) -> None:
        """Raise DataError if samples have no label."""
        missing = [token for token in tokens if not self._path(token).is_file()]
        if missing:
            raise DataError(
                f'{len(missing)} of {len(tokens)} samples have no label, e.g. '
                f'{self._path(missing[0])}; fetch them, or give the infos of samples that have one'
            )

    def _info(self, token: str) -> Mapping[str, Any]:
        return self.keyframes.labels.get(token, dict(token=token))

    def _path(self, token: str) -> Path:
        """A sample's label file; the scene is looked for in the folder where it is that of a ``labels.npz``."""
        info = self._info(token) if self.task.label_files != NPZ else dict(token=token)
        return self._folder.path(info)

    def sample(self, token: str, prediction, needed: Sequence[str]) -> Sample:
        """A sample with its labels; the scene is that of the infos, or else that of the labels' folder."""
        from ..labels import read_labels

        labels = read_labels(self._path(token), self.task, needed, self._info(token))
        scene = self.keyframes.scenes.get(token) or self._folder.scene(dict(token=token))
        return Sample(prediction, labels, self.keyframes.origins.get(token), scene)


def evaluate_command(args) -> None:
    """Score predictions or a submission, or write a submission."""
    task = read_task(args.label_set)
    metrics = _choose_metrics(args)
    inputs = _Inputs(args, task)
    if any(name != 'miou' for name in metrics) and not inputs.known:
        raise UserError('ray_iou, ray_pq and occ_score need to know where rays begin; give --infos or --origins')
    if args.score_submission:
        tokens, read = _open_submission(args, inputs)
    else:
        tokens, read = _open_predictions(args, inputs, metrics)
    inputs.check_labels(tokens)
    check_outputs(args.submission, args.json, args.csv, args.per_sample)
    if args.submission:
        _write_submission(args, tokens, read, inputs)
    about = dict(predictions=args.predictions or args.score_submission, labels=args.labels, label_set=args.label_set)

    def read_sample(token, needed):
        return inputs.sample(token, read(token, needed), needed)

    samples = Samples(tokens, read_sample, inputs.keyframes.night)
    score_and_report(samples, task, metrics, args, about)


def _choose_metrics(args) -> Tuple[str, ...]:
    if args.score_submission:
        if args.metrics not in (None, ['occ_score']):
            raise UserError('a submission of the occupancy and flow challenge has one score; leave --metrics out')
        return ('occ_score',)
    if args.metrics:
        return tuple(args.metrics)
    return ('ray_iou', 'miou') if args.infos or args.origins else ('miou',)


def _open_predictions(args, inputs: _Inputs, metrics) -> Tuple[List[str], Callable]:
    """Tokens of the samples to score, and what reads their predictions."""
    from .formats import open_predictions

    with_flow = 'occ_score' in metrics or str(args.submission).endswith('.gz')
    needs = ['instances'] * ('ray_pq' in metrics) + ['flow'] * with_flow
    predictions = open_predictions(args.predictions, inputs.task, needs)
    tokens = inputs.tokens(predictions.tokens)[: args.max_samples]
    chosen, note = predictions.choose(tokens, args.only_predicted)
    for line in filter(None, (predictions.describe(), note)):
        say(line)
    return [tokens[index] for index in chosen], predictions.read


def _open_submission(args, inputs: _Inputs) -> Tuple[List[str], Callable]:
    from .origins import lidar_rays
    from .submission import read_submission

    tokens = inputs.tokens(())[: args.max_samples]
    rays = {token: len(inputs.keyframes.origins[token]) * len(lidar_rays()) for token in tokens}
    submission = read_submission(args.score_submission, inputs.task, rays)
    say(f'{len(tokens)} samples of {submission.about["method"]} ({submission.about["team"]})')
    return tokens, lambda token, needed: submission.results[token]


def _write_submission(args, tokens, read, inputs: _Inputs) -> None:
    """Write the predictions in the form of a challenge."""
    from .counting import cast_flow
    from .submission import write_occ3d_submission, write_submission

    if Path(args.submission).suffix == '.zip':
        write_occ3d_submission(args.submission, ((token, read(token, ())['semantics']) for token in tokens))
    elif not args.about:
        raise UserError(
            'a submission.gz says whose it is; give --about FILE.json (its keys: lib/metrics/submission.py)'
        )
    else:

        def rays(token):
            dense = read(token, ('flow',))
            return token, cast_flow(dense['semantics'], dense['flow'], inputs.keyframes.origins[token], inputs.task)

        write_submission(args.submission, read_json(args.about), map(rays, tokens))
    say(f'wrote {args.submission}')


def _parse_origins(argv):
    parser = argparse.ArgumentParser('sparseocc-eval origins', description='Write the small file that --origins takes.')
    parser.add_argument('--infos', metavar='FILE', help='info pickle of MMDetection3D')
    parser.add_argument('--tables', metavar='DIR', help='nuScenes tables, e.g. data/nuscenes/v1.0-trainval')
    parser.add_argument('--out', default='poses.json', metavar='FILE', help='.json (default: poses.json) or .npz')
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    args = parser.parse_args(argv)
    if bool(args.infos) == bool(args.tables):
        parser.error('give --infos or --tables')
    return args


def origins_command(args) -> None:
    """Write the poses of keyframes."""
    from .origins import Poses, read_infos, read_tables, write_poses

    poses = Poses(read_infos(args.infos), {}) if args.infos else read_tables(args.tables)
    write_poses(args.out, poses.infos, poses.descriptions)
    print(f'{args.out}: poses of {len(poses.infos)} keyframes')


def command(argv: Sequence[str]) -> None:
    """Run ``sparseocc-eval`` with these arguments."""
    function, args = parse(argv)
    function(args)


def main() -> None:
    """The console command."""
    run_main(lambda: command(sys.argv[1:]))


if __name__ == '__main__':
    main()
