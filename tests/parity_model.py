"""Run golden files of the model (``*_semantic.npz``, ``*_panoptic.npz``, ``post*.npz``): how far are we off?

Everything about a case comes from the file and from the config of its release, so that files never seen
before can be checked.

Tolerances. Both sides compute in float32 and add in different orders. Relative to the largest value of an
array, that leaves about 1e-5 after the network's some hundred layers, so 1e-3 for logits and 1e-4 for losses
(sums over many voxels, better conditioned) are far from it and yet far below what any change of formula
causes. Gradients pass every layer twice and contain near-cancelling sums (distance reach, sampling offsets),
hence 1e-2 for their norms. On a GPU, those of sampling offsets have 5e-2: the slope of an image jumps where a
point crosses the border of a pixel, and one point does so here and there: noise of 1e-5 in the queries does it on
the CPU, too (seen: 2.7e-2, the very value of a GPU). Coordinates must be equal: the files' weights keep every
decision away from rounding. The final arg max has no such promise, so two voxels in a thousand may differ.
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple

import numpy as np
import torch

from lib.config import load_config
from lib.targets import OccupancyTargets
from lib.task import Task
from models import build_model
from models.head import merge_panoptic, merge_semantic

ROOT = Path(__file__).resolve().parent.parent
_CONFIGS = {'1.0': 'r50_nuimg_704x256_8f', '1.1': 'r50_nuimg_704x256_8f_v1.1'}
_BOTTLENECK_DEPTH = 50  # ResNets from this depth on have 4 times the channels

FEATURES = 1e-3
LOGITS = 1e-3
LOSSES = 1e-4
GRADIENTS = 1e-2
SLOPES = 5e-2
LABELS = 2e-3


class Deviation(NamedTuple):
    """One comparison.

    quantity   what was compared, e.g. 'voxel logits'
    name       which array
    value      deviation: relative to the largest value, or share of unequal entries
    tolerance  largest acceptable value
    """

    quantity: str
    name: str
    value: float
    tolerance: float


class PatternDraws:
    """The golden files' draws: flat index i gives frac(golden ratio * (i + 1)), whatever the call."""

    def fractions(self, batch, queries, count, device):
        return _pattern((queries, count)).to(device).expand(batch, queries, count)

    def positions(self, batch, queries, count, device):
        return _pattern((queries, count, 3)).to(device).expand(batch, queries, count, 3)


def _pattern(shape) -> torch.Tensor:
    index = np.arange(int(np.prod(shape)), dtype=np.float64)
    return torch.from_numpy(np.modf(0.6180339887498949 * (index + 1))[0].astype(np.float32)).view(shape)


def seed_weights(model: torch.nn.Module, seed: int) -> None:
    """Fill parameters and running statistics by the recipe of the golden files."""
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for name in sorted(state):
        if state[name].is_floating_point():
            state[name] = _seeded(name, state[name].shape, generator)
    model.load_state_dict(state)


def _seeded(name: str, shape, generator: torch.Generator) -> torch.Tensor:
    if name.endswith('running_var'):
        return torch.rand(shape, generator=generator) * 0.5 + 0.75
    if name.endswith('running_mean'):
        return torch.randn(shape, generator=generator) * 0.05
    if len(shape) == 1:
        centred = name.endswith('weight') and any(
            part in name for part in ('norm', 'bn', 'downsample.1', 'position_encoder.1', 'position_encoder.4')
        )
        return torch.randn(shape, generator=generator) * 0.05 + (1.0 if centred else 0.0)
    return torch.randn(shape, generator=generator) / float(np.sqrt(np.prod(shape[1:])))


