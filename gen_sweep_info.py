#!/usr/bin/env python
"""Make the info files that training and evaluation read, with camera sweeps, from the nuScenes tables.

    python gen_sweep_info.py --data-root data/nuscenes --version v1.0-trainval
    python gen_sweep_info.py --data-root data/nuscenes --version v1.0-test
    python gen_sweep_info.py --data-root data/nuscenes --version v1.0-mini

    python gen_sweep_info.py --version v1.0-trainval --only-present --out-prefix part_     # scenes that are here
    python gen_sweep_info.py --version v1.0-trainval --scenes scene-0001 scene-0002 --out-prefix two_

writes nuscenes_infos_{train,val,test}_sweep.pkl there. With --from-infos, existing
nuscenes_infos_{split}.pkl of MMDetection3D 1.0 are extended instead. Files of another version are never replaced
unless --overwrite says so.
"""

from lib.cli import make_parser, run_main, whole_number
from lib.io import expand_path


def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add('--data-root', type=expand_path, default='data/nuscenes', help='nuScenes folder (default: %(default)s)')
    add(
        '--version',
        default='v1.0-trainval',
        help='table folder: v1.0-trainval, v1.0-mini, v1.0-test or another (default: %(default)s)',
    )
    add('--out', type=expand_path, help='folder of the info files (default: the data root)')
    add('--out-prefix', default='', metavar='TEXT', help='what the names of the info files begin with, e.g. mini_')
    add('--scenes', nargs='+', metavar='NAME', help='only these scenes')
    add('--only-present', action='store_true', help='only scenes of which all images exist')
    add('--overwrite', action='store_true', help='replace files of another version, or with more scenes')
    add('--from-infos', type=expand_path, metavar='DIR', help='extend the nuscenes_infos_{split}.pkl of this folder')
    add('--processes', type=whole_number(1), help='worker processes (default: all cores)')
    return parser.parse_args()


def main():
    args = parse_args()
    from loaders.prepare.sweep_infos import Choice, write_sweep_infos

    choice = Choice(args.scenes, args.only_present, args.out_prefix, args.overwrite)
    out = args.out or args.data_root
    for item in write_sweep_infos(args.data_root, args.version, out, args.from_infos, args.processes, choice):
        print(f'{item.path}: {item.scenes} scenes, {item.keyframes} keyframes')


if __name__ == '__main__':
    run_main(main)
