"""Write a toy nuScenes: a procedural world in the schema and layout of the real data set.

    python tools/make_toy_nuscenes.py --out data/toy --scenes 10 --keyframes 10 --image-size 800x450 --prepare
    python tools/make_toy_nuscenes.py --preset toybench-v1 --out data/toybench

nuscenes-devkit and this project read the result with the code they read the real one with. Scenes carry
nuScenes' own scene names, so that its split lists apply: up to ten scenes are written as v1.0-mini, more as
v1.0-trainval. Besides what nuScenes has, ``occ3d/`` and ``openocc_v2/`` hold occupancy labels and
``toy_truth/`` the true object of every voxel; ``--prepare`` adds what gen_sweep_info.py and
gen_instance_info.py make. The same arguments give the same files, byte for byte, on the same kind of device.
A run that was stopped goes on when it is started again with the same arguments.
"""

import contextlib
import functools
import os
import re
import sys
import time
from pathlib import Path

_BEGIN = time.monotonic()
# Each process computes on one core; threads of linear algebra would fight over them.
for _name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'):
    os.environ[_name] = '1'
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli import make_parser, real_number, run_main, whole_number  # noqa: E402
from lib.errors import DataError, UserError  # noqa: E402
from lib.task import Task  # noqa: E402
from tools.toy.generate import COMPILED, LABEL_SETS, Seconds, generate  # noqa: E402
from tools.toy.jobs import Options  # noqa: E402
from tools.toy.labels import OCC3D_GRID  # noqa: E402
from tools.toy.names import SPLITS, VERSIONS, plan_scenes  # noqa: E402
from tools.toy.pool import beside, plan_crew  # noqa: E402
from tools.toy.work import FOLDER  # noqa: E402

# Frozen data sets. A preset never changes; another one gets another name.
PRESETS = {
    'toybench-v1': dict(
        scenes=60,
        held_out=10,
        keyframes=20,
        image_size='800x450',
        no_sweeps=False,
        seed=1701,
        split='both',
        version='v1.0-trainval',
        label_sets='occ3d,openocc_v2',
        voxel_size=OCC3D_GRID.voxel_size,
        point_cloud_range=OCC3D_GRID.point_cloud_range,
        prepare=True,
    )
}


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument('--out', type=Path, required=True, help='data root to write; new or empty')
    parser.add_argument('--preset', choices=sorted(PRESETS), help='a frozen data set: decides everything below it')
    parser.add_argument('--scenes', type=whole_number(1), default=10, help='number of scenes (default 10)')
    parser.add_argument(
        '--keyframes', type=whole_number(1), default=10, help='keyframes per scene, 2 a second (default 10)'
    )
    parser.add_argument(
        '--image-size',
        default='800x450',
        metavar='WxH',
        help='image size; calibration is scaled to it (default 800x450; nuScenes: 1600x900)',
    )
    parser.add_argument('--no-sweeps', action='store_true', help='keyframes only: no 12 Hz images, no 20 Hz scans')
    parser.add_argument('--seed', type=whole_number(0), default=0, help='another seed makes another world (default 0)')
    parser.add_argument(
        '--split',
        choices=SPLITS,
        default='both',
        help='splits that the scenes belong to (default both: about one in five is val)',
    )
    parser.add_argument(
        '--held-out', type=whole_number(1), help='scenes of --split both that are val (default: one in five)'
    )
    parser.add_argument('--version', choices=VERSIONS, help='default: v1.0-mini if its scenes suffice')
    parser.add_argument(
        '--label-sets',
        default='occ3d,openocc_v2',
        metavar='A,B',
        help='occupancy labels to write (default occ3d,openocc_v2)',
    )
    parser.add_argument(
        '--voxel-size',
        type=real_number(above=0),
        default=OCC3D_GRID.voxel_size,
        help="of labels, metres (Occ3D's: 0.4)",
    )
    parser.add_argument(
        '--point-cloud-range',
        nargs=6,
        type=real_number(),
        default=OCC3D_GRID.point_cloud_range,
        metavar=('X0', 'Y0', 'Z0', 'X1', 'Y1', 'Z1'),
        help="volume of the labels, metres, ego frame (default: Occ3D's)",
    )
    parser.add_argument('--prepare', action='store_true', help='make info files and panoptic labels too')
    parser.add_argument(
        '--device',
        choices=('auto', 'cpu', 'cuda'),
        default='auto',
        help='where images are traced (default: all GPUs, if there are any)',
    )
    parser.add_argument(
        '--workers', type=whole_number(1), help='processes, at most (default: as cores and memory allow)'
    )
    parser.add_argument(
        '--overwrite',
        action='store_true',
        help='write into a folder that is not empty: replaces files of the same names only',
    )
    args = parser.parse_args()
    if args.preset:
        vars(args).update(PRESETS[args.preset])
    return args


def parse_size(text):
    """(width, height) from 'WxH'.

    Raises:
        UserError: not of that form, or smaller than 32 or larger than 8192 pixels a side.
    """
    match = re.fullmatch(r'(\d+)x(\d+)', text)
    if not match:
        raise UserError(f'--image-size {text!r} is not of the form WxH, e.g. 800x450')
    size = int(match.group(1)), int(match.group(2))
    if min(size) < 32 or max(size) > 8192:
        raise UserError(f'--image-size {text}: both sides must be between 32 and 8192 pixels')
    return size


