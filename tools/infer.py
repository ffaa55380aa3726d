"""Predict occupancy without ground truth: on any split of a nuScenes-format folder, or on your own images.

    python tools/infer.py --config C --weights W --out DIR                       # data.test of the config
    python tools/infer.py --config C --weights W --out DIR --data-root data/nuscenes \\
        --infos nuscenes_infos_test_sweep.pkl                                    # another info file
    python tools/infer.py --config C --weights W --out DIR --own my_data.json --pictures

Own data are images, their calibration and the vehicle's poses in one JSON file; loaders/own_data.py and
docs/own_data.md describe it. Cameras may be any number, named as you like.

Writes DIR/predictions/<sample-token>.npz (arrays sem_pred, occ_loc; panoptic models also pano_inst, pano_sem),
DIR/index.json with one entry per sample, and with --pictures DIR/pictures/<sample-token>.png.
"""

import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli import check_files, make_parser, run_main  # noqa: E402

SAVING_THREADS = 4
SHARED = ('config', 'override', 'max-samples', 'amp', 'tf32', 'device', 'workers', 'trust-weights')


def parse_args(argv=None):
    parser = make_parser(__doc__, *SHARED)
    add = parser.add_argument
    add('--weights', required=True, help='checkpoint of the same model')
    add('--data-root', help='nuScenes-format folder (default: that of the config)')
    add('--infos', help='info pickle, absolute or in the data root (default: data.test.ann_file)')
    add('--own', metavar='JSON', help='own images and calibration instead of nuScenes')
    add('--out', required=True, help='output folder; files of the same samples are replaced')
    add('--pictures', action='store_true', help='also draw every sample')
    return parser.parse_args(argv)


def make_dataset(args, cfg, task):
    """Dataset without labels that the arguments ask for."""
    from loaders import build_dataset
    from tools.api.predictor import own_dataset

    data_cfg = dict(cfg.data.test, occ_gt_root=None, test_mode=True)
    if args.max_samples:
        data_cfg['max_samples'] = args.max_samples
    if args.own:
        return own_dataset(args.own, data_cfg, task, args.out)
    if args.data_root:
        data_cfg['data_root'] = args.data_root
    if args.infos:
        data_cfg['ann_file'] = args.infos
    check_infos(data_cfg['data_root'], data_cfg['ann_file'])
    return build_dataset(data_cfg, task)


def check_infos(data_root, ann_file):
    """Raise UserError if the info file is not there, naming those that are."""
    from lib.errors import UserError

    path = os.path.join(data_root, ann_file)
    if not os.path.isfile(path):
        there = (
            sorted(name for name in os.listdir(data_root) if name.endswith('.pkl')) if os.path.isdir(data_root) else []
        )
        choice = f'choose another with --infos (there: {", ".join(there)})' if there else 'name one with --infos'
        raise UserError(f'info file {path} does not exist; {choice}, or make it with gen_sweep_info.py')


def recorded_override(args, dataset):
    """Changes of the config that make its data.test the data predicted here, for whoever reads the predictions."""
    changes = list(args.override)
    if args.own or args.data_root:
        changes.append(f'data.test.data_root={os.path.abspath(str(dataset.data_root))!r}')
    if args.own or args.infos:
        changes.append(f'data.test.ann_file={os.path.abspath(str(dataset.ann_file))!r}')
    if args.max_samples:
        changes.append(f'data.test.max_samples={args.max_samples}')
    if args.own:
        changes.append(f'task.cameras={list(dataset.task.cameras)!r}')
    return changes


def index_entry(info, occupancy):
    """What index.json says about a sample."""
    return dict(
        token=info['token'],
        scene=info.get('scene_name') or info.get('scene_token'),
        timestamp_us=int(info['timestamp']),
        file='predictions/{}.npz'.format(info['token']),
        voxels=len(occupancy.voxels),
    )


def finish(waiting, most):
    """Wait until at most so many of the oldest-first futures are unfinished; raises what one of them raised."""
    while len(waiting) > most:
        waiting.popleft().result()


def main():
    args = parse_args()
    check_files(args.config, None, args.weights)
    from lib.config import load_config
    from lib.io import make_folder, write_json
    from lib.prediction import write_record
    from lib.run import read_task
    from lib.run.loading import count_workers
    from lib.run.log import Countdown
    from tools.api import SparseOccPredictor
    from tools.drawing.figure import draw_frame
    from tools.drawing.frames import read_frame
    from tools.drawing.pictures import save_image

    cfg = load_config(args.config, args.override)
    folder = os.path.join(args.out, 'predictions')
    make_folder(folder)
    dataset = make_dataset(args, cfg, read_task(cfg))
    task = dataset.task
    write_record(folder, task, args.config, args.weights, 'test', recorded_override(args, dataset))
    predictor = SparseOccPredictor(
        cfg, args.weights, args.device, args.amp, tf32=args.tf32, trust_weights=args.trust_weights
    )
    entries, waiting, workers = [], deque(), count_workers(cfg, args.workers)
    countdown = Countdown(len(dataset))
    with ThreadPoolExecutor(SAVING_THREADS) as savers:  # the next prediction need not wait for files
        for index, occupancy in predictor.predict_dataset(dataset, workers):
            waiting.append(savers.submit(occupancy.save, folder))
            finish(waiting, 2 * SAVING_THREADS)
            entries.append(index_entry(dataset.info(index), occupancy))
            countdown.step()
            print(f'{index + 1}/{len(dataset)}  {occupancy.name}  {countdown.text()} left', flush=True)
            if args.pictures:
                picture = os.path.join(args.out, 'pictures', f'{occupancy.name}.png')
                save_image(picture, draw_frame(read_frame(dataset, index, occupancy.dense), task))
        finish(waiting, 0)
    about = dict(config=args.config, weights=args.weights, classes=list(task.label_set.class_names))
    volume = dict(point_cloud_range=list(task.point_cloud_range), voxel_size=task.voxel_size)
    write_json(os.path.join(args.out, 'index.json'), dict(about, **volume, samples=entries))
    pictures = f', pictures to {os.path.join(args.out, "pictures")}' if args.pictures else ''
    print(f'wrote {len(entries)} predictions to {folder}{pictures}')


if __name__ == '__main__':
    run_main(main)