class ModelCase:
    """A golden file of the small model, and our model built and seeded for it."""

    def __init__(self, path: Path, device: str = 'cpu'):
        self.path, self.device = Path(path), torch.device(device)
        with np.load(str(path), allow_pickle=False) as file:
            self.arrays = {name: file[name] for name in file.files}
        self.meta = json.loads(str(self.arrays['meta']))
        self.model = self._build().to(self.device)

    @property
    def samples(self) -> range:
        return range(self.arrays['img'].shape[0])

    def _build(self):
        meta = self.meta
        name = _CONFIGS[meta['release']] + ('_pano' if meta['panoptic'] else '') + '.py'
        cfg = load_config(str(ROOT / 'configs' / name), [])
        model_cfg, depth = deepcopy(cfg.model), int(meta['backbone'].split('-')[-1])
        model_cfg['data_aug']['img_color_aug'] = False
        model_cfg['img_backbone'].update(depth=depth, with_cp=False)
        expansion = 4 if depth >= _BOTTLENECK_DEPTH else 1
        model_cfg['img_neck'].update(in_channels=[expansion * c for c in (64, 128, 256, 512)])
        model_cfg['pts_bbox_head']['transformer'].update(
            dropout=0.0, **{key: meta[key] for key in ('num_queries', 'num_layers', 'topk_training', 'topk_testing')}
        )
        task = Task.from_config(dict(cfg.task, num_frames=meta['num_frames'], image_size=meta['image_hw']))
        model = build_model(model_cfg, task)
        seed_weights(model, meta['weight_seed'])
        transformer = model.pts_bbox_head.transformer
        transformer.training_draws = transformer.testing_draws = PatternDraws()
        return model

    def inputs(self, b: int) -> Dict:
        """Images and calibration of sample b."""
        return {
            name: torch.from_numpy(self.arrays[name][b : b + 1]).to(self.device)
            for name in ('img', 'lidar2img', 'ego2lidar')
        }

    def targets(self, b: int) -> OccupancyTargets:
        """Labels of sample b."""
        volumes = {
            name: torch.from_numpy(self.arrays[name][b : b + 1]).to(self.device)
            for name in ('voxel_semantics', 'voxel_instances')
        }
        class_ids = torch.from_numpy(self.arrays[f'instance_class_ids_{b}']).to(self.device)
        return OccupancyTargets(**volumes, instance_class_ids=[class_ids])


def check_inference(case: ModelCase) -> List[Deviation]:
    """Evaluation mode, sample 0: features, stages, mask layers, labels."""
    case.model.eval()
    with torch.no_grad():
        raw = case.model.predict_raw(**case.inputs(0))
    order = _coordinate_order(raw.output.stages[-1].coords)
    return [
        *_feature_deviations(case, raw),
        *_stage_deviations(case, raw),
        *_layer_deviations(case, raw, order),
        *_label_deviations(case, raw, order),
    ]


def check_training(case: ModelCase, b: int) -> List[Deviation]:
    """Training mode, sample b alone: every loss, every gradient norm."""
    case.model.train()
    case.model.zero_grad()
    losses = case.model(**case.inputs(b), targets=case.targets(b))
    total = sum(losses.values())
    total.backward()
    return [*_loss_deviations(case, b, losses, total), *_gradient_deviations(case, b)]