def parse_label_sets(text):
    """Names of label sets from a comma-separated list; an empty one makes none."""
    names = tuple(name.strip() for name in text.split(',') if name.strip())
    unknown = [name for name in names if name not in LABEL_SETS]
    if unknown:
        raise UserError(f'--label-sets: {unknown[0]!r} is unknown; choose from {", ".join(LABEL_SETS)}')
    return names


def check_out(out, overwrite):
    """The data root must be new, empty, or of a run that was stopped, unless the user says otherwise."""
    if out.exists() and not out.is_dir():
        raise UserError(f'--out {out} is a file; give a folder')
    if out.is_dir() and any(out.iterdir()) and not overwrite and not (out / FOLDER).is_dir():
        raise UserError(
            f'--out {out} is not empty; give a new folder, or --overwrite to replace files of the '
            'same names in it (nothing is deleted)'
        )


def check_at_least_one(**numbers):
    """Counts must be positive."""
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UserError(f'--{name} must be at least 1, got {value}')


def show_progress(results, total):
    """Wrap an iterator of results in a progress bar with the time that remains."""
    from tqdm import tqdm

    return tqdm(results, total=total, desc='toy nuScenes', unit='keyframe', mininterval=1.0)


def import_prepare():
    """Import what :func:`prepare` needs, which takes seconds; it tells what is missing."""
    from lib.openmmlab import prepare_openmmlab

    with contextlib.suppress(ImportError, UserError):
        from loaders.prepare import panoptic_labels, sweep_infos  # noqa: F401

        prepare_openmmlab()
        from nuscenes import NuScenes  # noqa: F401


def prepare(out, version, processes, task):
    """Make info files, and panoptic labels where there are labels to make them from."""
    from loaders.prepare.panoptic_labels import write_panoptic_labels
    from loaders.prepare.sweep_infos import write_sweep_infos

    write_sweep_infos(str(out), version, str(out), None, processes)
    if (out / 'occ3d').is_dir():
        panoptic = out / 'occ3d_panoptic'
        made = write_panoptic_labels(str(out), version, 'occ3d', panoptic, task, None, False, processes)
        if made.failed:
            raise DataError(f'{len(made.failed)} keyframes got no panoptic label; the first: {made.failed[0]}')


def describe_seconds(imported, start, seconds: Seconds, keyframes):
    """Two lines: how long ``keyframes`` took and when each phase ended, and what a keyframe took of the processes.

    ``imported``, ``start``: seconds until everything was imported, and until processes were started.
    """
    whole = start + seconds.whole
    first, most, images = (start + s for s in (seconds.first, seconds.tables, seconds.keyframes))
    used = ', '.join(f'{kind} {a / keyframes:.2f} ({b / keyframes:.2f})' for kind, (a, b) in seconds.used.items())
    return (
        f'{keyframes} keyframes in {whole:.1f} s, {keyframes / whole:.1f} a second: {start:.1f} s to start '
        f'({imported:.1f} s of it imports), first images after {first:.1f} s, all but images after {most:.1f} s, '
        f'images after {images:.1f} s, then {whole - images:.1f} s for the rest of info files and panoptic labels\n'
        f'seconds (CPU seconds) that processes spent on a keyframe: {used}'
    )


def main():
    args = parse_args()
    check_at_least_one(scenes=args.scenes, keyframes=args.keyframes, workers=args.workers)
    if args.seed < 0:
        raise UserError(f'--seed must not be negative, got {args.seed}')
    if args.held_out is not None and not 0 <= args.held_out <= args.scenes:
        raise UserError(f'--held-out must lie between 0 and --scenes {args.scenes}, got {args.held_out}')
    size, label_sets = parse_size(args.image_size), parse_label_sets(args.label_sets)
    check_out(args.out, args.overwrite)
    task = Task.from_config(
        dict(label_set='occ3d', voxel_size=args.voxel_size, point_cloud_range=args.point_cloud_range)
    )
    with beside(COMPILED) as compiled:
        plan = plan_scenes(args.scenes, args.split, args.version, args.held_out)
        import torch  # noqa: F401  once, for all processes

        imported = time.monotonic() - _BEGIN
        crew = plan_crew(args.device, args.workers)
        print(f'{crew.processes} processes, {len(crew.devices)} of them render on {len(set(crew.devices))} GPUs')
        if args.workers and args.workers > crew.processes:
            print(f'(of the {args.workers} asked for, no more fit into free memory)')
        options = Options(args.out, plan, args.keyframes, size, not args.no_sweeps, args.seed, label_sets, task.grid)
        last = functools.partial(prepare, args.out, plan.version, max(crew.workers // 2, 1), task)
        planned = time.monotonic()
        seconds = generate(options, crew, show_progress, last if args.prepare else None, import_prepare, compiled)
    splits = f'train: {len(plan.train)}, val: {len(plan.val)}, test: {len(plan.test)}'
    print(
        f'{args.out}: {len(plan.names)} scenes ({splits}) of {args.keyframes} keyframes, '
        f'tables in {args.out / plan.version}'
    )
    print(describe_seconds(imported, planned - _BEGIN, seconds, len(plan.names) * args.keyframes))


if __name__ == '__main__':
    run_main(main)
