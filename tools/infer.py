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

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli import run_main  # noqa: E402


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', required=True)
    parser.add_argument('--weights', required=True, help='checkpoint of the same model')
    parser.add_argument('--override', nargs='+', default=[], metavar='KEY=VALUE')
    parser.add_argument('--data-root', help='nuScenes-format folder (default: that of the config)')
    parser.add_argument('--infos', help='info pickle, absolute or in the data root (default: data.test.ann_file)')
    parser.add_argument('--own', metavar='JSON', help='own images and calibration instead of nuScenes')
    parser.add_argument('--out', required=True, help='output folder; files of the same samples are replaced')
    parser.add_argument('--pictures', action='store_true', help='also draw every sample')
    parser.add_argument('--max-samples', type=int, help='at most so many samples (the first)')
    parser.add_argument('--amp', choices=('fp16', 'bf16'), help='mixed precision (default: float32)')
    parser.add_argument(
        '--tf32', choices=('on', 'off'), help='TF32 in convolutions and matrix products (default: in convolutions)'
    )
    parser.add_argument('--device', choices=('cpu', 'cuda'), help='default: cuda if there is one')
    parser.add_argument(
        '--trust-weights', action='store_true', help='let the checkpoint run code; for known sources only'
    )
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
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
    return build_dataset(dict(data_cfg, data_root=own.data_root, ann_file=infos_path), task), task


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
    return build_dataset(data_cfg, task), task


def load_model(args, cfg, task, device):
    from lib.checkpoint import load_model_weights
    from lib.run.numerics import convert_weights
    from models import build_model

    model = build_model(cfg.model, task)
    load_model_weights(model, args.weights, trust=args.trust_weights)
    return convert_weights(model.to(device).eval(), args.amp)


def predict_all(model, dataset, device, amp, out, workers):
    """Predict every sample in order, write its file, and yield (index, prediction)."""
    from lib.batch import to_device
    from lib.io import path_inside
    from lib.prediction import save_prediction
    from lib.run.loading import make_loader, read_batches
    from lib.run.numerics import autocast
    from loaders import collate

    start = time.time()
    loader = make_loader(dataset, [[index] for index in range(len(dataset))], collate, workers, device)
    for index, batch in enumerate(read_batches(loader)):
        batch = to_device(batch, device)
        with autocast(amp, device):
            (prediction,) = model(
                img=batch['img'],
                lidar2img=batch['lidar2img'],
                ego2lidar=batch['ego2lidar'],
                img_metas=batch['img_metas'],
                return_loss=False,
            )
        save_prediction(path_inside(out, dataset.sample_token(index) + '.npz'), prediction)
        left = (time.time() - start) / (index + 1) * (len(dataset) - index - 1)
        print('%d/%d  %s  %.0f s left' % (index + 1, len(dataset), dataset.sample_token(index), left), flush=True)
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
    from lib.cli import check_files

    check_files(args.config, None, args.weights)
    from lib.config import load_config
    from lib.io import write_json
    from lib.prediction import to_dense, write_record
    from lib.run.numerics import check_precision, set_tf32
    from lib.run.processes import pick_device
    from lib.task import Task
    from tools.visualize import draw_sample, save_image

    cfg = load_config(args.config, args.override)
    device = pick_device(args.device)
    check_precision(args.amp, device)
    set_tf32(args.tf32)
    os.makedirs(os.path.join(args.out, 'predictions'), exist_ok=True)
    dataset, task = make_dataset(args, cfg, Task.from_config(cfg.task))
    folder, entries = os.path.join(args.out, 'predictions'), []
    write_record(folder, task, config=args.config, weights=args.weights, split=args.own or args.infos or 'test')
    model = load_model(args, cfg, task, device)
    for index, prediction in predict_all(model, dataset, device, args.amp, folder, cfg.data.get('workers_per_gpu', 0)):
        entries.append(index_entry(dataset, index, prediction, task.label_set.free_id))
        if args.pictures:
            save_image(
                os.path.join(args.out, 'pictures', f'{dataset.sample_token(index)}.png'),
                draw_sample(dataset, index, task, to_dense(prediction, task)),
            )
    write_json(
        os.path.join(args.out, 'index.json'),
        dict(
            config=args.config,
            weights=args.weights,
            classes=list(task.label_set.class_names),
            point_cloud_range=list(task.point_cloud_range),
            voxel_size=task.voxel_size,
            samples=entries,
        ),
    )
    print('wrote %d predictions to %s' % (len(entries), folder))


if __name__ == '__main__':
    run_main(main)
