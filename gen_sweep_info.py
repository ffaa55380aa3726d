#!/usr/bin/env python
"""Make the info files that training and evaluation read, with camera sweeps, from the nuScenes tables.

    python gen_sweep_info.py --data-root data/nuscenes --version v1.0-trainval
    python gen_sweep_info.py --data-root data/nuscenes --version v1.0-test
    python gen_sweep_info.py --data-root data/nuscenes --version v1.0-mini

writes nuscenes_infos_{train,val,test}_sweep.pkl there. With --from-infos, existing
nuscenes_infos_{split}.pkl of MMDetection3D 1.0 are extended instead.
"""

import argparse

from lib.cli import run_main


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-root', default='data/nuscenes', help='nuScenes folder (default: %(default)s)')
    parser.add_argument(
        '--version',
        default='v1.0-trainval',
        help='table folder: v1.0-trainval, v1.0-mini, v1.0-test or another (default: %(default)s)',
    )
    parser.add_argument('--out', help='folder of the info files (default: the data root)')
    parser.add_argument('--from-infos', metavar='DIR', help='extend the nuscenes_infos_{split}.pkl of this folder')
    parser.add_argument('--processes', type=int, help='worker processes (default: all cores)')
    parser.add_argument('--debug', action='store_true', help='show tracebacks')
    return parser.parse_args()


def main():
    args = parse_args()
    from loaders.prepare.sweep_infos import write_sweep_infos

    written = write_sweep_infos(
        args.data_root, args.version, args.out or args.data_root, args.from_infos, args.processes
    )
    for item in written:
        print(f'{item.path}: {item.scenes} scenes, {item.keyframes} keyframes')


if __name__ == '__main__':
    run_main(main)
