"""From nothing to pictures and scores in three to four minutes, on two CPU cores: what ``make demo`` runs.

    python tools/demo.py

Makes three toy scenes that the shipped weights (weights/toybench_small.pth) have never seen, predicts two of them
and scores the predictions beside a guess that never looks at the images (the most frequent label of each voxel),
fine-tunes on the third for about a minute and scores again, and draws a sample and a drive. Every step is one of
the project's own scripts; the command is printed, and can be copied.

Each run has a folder of its own under outputs/demo/; outputs/demo/summary.json, picture.png and drive.gif are
those of the latest run.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lib.cli import run_main, whole_number  # noqa: E402
from lib.errors import CheckpointError, UserError  # noqa: E402

CONFIG = 'configs/toybench/demo.py'
WEIGHTS = 'weights/toybench_small.pth'
STEPS = 8
PICTURES = ('picture.png', 'drive.gif')


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='outputs/demo', help='folder of all runs (default: %(default)s)')
    parser.add_argument('--weights', default=WEIGHTS, help='of configs/toybench/demo.py (default: %(default)s)')
    parser.add_argument(
        '--scenes', type=whole_number(1), default=3, help='of the toy data; all but one are scored (default 3)'
    )
    parser.add_argument('--keyframes', type=whole_number(1), default=10, help='per scene (default 10)')
    parser.add_argument('--image-size', default='800x450', help='of the toy data (default %(default)s)')
    parser.add_argument('--max-iters', type=whole_number(1), help='steps of fine-tuning (default: those of the config)')
    parser.add_argument('--seed', type=whole_number(0), default=0, help='of data and training (default 0)')
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    return parser.parse_args(argv)


def clock(seconds: float) -> str:
    """12:34 of a number of seconds."""
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


@dataclass
class Demo:
    """One run: its folder and what its steps took.

    Attributes:
        folder: of this run.
        override: arguments that point the config at this run's data.
        seconds: per finished step.
    """

    folder: Path
    override: List[str]
    start: float = field(default_factory=time.time)
    seconds: Dict[str, float] = field(default_factory=dict)

    def run(self, name: str, script: str, *arguments) -> None:
        """Run one of the project's scripts, its output on the screen.

        Raises:
            UserError: it failed.
        """
        command = [script, *map(str, arguments)]
        print(
            f'\n=== {len(self.seconds) + 1}/{STEPS} {name} ({clock(time.time() - self.start)} since the start)\n'
            f'$ python {" ".join(command)}',
            flush=True,
        )
        begin = time.time()
        environment = {'OMP_WAIT_POLICY': 'PASSIVE', **os.environ}  # threads that spin cost tenfold on busy cores
        status = subprocess.run([sys.executable, *command], cwd=str(ROOT), env=environment).returncode
        if status:
            raise UserError(
                f'the demo stopped: {script} ended with status {status}, see above; its files are in {self.folder}'
            )
        self.seconds[name] = time.time() - begin

    def run_config(self, name: str, script: str, *arguments) -> None:
        """The same for a script that takes a config."""
        self.run(name, script, '--config', CONFIG, *arguments, '--override', *self.override)


def new_folder(out: str) -> Path:
    """A folder of this run's own; earlier runs stay as they are."""
    stamp = time.strftime('%Y%m%d_%H%M%S')
    for n in range(1000):
        folder = Path(out).resolve() / (stamp + (f'-{n}' if n else ''))
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise RuntimeError('1000 runs in one second')


def check_weights(path: str) -> None:
    """The weights must be there before work starts."""
    if not os.path.isfile(path):
        raise CheckpointError(
            f'{path} is not there; it belongs to the repository: check it out again, or make it with tools/toybench.sh '
            'and tools/ship_weights.py (docs/benchmark.md), or name another file with --weights'
        )


