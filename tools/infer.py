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
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli import check_files, make_parser, run_main  # noqa: E402

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


def own_dataset(path, data_cfg, task, out):
    """(dataset, task) of a JSON file; its infos are kept in the output folder."""
    from lib.io import save_pickle
    from loaders import build_dataset
    from loaders.own_data import read_own_data

    own = read_own_data(path)
    infos_path = os.path.abspath(os.path.join(out, 'own_infos.pkl'))
    save_pickle(infos_path, dict(infos=own.infos, metadata=dict(version='own')))
    task = replace(task, cameras=own.cameras)
    changes = dict(data_root=own.data_root, ann_file=infos_path, allow_missing_cameras=True)
    return build_dataset(dict(data_cfg, **changes), task), task


def make_dataset(args, cfg, task):
    """(dataset without labels, task) that the arguments ask for."""
    from loaders import build_dataset

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
    return build_dataset(data_cfg, task), task


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


def recorded_override(args, dataset, task):
    """Changes of the config that make its data.test the data predicted here, for whoever reads the predictions."""
    changes = list(args.override)
    if args.own or args.data_root:
        changes.append(f'data.test.data_root={os.path.abspath(str(dataset.data_root))!r}')
    if args.own or args.infos:
        changes.append(f'data.test.ann_file={os.path.abspath(str(dataset.ann_file))!r}')
    if args.max_samples:
        changes.append(f'data.test.max_samples={args.max_samples}')
    if args.own:
        changes.append(f'task.cameras={list(task.cameras)!r}')
    return changes


def predict_all(model, dataset, device, amp, out, workers):
    """Predict every sample in order, write its file, and yield (index, prediction)."""
    from lib.io import path_inside
    from lib.prediction import save_prediction
    from lib.run.evaluation import predict
    from lib.run.loading import make_loader, read_batches
    from lib.run.log import Countdown
    from loaders import collate

    countdown = Countdown(len(dataset))
    loader = make_loader(dataset, [[index] for index in range(len(dataset))], collate, workers, device)
    for index, batch in enumerate(read_batches(loader)):
        (prediction,) = predict(model, batch, device, amp)
        token = dataset.sample_token(index)
        save_prediction(path_inside(out, f'{token}.npz'), prediction)
        countdown.step()
        print(f'{index + 1}/{len(dataset)}  {token}  {countdown.text()} left', flush=True)
        yield index, prediction


def index_entry(dataset, index, prediction, free_id):
    """What index.json says about a sample."""
    info = dataset.info(index)
    labels = prediction['pano_sem' if 'pano_sem' in prediction else 'sem_pred']
    return dict(
        token=info['token'],
        scene=info.get('scene_name') or info.get('scene_token'),
        timestamp_us=int(info['timestamp']),
        file='predictions/{}.npz'.format(info['token']),
        voxels=int((labels != free_id).sum()),
    )


def main():
    args = parse_args()
    check_files(args.config, None, args.weights)
    from lib.config import load_config
    from lib.io import write_json
    from lib.prediction import to_dense, write_record
    from lib.run import read_task
    from lib.run.evaluation import load_for_inference
    from lib.run.processes import pick_device
    from models import build_model
    from tools.drawing.figure import draw_frame
    from tools.drawing.frames import read_frame
    from tools.drawing.pictures import save_image

    cfg, device = load_config(args.config, args.override), pick_device(args.device)
    folder = os.path.join(args.out, 'predictions')
    os.makedirs(folder, exist_ok=True)
    dataset, task = make_dataset(args, cfg, read_task(cfg))
    write_record(folder, task, args.config, args.weights, 'test', recorded_override(args, dataset, task))
    model, _ = load_for_inference(build_model, cfg, task, args, device)
    entries, workers = [], cfg.data.get('workers_per_gpu', 0) if args.workers is None else args.workers
    for index, prediction in predict_all(model, dataset, device, args.amp, folder, workers):
        entries.append(index_entry(dataset, index, prediction, task.label_set.free_id))
        if args.pictures:
            picture = os.path.join(args.out, 'pictures', f'{dataset.sample_token(index)}.png')
            save_image(picture, draw_frame(read_frame(dataset, index, to_dense(prediction, task)), task))
    about = dict(config=args.config, weights=args.weights, classes=list(task.label_set.class_names))
    volume = dict(point_cloud_range=list(task.point_cloud_range), voxel_size=task.voxel_size)
    write_json(os.path.join(args.out, 'index.json'), dict(about, **volume, samples=entries))
    print(f'wrote {len(entries)} predictions to {folder}')


if __name__ == '__main__':
    run_main(main)