def check_merging(path: Path, device: str = 'cpu') -> List[Deviation]:
    """Output merging alone, all cases of a ``post*.npz``."""
    with np.load(str(path), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    labels = Task.from_config(dict(label_set='occ3d')).label_set
    is_thing = torch.tensor([c in labels.thing_ids for c in range(labels.num_occupied)], device=device)
    deviations = []
    for prefix in sorted(name[: -len('class_logits')] for name in arrays if name.endswith('class_logits')):
        logits = [torch.from_numpy(arrays[prefix + kind + '_logits']).float().to(device) for kind in ('class', 'mask')]
        panoptic = merge_panoptic(
            *logits, is_thing=is_thing, score_threshold=0.3, overlap_threshold=0.8, label_merged_stuff=False
        )
        merged = dict(
            sem_pred=merge_semantic(*logits, score_threshold=0.3),
            pano_inst=panoptic.instances,
            pano_sem=panoptic.semantics,
        )
        for name, value in merged.items():
            share = _share_unequal(value.cpu().numpy(), arrays[prefix + name])
            deviations.append(Deviation('merging alone', prefix + name, share, LABELS))
    return deviations


def _feature_deviations(case: ModelCase, raw) -> Iterator[Deviation]:
    for level, maps in enumerate(raw.features.maps):
        name = f'fpn{level}_b0_meanabs'
        yield Deviation('image features', name, _relative(maps.abs().mean(), case.arrays[name]), FEATURES)
    expected = case.arrays['fpn2_b0']
    ours = raw.features.maps[2][0, ..., : expected.shape[1]].permute(0, 3, 1, 2)
    yield Deviation('image features', 'fpn2_b0', _relative(ours, expected), FEATURES)


def _stage_deviations(case: ModelCase, raw) -> Iterator[Deviation]:
    for s, stage in enumerate(raw.output.stages):
        order, prefix = _coordinate_order(stage.coords), f'eval_stage{s}_'
        coords = stage.coords[0].cpu().numpy()[order]
        share = _share_unequal(coords, case.arrays[prefix + 'coords'])
        yield Deviation('kept voxels', prefix + 'coords', share, 0)
        for kind in ('seg_logits', 'occ_logits'):
            if prefix + kind in case.arrays:
                ours = getattr(stage, kind)[0].cpu().numpy()[order]
                value = _relative(ours, case.arrays[prefix + kind])
                yield Deviation('voxel logits', prefix + kind, value, LOGITS)


def _layer_deviations(case: ModelCase, raw, order) -> Iterator[Deviation]:
    for i, layer in enumerate(raw.output.layers):
        name = f'eval_layer{i}_class_logits'
        value = _relative(layer.class_logits[0], case.arrays[name])
        yield Deviation('mask class logits', name, value, LOGITS)
        name = f'eval_layer{i}_mask_mean'
        value = _relative(layer.mask_logits[0].mean(-1), case.arrays[name])
        yield Deviation('mask logits', name, value, LOGITS)
    name = 'eval_last_mask_logits_every8'
    ours = raw.output.layers[-1].mask_logits[0].cpu().numpy()[:, order][:, ::8]
    yield Deviation('mask logits', name, _relative(ours, case.arrays[name]), LOGITS)


def _label_deviations(case: ModelCase, raw, order) -> Iterator[Deviation]:
    merged = raw.merged[0]
    ours = dict(eval_sem_pred=merged.semantics, eval_pano_inst=merged.pano_inst, eval_pano_sem=merged.pano_sem)
    for name, value in ours.items():
        if name in case.arrays:
            share = _share_unequal(value.cpu().numpy()[order], case.arrays[name])
            yield Deviation('predicted labels', name, share, LABELS)


def _loss_deviations(case: ModelCase, b: int, losses, total) -> Iterator[Deviation]:
    prefix = f'train{b}_'
    expected = {name[len(prefix) :] for name in case.arrays if name.startswith(prefix + 'loss_')}
    assert set(losses) == expected, f'loss names differ: {sorted(set(losses) ^ expected)}'
    for name, value in sorted(dict(losses, total=total).items()):
        yield Deviation('losses', prefix + name, _relative(value, case.arrays[prefix + name]), LOSSES)


def _gradient_deviations(case: ModelCase, b: int) -> Iterator[Deviation]:
    names = case.arrays[f'train{b}_grad_names'].tolist()
    norms = dict(zip(names, case.arrays[f'train{b}_grad_norms']))
    ours = {name: p.grad.norm() for name, p in case.model.named_parameters() if p.grad is not None}
    assert set(ours) == set(norms), f'parameters with a gradient differ: {sorted(set(ours) ^ set(norms))}'
    for name in names:
        value = _relative(ours[name], norms[name])
        jumps = case.device.type != 'cpu' and '.sampling_offset.' in name
        yield Deviation('gradient norms', f'train{b} {name}', value, SLOPES if jumps else GRADIENTS)


def _coordinate_order(coords: torch.Tensor) -> np.ndarray:
    """Order of sample 0 by x, then y, then z."""
    return np.lexsort(coords[0].cpu().numpy().T[::-1])


def _relative(ours, expected) -> float:
    """Largest deviation over the largest expected magnitude; infinite for a wrong shape or NaN."""
    ours = ours.detach().cpu().numpy() if isinstance(ours, torch.Tensor) else np.asarray(ours)
    ours, expected = ours.astype(np.float64), np.asarray(expected, dtype=np.float64)
    if ours.shape != expected.shape or not np.isfinite(ours).all():
        return float('inf')
    return float(np.abs(ours - expected).max() / max(np.abs(expected).max(), 1e-12))


def _share_unequal(ours: np.ndarray, expected: np.ndarray) -> float:
    return float((ours != expected).mean()) if ours.shape == expected.shape else float('inf')
