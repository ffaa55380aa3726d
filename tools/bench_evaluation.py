"""Measure the evaluator on made-up samples of real size, start to finish, and what bounds it.

    python tools/bench_evaluation.py make --out /tmp/madeup --samples 6019
    python tools/bench_evaluation.py run --data /tmp/madeup --metrics ray_iou miou --workers 16 --device cuda
    python tools/bench_evaluation.py parts --data /tmp/madeup

A made-up sample has about 40,000 occupied voxels of 640,000, labels with both masks and instances, a dense prediction
that is wrong in places, and eight ray origins; files are compressed .npz. A few dozen samples differ, the others are
links to them. "run" times the command sparseocc-eval; "parts" times reading, casting and counting of single samples on
one thread (and on a GPU, many at once).
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

from lib.cli import run_main, whole_number  # noqa: E402

GRID, FREE = (200, 200, 16), 17
CAR, ROAD, SIDEWALK, MANMADE, VEGETATION = 4, 11, 13, 15, 16
KEYFRAMES = 40  # of a scene


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    make = commands.add_parser('make', help='write made-up labels, predictions and poses')
    make.add_argument('--out', required=True)
    make.add_argument('--samples', type=whole_number(1), default=6019)
    make.add_argument('--distinct', type=whole_number(1), default=48, help='samples that differ (default: 48)')
    for name in ('run', 'parts'):
        command = commands.add_parser(name)
        command.add_argument('--data', required=True, help='folder that "make" wrote')
        command.add_argument('--metrics', nargs='+', default=['ray_iou', 'miou'])
        command.add_argument('--device', default='cpu')
        command.add_argument('--workers', type=whole_number(1), default=2)
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    return parser.parse_args(argv)


def made_up_scene(rng):
    """(semantics uint8, instances uint8) [X, Y, Z] of a street."""
    x, y = np.meshgrid(np.arange(GRID[0]), np.arange(GRID[1]), indexing='ij')
    across = y - 100 - 12 * np.sin(x / rng.uniform(40, 90))
    ground = np.round(2 + 0.6 * np.sin(x / 35 + rng.uniform(0, 6)) + 0.6 * np.cos(y / 45)).astype(int)
    semantics, instances = np.full(GRID, FREE, np.uint8), np.zeros(GRID, np.uint8)
    seen = rng.random(GRID[:2]) < np.clip(1.25 - np.hypot(x - 100, y - 100) / 130, 0.25, 0.95)
    semantics[x[seen], y[seen], ground[seen]] = np.where(np.abs(across) < 14, ROAD, SIDEWALK)[seen]
    for side in (-1, 1):
        wall = (np.abs(across - side * 34) < 2) & seen & (rng.random(GRID[:2]) < 0.8)
        for height in range(10):
            semantics[x[wall], y[wall], np.minimum(ground[wall] + 1 + height, 15)] = MANMADE if side > 0 else VEGETATION
    for number in range(1, 26):
        row, column = rng.integers(4, 190), rng.integers(30, 165)
        level = ground[row, column] + 1
        box = np.s_[row : row + 11, column : column + 5, level : level + 4]
        semantics[box], instances[box] = CAR, number
        semantics[row + 1 : row + 10, column + 1 : column + 4, level : level + 3] = FREE  # only what a LiDAR sees
    instances[semantics != CAR] = 0
    return semantics, instances


def made_up_prediction(semantics, instances, rng):
    """The scene moved and thinned in places, as a model would see it."""
    shift = rng.integers(-1, 2, size=3)
    moved, ids = (np.roll(volume, shift, axis=(0, 1, 2)) for volume in (semantics, instances))
    wrong = rng.random((25, 25, 4)).repeat(8, axis=0).repeat(8, axis=1).repeat(4, axis=2) < 0.35
    moved[~wrong], ids[~wrong] = semantics[~wrong], instances[~wrong]
    lost = rng.random(GRID) < 0.1
    moved[lost], ids[lost] = FREE, 0
    return moved, ids


def make(args):
    """Write labels/<scene>/<token>/labels.npz, predictions/<token>.npz and poses.json."""
    from lib.io import save_npz
    from lib.metrics.origins import write_poses

    out, first = Path(args.out), {}
    (out / 'predictions').mkdir(parents=True, exist_ok=True)
    infos, occupied = [], []
    for number in range(args.samples):
        scene, token = f'scene-{number // KEYFRAMES:04d}', f'{number:032x}'
        files = (out / 'labels' / scene / token / 'labels.npz', out / 'predictions' / f'{token}.npz')
        files[0].parent.mkdir(parents=True, exist_ok=True)
        source = first.setdefault(number % args.distinct, files)
        if source is files:
            rng = np.random.default_rng(number)
            semantics, instances = made_up_scene(rng)
            masks = dict(mask_camera=rng.random(GRID) < 0.2, mask_lidar=rng.random(GRID) < 0.3)
            prediction, ids = made_up_prediction(semantics, instances, rng)
            masks = {name: np.repeat(mask[..., ::4], 4, axis=2).astype(np.uint8) for name, mask in masks.items()}
            save_npz(files[0], dict(semantics=semantics, instances=instances, **masks))
            save_npz(files[1], dict(pred=prediction, instances=ids))
            occupied.append(np.count_nonzero(semantics != FREE))
        else:
            for path, original in zip(files, source):
                path.unlink(missing_ok=True)
                os.link(str(original), str(path))
        infos.append(pose(number, scene, token))
    write_poses(out / 'poses.json', infos)
    print(f'{args.samples} samples in {out}, {np.mean(occupied):,.0f} occupied voxels each')


def pose(number, scene, token):
    """A keyframe of a drive at 5 m/s."""
    return dict(
        token=token,
        scene_name=scene,
        timestamp=number * 500_000,
        lidar2ego_rotation=[1.0, 0.0, 0.0, 0.0],
        lidar2ego_translation=[0.94, 0.0, 1.84],
        ego2global_rotation=[1.0, 0.0, 0.0, 0.0],
        ego2global_translation=[2.5 * (number % KEYFRAMES), 0.0, 0.0],
    )


def run(args):
    """Time the command itself, in a process of its own."""
    data = Path(args.data)
    command = [sys.executable, '-m', 'lib.metrics.command', '--predictions', str(data / 'predictions')]
    command += ['--labels', str(data / 'labels'), '--origins', str(data / 'poses.json'), '--metrics', *args.metrics]
    command += ['--device', args.device, '--workers', str(args.workers)]
    begin = time.monotonic()
    subprocess.run(command, cwd=str(Path(__file__).resolve().parent.parent), check=True)
    import resource

    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f'{time.monotonic() - begin:.1f} s from start to finish, at most {peak:.0f} MB of memory')


def parts(args):
    """Milliseconds per sample of reading, casting and counting; medians of single samples on one thread."""
    from lib.labels import LabelFolder, read_labels
    from lib.metrics import Evaluator
    from lib.metrics.formats import open_predictions
    from lib.metrics.origins import lidar_rays, read_keyframes
    from lib.raycast import trace
    from lib.task import Task

    data, task = Path(args.data), Task('occ3d')
    keyframes, folder = read_keyframes(data / 'poses.json'), LabelFolder(data / 'labels', data / 'labels')
    predictions = open_predictions(data / 'predictions', task)
    tokens = list(keyframes.origins)[:32]

    def read(token, names=('instances', 'mask_camera')):
        return predictions.read(token, names), read_labels(folder.path(dict(token=token)), task, names)

    samples = {token: read(token) for token in tokens}

    def time_of(work):
        work(tokens[0])
        seconds = []
        for token in tokens:
            begin = time.thread_time()
            work(token)
            seconds.append(time.thread_time() - begin)
        return 1000 * float(np.median(seconds))

    def cast(token):
        volumes = [samples[token][1]['semantics'], samples[token][0]['semantics']]
        trace(volumes, keyframes.origins[token], lidar_rays(), task.point_cloud_range, task.voxel_size, FREE, threads=1)

    rows = [('read for ray_iou', time_of(lambda token: read(token, ())))]
    rows += [('read for ray_iou + miou', time_of(lambda token: read(token, ('mask_camera',))))]
    rows += [('read for ray_pq', time_of(lambda token: read(token, ('instances',)))), ('cast rays', time_of(cast))]
    for metrics in (('ray_iou',), ('ray_iou', 'ray_pq'), ('miou',), ('ray_iou', 'miou')):
        evaluator = Evaluator(task, metrics, threads=1)
        prepare = lambda token: evaluator.prepare(*samples[token], keyframes.origins[token])  # noqa: B023, E731
        rows.append((f'score {" + ".join(metrics)}', time_of(prepare)))
    for name, milliseconds in rows:
        print(f'{name:28s} {milliseconds:6.1f} ms  {1000 / milliseconds:7.0f} samples/s a core')
    if args.device != 'cpu':
        _parts_on_gpu(args.device, task, samples, keyframes)


def _parts_on_gpu(device, task, samples, keyframes):
    """Samples per second on a GPU with the volumes in memory."""
    import torch

    from lib.metrics import Evaluator

    for metrics in (('ray_iou',), ('ray_iou', 'ray_pq')):
        evaluator = Evaluator(task, metrics, device=device)
        for _ in range(3):
            evaluator.reset()
            prepared = [
                evaluator.prepare(*samples[token], keyframes.origins[token], f'{token} {copy}')
                for copy in range(8)
                for token in samples
            ]
            torch.cuda.synchronize()
            begin = time.monotonic()
            for sample in prepared:
                evaluator.add(sample)
            evaluator.compute()
            seconds = time.monotonic() - begin
        print(f'{" + ".join(metrics):28s} {len(prepared) / seconds:7.0f} samples/s on {device}, volumes checked before')


def main():
    args = parse_args()
    dict(make=make, run=run, parts=parts)[args.command](args)


if __name__ == '__main__':
    run_main(main)
