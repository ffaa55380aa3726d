#!/usr/bin/env python
"""Make panoptic labels: Occ3D's label files with an instance id per voxel, from the boxes of the info files.

    python gen_instance_info.py --data-root data/nuscenes --version v1.0-trainval
    python gen_instance_info.py --data-root data/nuscenes --version v1.0-mini --out elsewhere/occ3d_panoptic
    python gen_instance_info.py --config my_config.py        # labels, classes, grid: those of its data.train and task

Needs the info files that gen_sweep_info.py writes. May be stopped and started again: files that are there
are kept.
"""

import os

from lib.classes import LABEL_SETS
from lib.cli import make_parser, real_number, run_main, whole_number
from lib.config import load_config
from lib.errors import DataError
from lib.io import expand_path, find_under
from lib.task import OCC3D_RANGE, Task

DATA_ROOT, ENDING = 'data/nuscenes', '_panoptic'


def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add('--config', help='take data root, labels, classes, grid and kind of the files from this config')
    add('--data-root', type=expand_path, help=f'nuScenes folder (default: {DATA_ROOT})')
    add('--version', default='v1.0-trainval', help='nuScenes version of the info files (default: %(default)s)')
    add('--occ-gt-root', help='labels to start from, in the data root (default: occ3d)')
    add('--out', type=expand_path, help='folder of the new labels (default: occ3d_panoptic in the data root)')
    add('--label-set', default='occ3d', choices=sorted(LABEL_SETS), help='classes (default: %(default)s)')
    add(
        '--point-cloud-range',
        nargs=6,
        type=real_number(),
        default=OCC3D_RANGE,
        metavar=('X0', 'Y0', 'Z0', 'X1', 'Y1', 'Z1'),
        help='volume of the labels, metres',
    )
    add('--voxel-size', type=real_number(above=0), default=Task.voxel_size, help='metres (default: %(default)s)')
    add(
        '--infos',
        nargs='+',
        metavar='PKL',
        help='info files (default: nuscenes_infos_{train,val}_sweep.pkl in the data root)',
    )
    add('--overwrite', action='store_true', help='make files anew that are there already')
    add('--processes', type=whole_number(1), help='worker processes (default: all cores)')
    return parser.parse_args()


def main():
    args = parse_args()
    from loaders.prepare.panoptic_labels import write_panoptic_labels

    task = Task(args.label_set, point_cloud_range=args.point_cloud_range, voxel_size=args.voxel_size)
    section = {}
    if args.config:
        cfg = load_config(args.config)
        task, section = Task.from_config(cfg.task).as_in_files(), (cfg.get('data') or {}).get('train') or {}
    root = args.data_root or expand_path(section.get('data_root') or DATA_ROOT)
    base = (section.get('occ_gt_root') or 'occ3d').rstrip('/')
    base = base[: -len(ENDING)] if base.endswith(ENDING) else base  # of a config for what is made here
    labels, out = args.occ_gt_root or base, args.out or os.fspath(find_under(root, base + ENDING))
    result = write_panoptic_labels(root, args.version, labels, out, task, args.infos, args.overwrite, args.processes)
    print(f'{out}: {result.written} label files written, {result.kept} were there already, {len(result.failed)} failed')
    if result.failed:
        raise DataError(f'{len(result.failed)} keyframes have no usable label; the first: {result.failed[0]}')


if __name__ == '__main__':
    run_main(main)
