#!/usr/bin/env python
"""Make panoptic labels: Occ3D's label files with an instance id per voxel, from the boxes of the info files.

    python gen_instance_info.py --data-root data/nuscenes --version v1.0-trainval
    python gen_instance_info.py --data-root data/nuscenes --version v1.0-mini --out elsewhere/occ3d_panoptic
    python gen_instance_info.py --config my_config.py --occ-gt-root my_labels --out data/nuscenes/my_panoptic

Needs the info files that gen_sweep_info.py writes. May be stopped and started again: files that are there
are kept.
"""

import os

from lib.classes import LABEL_SETS
from lib.cli import make_parser, run_main
from lib.config import load_config
from lib.errors import DataError
from lib.io import expand_path
from lib.task import OCC3D_RANGE, Task


def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add('--data-root', type=expand_path, default='data/nuscenes', help='nuScenes folder (default: %(default)s)')
    add('--version', default='v1.0-trainval', help='nuScenes version of the info files (default: %(default)s)')
    add('--occ-gt-root', default='occ3d', help='labels to start from, in the data root (default: %(default)s)')
    add('--out', type=expand_path, help='folder of the new labels (default: occ3d_panoptic in the data root)')
    add('--label-set', default='occ3d', choices=sorted(LABEL_SETS), help='classes (default: %(default)s)')
    add(
        '--point-cloud-range',
        nargs=6,
        type=float,
        default=OCC3D_RANGE,
        metavar=('X0', 'Y0', 'Z0', 'X1', 'Y1', 'Z1'),
        help='volume of the labels, metres',
    )
    add('--config', help='take classes, range, voxel size and kind of the files from the task of this config')
    add('--voxel-size', type=float, default=Task.voxel_size, help='metres (default: %(default)s)')
    add(
        '--infos',
        nargs='+',
        metavar='PKL',
        help='info files (default: nuscenes_infos_{train,val}_sweep.pkl in the data root)',
    )
    add('--overwrite', action='store_true', help='make files anew that are there already')
    add('--processes', type=int, help='worker processes (default: all cores)')
    return parser.parse_args()


def main():
    args = parse_args()
    from loaders.prepare.panoptic_labels import write_panoptic_labels

    task = Task(args.label_set, point_cloud_range=args.point_cloud_range, voxel_size=args.voxel_size)
    if args.config:
        task = Task.from_config(load_config(args.config).task)
        task = task.as_in_files()
    out = args.out or os.path.join(args.data_root, 'occ3d_panoptic')
    result = write_panoptic_labels(
        args.data_root, args.version, args.occ_gt_root, out, task, args.infos, args.overwrite, args.processes
    )
    print(f'{out}: {result.written} label files written, {result.kept} were there already, {len(result.failed)} failed')
    if result.failed:
        raise DataError(f'{len(result.failed)} keyframes have no usable label; the first: {result.failed[0]}')


if __name__ == '__main__':
    run_main(main)
