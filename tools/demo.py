"""From nothing to a RayIoU in minutes, on two CPU cores: what ``make demo`` runs.

    python tools/demo.py

Makes a toy nuScenes, prepares it as the real one is prepared, trains a small SparseOcc, scores it on scenes it
has not seen beside a guess that never looks at the images (the most frequent label of each voxel over the
training set), times it, and draws one sample. Every step is one of the project's own scripts; the command is
printed, and can be copied.

Each run has a folder of its own under outputs/demo/; outputs/demo/summary.json and picture.png are those of the
latest run.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lib.cli import make_parser, run_main  # noqa: E402

CONFIG = 'configs/toy/semantic.py'
VERSION = 'v1.0-mini'
TRAINING_STEPS = 320  # fewer than some 230 do not reliably beat the guess


def parse_args(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument('--out', default='outputs/demo', help='folder of all runs (default: %(default)s)')
    parser.add_argument('--scenes', type=int, default=10, help='of the toy data; two are held out (default 10)')
    parser.add_argument('--keyframes', type=int, default=8, help='per scene (default 8)')
    parser.add_argument('--image-size', default='640x360', help='of the toy data (default 640x360)')
    parser.add_argument('--max-iters', type=int, default=TRAINING_STEPS, help='training steps (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of data and training (default 0)')
    return parser.parse_args(argv)


def clock(seconds: float) -> str:
    """12:34 of a number of seconds."""
    minutes, rest = divmod(int(seconds), 60)
    return f'{minutes}:{rest:02}'


@dataclass
class Demo:
    """One run: its folder and what its steps took.

    Attributes:
        folder: of this run.
        steps: number of steps, for the headings.
        seconds: per finished step.
    """

    folder: Path
    steps: int
    start: float = field(default_factory=time.time)
    seconds: Dict[str, float] = field(default_factory=dict)

    def run(self, name: str, arguments: List[str]) -> None:
        """Run one of the project's scripts, its output on the screen.

        Raises:
            UserError: it failed.
        """
        from lib.errors import UserError

        print(
            (
                f'\n=== {len(self.seconds) + 1}/{self.steps} {name} ({clock(time.time() - self.start)} since the '
                f'start)\n$ python {" ".join(arguments)}'
            ),
            flush=True,
        )
        begin = time.time()
        status = subprocess.run([sys.executable] + arguments, cwd=str(ROOT)).returncode
        if status:
            raise UserError(
                f'the demo stopped: {arguments[0]} ended with status {status}, see above; its files are in '
                f'{self.folder}'
            )
        self.seconds[name] = time.time() - begin


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


def run_steps(demo: Demo, args) -> None:
    """Data, training, evaluation, baseline, timing, picture."""
    data, train = str(demo.folder / 'nuscenes'), demo.folder / 'train'
    override = ['--override'] + [f'data.{split}.data_root={data}' for split in ('train', 'val', 'test')]
    weights = str(train / 'latest.pth')
    demo.run(
        'make a toy nuScenes',
        [
            'tools/make_toy_nuscenes.py',
            '--out',
            data,
            '--scenes',
            str(args.scenes),
            '--keyframes',
            str(args.keyframes),
            '--image-size',
            args.image_size,
            '--no-sweeps',
            '--label-sets',
            'occ3d',
            '--seed',
            str(args.seed),
        ],
    )
    demo.run('prepare it', ['gen_sweep_info.py', '--data-root', data, '--version', VERSION])
    demo.run(
        'train',
        [
            'train.py',
            '--config',
            CONFIG,
            '--work-dir',
            str(train),
            '--no-eval',
            '--seed',
            str(args.seed),
            '--max-iters',
            str(args.max_iters),
        ]
        + override,
    )
    demo.run(
        'evaluate on held-out scenes',
        [
            'val.py',
            '--config',
            CONFIG,
            '--weights',
            weights,
            '--save-predictions',
            str(demo.folder / 'predictions'),
            '--out',
            str(demo.folder / 'scores.json'),
        ]
        + override,
    )
    demo.run(
        'score the guess that never looks',
        ['tools/baseline.py', '--config', CONFIG, '--json', str(demo.folder / 'baseline.json')] + override,
    )
    demo.run(
        'time it',
        [
            'timing.py',
            '--config',
            CONFIG,
            '--weights',
            weights,
            '--samples',
            '6',
            '--warmup',
            '1',
            '--history',
            'full',
            '--out',
            str(demo.folder / 'timing.json'),
        ]
        + override,
    )
    demo.run(
        'draw a sample',
        [
            'tools/visualize.py',
            '--config',
            CONFIG,
            '--predictions',
            str(demo.folder / 'predictions'),
            '--sample',
            str(args.keyframes // 2),
            '--out',
            str(demo.folder / 'picture.png'),
        ]
        + override,
    )


def summarize(demo: Demo, args) -> Dict:
    """Everything worth keeping of a run."""
    from lib.io import read_json

    scores, baseline = read_json(demo.folder / 'scores.json'), read_json(demo.folder / 'baseline.json')
    return dict(
        rayiou=scores['RayIoU'],
        baseline_rayiou=baseline['RayIoU'],
        miou=scores.get('mIoU'),
        seconds=round(time.time() - demo.start, 1),
        picture=str(demo.folder / 'picture.png'),
        beats_baseline=scores['RayIoU'] > baseline['RayIoU'],
        num_samples=scores['num_samples'],
        seed=args.seed,
        folder=str(demo.folder),
        seconds_per_step={name: round(value, 1) for name, value in demo.seconds.items()},
        timing=read_json(demo.folder / 'timing.json')['rows'],
        scores=scores,
        baseline=baseline,
    )


def print_table(summary: Dict) -> None:
    """Model beside guess, per class, and where the time went."""
    print(f'\n{"RayIoU, percent":<22} {"SparseOcc":>14} {"guess":>14}')
    percent = lambda value: '-' if value is None else f'{100 * value:.2f}'  # noqa: E731
    for name, row in summary['scores']['per_class'].items():
        print(
            f'{name:<22} {percent(row["RayIoU"]):>14} {percent(summary["baseline"]["per_class"][name]["RayIoU"]):>14}'
        )
    print(f'{"mean":<22} {percent(summary["rayiou"]):>14} {percent(summary["baseline_rayiou"]):>14}')
    print('\n{}'.format('   '.join(f'{name} {clock(s)}' for name, s in summary['seconds_per_step'].items())))
    print('in all {}, picture {}'.format(clock(summary['seconds']), summary['picture']))


def publish(demo: Demo, out: str, summary: Dict) -> None:
    """The latest run's summary and picture, where they are easy to find."""
    import shutil

    from lib.io import atomic_write, write_json

    latest = Path(out).resolve() / 'picture.png'
    with atomic_write(latest) as temporary:
        shutil.copyfile(summary['picture'], str(temporary))
    summary['picture'] = os.path.relpath(str(latest), str(ROOT))
    write_json(demo.folder / 'summary.json', summary)
    write_json(Path(out).resolve() / 'summary.json', summary)


def main():
    args = parse_args()
    os.chdir(str(ROOT))
    demo = Demo(new_folder(args.out), steps=7)
    run_steps(demo, args)
    summary = summarize(demo, args)
    print_table(summary)
    publish(demo, args.out, summary)
    print('figures in {}'.format(os.path.join(args.out, 'summary.json')))
    if not summary['beats_baseline']:
        print('WARNING: the model did not beat the guess; train longer (--max-iters) or with more --scenes')


if __name__ == '__main__':
    run_main(main)
