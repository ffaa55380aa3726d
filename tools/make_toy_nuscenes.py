"""Write a toy nuScenes: a procedural world in the schema and layout of the real data set.

    python tools/make_toy_nuscenes.py --out data/toy --scenes 10 --keyframes 10 --image-size 800x450
    python gen_sweep_info.py --data-root data/toy --version v1.0-mini
    python gen_instance_info.py --data-root data/toy --version v1.0-mini

nuscenes-devkit and this project read the result with the code they read the real one with. Scenes carry
nuScenes' own scene names, so that its split lists apply: up to ten scenes are written as v1.0-mini, more as
v1.0-trainval. Besides what nuScenes has, ``occ3d/`` and ``openocc_v2/`` hold occupancy labels and
``toy_truth/`` the true object of every voxel. The same arguments give the same files, byte for byte, on the
same kind of device.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli import run_main  # noqa: E402
from lib.errors import UserError  # noqa: E402
from tools.toy.generate import LABEL_SETS, Options, default_workers, generate  # noqa: E402
from tools.toy.names import SPLITS, VERSIONS, plan_scenes  # noqa: E402


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, help='data root to write; new or empty')
    parser.add_argument('--scenes', type=int, default=10, help='number of scenes (default 10)')
    parser.add_argument('--keyframes', type=int, default=10, help='keyframes per scene, 2 a second (default 10)')
    parser.add_argument(
        '--image-size',
        default='800x450',
        metavar='WxH',
        help='image size; calibration is scaled to it (default 800x450; nuScenes: 1600x900)',
    )
    parser.add_argument('--no-sweeps', action='store_true', help='keyframes only: no 12 Hz images, no 20 Hz scans')
    parser.add_argument('--seed', type=int, default=0, help='another seed makes another world (default 0)')
    parser.add_argument(
        '--split',
        choices=SPLITS,
        default='both',
        help='splits that the scenes belong to (default both: about one in five is val)',
    )
    parser.add_argument('--version', choices=VERSIONS, help='default: v1.0-mini if its scenes suffice')
    parser.add_argument(
        '--label-sets',
        default='occ3d,openocc_v2',
        metavar='A,B',
        help='occupancy labels to write (default occ3d,openocc_v2)',
    )
    parser.add_argument(
        '--device',
        choices=('auto', 'cpu', 'cuda'),
        default='auto',
        help='where images are traced (default: a GPU if there is one)',
    )
    parser.add_argument('--workers', type=int, help='processes (default: all cores)')
    parser.add_argument(
        '--overwrite',
        action='store_true',
        help='write into a folder that is not empty: replaces files of the same names only',
    )
    parser.add_argument('--debug', action='store_true', help='show tracebacks')
    return parser.parse_args()


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
        raise UserError('--label-sets: {!r} is unknown; choose from {}'.format(unknown[0], ', '.join(LABEL_SETS)))
    return names


def choose_device(name):
    """'cpu' or 'cuda'."""
    if name == 'cpu':
        return name
    import torch

    if torch.cuda.is_available():
        return 'cuda'
    if name == 'cuda':
        raise UserError('--device cuda, but PyTorch finds no GPU; use --device cpu')
    return 'cpu'


def check_out(out, overwrite):
    """The data root must be a folder that is new or empty, unless the user says otherwise."""
    if out.exists() and not out.is_dir():
        raise UserError(f'--out {out} is a file; give a folder')
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(
            f'--out {out} is not empty; give a new folder, or --overwrite to replace files of the '
            'same names in it (nothing is deleted)'
        )


def check_at_least_one(**numbers):
    """Counts must be positive."""
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UserError('--%s must be at least 1, got %d' % (name, value))


def show_progress(results, total):
    """Wrap an iterator of results in a progress bar with the time that remains."""
    from tqdm import tqdm

    return tqdm(results, total=total, desc='toy nuScenes', unit='keyframe', mininterval=1.0)


def main():
    args = parse_args()
    check_at_least_one(scenes=args.scenes, keyframes=args.keyframes, workers=args.workers)
    if args.seed < 0:
        raise UserError('--seed must not be negative, got %d' % args.seed)
    plan = plan_scenes(args.scenes, args.split, args.version)
    size, label_sets = parse_size(args.image_size), parse_label_sets(args.label_sets)
    check_out(args.out, args.overwrite)
    device = choose_device(args.device)
    generate(
        Options(
            out=args.out,
            plan=plan,
            keyframes=args.keyframes,
            size=size,
            sweeps=not args.no_sweeps,
            seed=args.seed,
            workers=args.workers or default_workers(device),
            device=device,
            label_sets=label_sets,
        ),
        show_progress,
    )
    print(
        '%s: %d scenes (train: %d, val: %d, test: %d) of %d keyframes, tables in %s'
        % (
            args.out,
            len(plan.names),
            len(plan.train),
            len(plan.val),
            len(plan.test),
            args.keyframes,
            args.out / plan.version,
        )
    )


if __name__ == '__main__':
    run_main(main)