def run_steps(demo: Demo, args) -> None:
    """Data, prediction, baseline, fine-tuning, prediction, timing, pictures."""
    folder, data = demo.folder, demo.folder / 'nuscenes'
    scenes = ['--scenes', args.scenes, '--held-out', args.scenes - 1, '--keyframes', args.keyframes]
    world = [*scenes, '--image-size', args.image_size, '--seed', args.seed, '--label-sets', 'occ3d']
    demo.run('make a toy nuScenes', 'tools/make_toy_nuscenes.py', '--out', data, *world, '--no-sweeps', '--prepare')
    predictions = folder / 'predictions'
    saved = ['--save-predictions', predictions, '--out', folder / 'scores.json']
    demo.run_config('predict unseen scenes and score', 'val.py', '--weights', args.weights, *saved)
    demo.run_config('score the guess that never looks', 'tools/baseline.py', '--json', folder / 'baseline.json')
    tuning = ['--load-from', args.weights, '--work-dir', folder / 'train', '--no-eval', '--seed', args.seed]
    tuning += ['--max-iters', args.max_iters] if args.max_iters else []
    demo.run_config('fine-tune on another scene', 'train.py', *tuning)
    tuned = ['--weights', folder / 'train' / 'latest.pth', '--out', folder / 'finetuned_scores.json']
    demo.run_config('score again', 'val.py', *tuned)
    timed = ['--samples', 6, '--warmup', 1, '--history', 'full', '--out', folder / 'timing.json']
    demo.run_config('time it', 'timing.py', '--weights', args.weights, *timed)
    shown = ['--predictions', predictions]
    middle = ['--sample', args.keyframes // 2, '--out', folder / 'picture.png']
    demo.run_config('draw a sample', 'tools/visualize.py', *shown, *middle)
    drive = ['--scene', 'scene-0103', '--out', folder / 'drive.gif']
    demo.run_config('draw a drive', 'tools/visualize.py', *shown, *drive)


def losses(folder: Path) -> List[float]:
    """Logged losses of the fine-tuning, in order."""
    import json

    lines = (folder / 'train' / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    return [record['loss'] for record in map(json.loads, lines) if 'loss' in record]


def summarize(demo: Demo, args) -> Dict:
    """Everything worth keeping of a run."""
    from lib.io import read_json

    read = lambda name: read_json(demo.folder / f'{name}.json')  # noqa: E731
    scores, baseline, tuned = read('scores'), read('baseline'), read('finetuned_scores')
    course = losses(demo.folder)
    return dict(
        rayiou=scores['RayIoU'],
        baseline_rayiou=baseline['RayIoU'],
        finetuned_rayiou=tuned['RayIoU'],
        miou=scores.get('mIoU'),
        seconds=round(time.time() - demo.start, 1),
        picture=str(demo.folder / 'picture.png'),
        video=str(demo.folder / 'drive.gif'),
        beats_baseline=scores['RayIoU'] > baseline['RayIoU'],
        classes_above_zero=sum((row['RayIoU'] or 0) > 0 for row in scores['per_class'].values()),
        losses=course,
        loss_fell=len(course) > 1 and course[-1] < course[0],
        num_samples=scores['num_samples'],
        seed=args.seed,
        weights=args.weights,
        folder=str(demo.folder),
        seconds_per_step={name: round(value, 1) for name, value in demo.seconds.items()},
        timing=read('timing')['rows'],
        scores=scores,
        baseline=baseline,
        finetuned_scores=tuned,
    )


def print_table(summary: Dict) -> None:
    """Weights, guess and fine-tuned weights per class, and where the time went."""
    columns = ('scores', 'baseline', 'finetuned_scores')
    percent = lambda value: '-' if value is None else f'{100 * value:.2f}'  # noqa: E731
    row = lambda name, cells: print(f'{name:22s}' + ''.join(f'{cell:>14s}' for cell in cells))  # noqa: E731
    print()
    row('RayIoU, percent', ('SparseOcc', 'guess', 'fine-tuned'))
    for name in summary['scores']['per_class']:
        row(name, [percent(summary[column]['per_class'][name]['RayIoU']) for column in columns])
    row('mean', [percent(summary[column]['RayIoU']) for column in columns])
    if summary['losses']:
        print(f'\nfine-tuning: loss {" -> ".join(f"{loss:.1f}" for loss in summary["losses"])}')
    print('\n{}'.format('   '.join(f'{name} {clock(s)}' for name, s in summary['seconds_per_step'].items())))
    print(f'in all {clock(summary["seconds"])}, picture {summary["picture"]}, drive {summary["video"]}')


def publish(demo: Demo, out: str, summary: Dict) -> None:
    """The latest run's summary and pictures, where they are easy to find."""
    from lib.io import atomic_write, write_json

    for key, name in zip(('picture', 'video'), PICTURES):
        latest = Path(out).resolve() / name
        with atomic_write(latest) as temporary:
            shutil.copyfile(summary[key], str(temporary))
        summary[key] = os.path.relpath(str(latest), str(ROOT))
    write_json(demo.folder / 'summary.json', summary)
    write_json(Path(out).resolve() / 'summary.json', summary)


def main():
    args = parse_args()
    os.chdir(str(ROOT))
    check_weights(args.weights)
    if args.scenes < 2:
        raise UserError(f'--scenes must be at least 2, one of them for fine-tuning, got {args.scenes}')
    folder = new_folder(args.out)
    data = folder / 'nuscenes'
    demo = Demo(folder, [f'data.{split}.data_root={data}' for split in ('train', 'val', 'test')])
    run_steps(demo, args)
    summary = summarize(demo, args)
    print_table(summary)
    publish(demo, args.out, summary)
    print(f'figures in {os.path.join(args.out, "summary.json")}')
    if not summary['beats_baseline']:
        print('WARNING: the model did not beat the guess; are these the weights of configs/toybench/demo.py?')


if __name__ == '__main__':
    run_main(main)
