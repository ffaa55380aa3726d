"""What a perfect classifier would score if it could only speak of some voxels: upper bounds of RayIoU and mIoU.

    python tools/upper_bounds.py --config configs/toybench/v1.1.py
    python tools/upper_bounds.py --config configs/toybench/v1.1.py --weights outputs/RUN/latest.pth

Predictions are the labels themselves, cut to what the cameras see (``mask_camera``), and to the blocks that each
stage of the voxel decoder keeps: the fullest ones, as many as ``topk_testing`` allows, or with ``--weights``
those that the trained model keeps. What is cut away counts as free.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.cli import check_files, make_parser, run_main  # noqa: E402

_SCALES = (4, 2, 1)  # voxels per edge of the blocks that the stages keep


def parse_args(argv=None):
    parser = make_parser(__doc__, 'config', 'override', 'max-samples', 'device', 'amp', 'tf32', 'trust-weights')
    parser.add_argument('--weights', help='cut to what this checkpoint keeps; default: to the fullest blocks')
    parser.add_argument('--json', help='write the scores to this file as well')
    return parser.parse_args(argv)


def fullest_blocks(occupied, scale: int, count: int):
    """bool [X, Y, Z]: voxels of the ``count`` blocks of edge ``scale`` that hold most of ``occupied``."""
    import numpy as np

    x, y, z = (n // scale for n in occupied.shape)
    held = occupied.reshape(x, scale, y, scale, z, scale).sum(axis=(1, 3, 5)).reshape(-1)
    keep = np.zeros(held.shape, bool)
    keep[np.argsort(-held, kind='stable')[:count]] = True
    return spread(keep.reshape(x, y, z), scale)


def spread(blocks, scale: int):
    """Blocks [x, y, z] as voxels [x * scale, y * scale, z * scale]."""
    return blocks.repeat(scale, 0).repeat(scale, 1).repeat(scale, 2)


def kept_by_model(model, batch, task):
    """bool [X, Y, Z] of each stage: what the model keeps for a sample."""
    import numpy as np

    raw = model.predict_raw(batch['img'], batch['lidar2img'], batch['ego2lidar'], batch['img_metas'])
    masks = []
    for stage in raw.output.stages:
        blocks = np.zeros([n // stage.scale for n in task.grid_shape], bool)
        blocks[tuple(stage.coords[0].cpu().numpy().T)] = True
        masks.append(spread(blocks, stage.scale))
    return masks


def cuts(truth, kept, free_id):
    """{name: bool [X, Y, Z]} of what each bound may speak of; ``kept`` holds a volume per stage."""
    found = {}
    if 'mask_camera' in truth:
        found['seen by cameras'] = truth['mask_camera'] > 0
    for number, mask in enumerate(kept):
        found[f'kept by stage {number}'] = mask
    if 'mask_camera' in truth:
        found['kept by the last, seen'] = kept[-1] & found['seen by cameras']
    return found


def batches(cfg, dataset, device):
    """Batches of one sample each, on the device."""
    from lib.run.loading import count_workers, make_loader, read_batches, to_device
    from loaders import collate

    order = [[index] for index in range(len(dataset))]
    loader = make_loader(dataset, order, collate, count_workers(cfg), device)
    return (to_device(batch, device) for batch in read_batches(loader))


def kept_voxels(args, cfg, dataset, task):
    """Per sample a mask of the voxels that each stage keeps: by the model if there are weights, else the fullest."""
    import torch

    from lib.run.evaluation import load_for_inference
    from lib.run.processes import pick_device
    from models import build_model

    if not args.weights:
        topk = cfg.model.pts_bbox_head.transformer.topk_testing
        for index in range(len(dataset)):
            occupied = dataset.ground_truth(index)['semantics'] != task.label_set.free_id
            yield [fullest_blocks(occupied, scale, count) for scale, count in zip(_SCALES, topk)]
        return
    device = pick_device(args.device)
    model, _ = load_for_inference(build_model, cfg, task, args, device)
    for batch in batches(cfg, dataset, device):
        with torch.no_grad():
            kept = kept_by_model(model, batch, task)
        yield kept


def main():
    args = parse_args()
    check_files(args.config, None, args.weights)
    import numpy as np

    from lib.config import load_config
    from lib.io import check_outputs, write_json
    from lib.metrics import Evaluator
    from lib.run import read_task
    from loaders import build_dataset

    check_outputs(args.json)
    cfg = load_config(args.config, args.override)
    task = read_task(cfg)
    dataset = build_dataset(dict(cfg.data.val, max_samples=args.max_samples), task)
    free_id, stats = task.label_set.free_id, {}
    for index, kept in enumerate(kept_voxels(args, cfg, dataset, task)):
        truth = dataset.ground_truth(index)
        occupied = truth['semantics'] != free_id
        for name, mask in cuts(truth, kept, free_id).items():
            evaluator, recall = stats.setdefault(name, (Evaluator(task, ('ray_iou', 'miou')), []))
            volume = np.where(mask, truth['semantics'], free_id).astype(np.uint8)
            prediction = dict(semantics=volume, instances=np.zeros(volume.shape, np.int16))
            evaluator.update(prediction, truth, dataset.ray_origins(index), dataset.sample_token(index))
            recall.append((mask & occupied).sum() / max(occupied.sum(), 1))
    result = {}
    print(f'{len(dataset)} samples, percent        recall  RayIoU    @1    @2    @4   mIoU')
    for name, (evaluator, recall) in stats.items():
        scores = evaluator.compute().as_dict()
        result[name] = dict(scores, recall=float(np.mean(recall)))
        columns = [result[name][key] for key in ('recall', 'RayIoU', 'RayIoU@1', 'RayIoU@2', 'RayIoU@4', 'mIoU')]
        print(f'{name:24s}' + ''.join(f'{100 * value:8.2f}' for value in columns))
    if args.json:
        write_json(args.json, result)
        print(f'wrote {args.json}')


if __name__ == '__main__':
    run_main(main)
