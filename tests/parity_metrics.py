"""Golden checks of the evaluation; ``tests/test_parity.py`` runs them on every file of the golden folder.

Everything about a case is read from its file: samples, origins, thresholds, classes.
"""

import json
import re

import numpy as np

from lib.infos import load_infos, split_scenes
from lib.metrics import Evaluator, lidar_rays
from lib.metrics.origins import scene_ray_origins
from lib.raycast import cast_rays
from lib.task import Task

LABEL_SETS = {17: 'occ3d', 16: 'openocc_v2'}  # by number of classes without free
DEPTH_TOLERANCE = 1e-4  # metres; about 10 float32 units at 80 m. Equal bits were seen on every ray
SCORE_TOLERANCE = 1e-6  # labels are equal, so only rays at a threshold to within rounding could differ
ORIGIN_TOLERANCE = 4e-6  # metres; published origins are float32 in the LiDAR frame, one unit is 4e-6 at 39 m


def check_rayeval(path, device='cpu'):
    """Labels and depths of every ray, and all scores, of one ``rayeval*.npz``.

    Returns:
        dict of the largest deviations: ``depth_m``, ``iou``, ``score``.
    """
    with np.load(str(path)) as file:
        case = {name: file[name] for name in file.files}
    task = Task(label_set=LABEL_SETS[case['iou_per_threshold'].shape[1]])
    expected = json.loads(str(case['result']))
    depth = max(
        _check_rays(case, side, sample, task, device)
        for side in ('gt', 'pred')
        for sample in range(len(case['origins']))
    )
    result = _evaluate(case, task, expected, device)
    ray_iou = result.class_scores.ray_iou
    np.testing.assert_allclose(ray_iou, case['iou_per_threshold'], rtol=0, atol=SCORE_TOLERANCE)
    scores = result.as_dict()
    score = max(abs(scores[name] - value) for name, value in expected.items())
    assert score <= SCORE_TOLERANCE, f'expected {expected}, got {scores}'
    iou = float(np.nanmax(np.abs(ray_iou - case['iou_per_threshold'])))
    return dict(depth_m=depth, iou=iou, score=score)


def _of_sample(volumes, sample):
    """Volume of a sample; one volume may stand for all samples."""
    return volumes[sample if len(volumes) > 1 else 0]


def _check_rays(case, side, sample, task, device):
    hits = cast_rays(
        _of_sample(case[side + '_semantics'], sample),
        case['origins'][sample],
        lidar_rays(),
        task.point_cloud_range,
        task.voxel_size,
        task.label_set.free_id,
        device=device,
    )
    label, depth = (
        np.asarray(value if isinstance(value, np.ndarray) else value.cpu()) for value in (hits.label, hits.distance_m)
    )
    wrong = np.count_nonzero(label != case[side + '_rays_label'][sample])
    assert wrong == 0, f'{side}, sample {sample}: {wrong} of {len(label)} rays have another label'
    deviation = float(np.abs(depth - case[side + '_rays_distance_m'][sample]).max())
    assert deviation <= DEPTH_TOLERANCE, f'{side}, sample {sample}: a depth is off by {deviation:g} m'
    return deviation


def _evaluate(case, task, expected, device):
    thresholds = sorted(float(name.split('@')[1]) for name in expected if re.match(r'RayIoU@', name))
    metrics = ['ray_iou'] + ['ray_pq'] * ('RayPQ' in expected)
    evaluator = Evaluator(task, metrics, device=device, thresholds=thresholds)
    for sample, origins in enumerate(case['origins']):
        prediction, truth = (
            {
                kind: _of_sample(case[f'{side}_{kind}'], sample)
                for kind in ('semantics', 'instances')
                if f'{side}_{kind}' in case
            }
            for side in ('pred', 'gt')
        )
        evaluator.update(prediction, truth, origins, f'sample {sample}')
    return evaluator.compute()


def check_origins(path, real_dir):
    """Ray origins and scenes of one ``origins*.npz`` against those of real infos.

    Returns:
        dict of the largest deviation: ``origin_m``.
    """
    with np.load(str(path)) as file:
        case = {name: file[name] for name in file.files}
    tokens = [str(token) for token in case['token']]
    sources = sorted(real_dir.glob('*infos*.pkl'))
    known = {info['token']: info for source in sources for info in load_infos(source).infos}
    infos = [known[token] for token in tokens]
    deviation = _compare_origins(case, tokens, scene_ray_origins(infos))
    if deviation > ORIGIN_TOLERANCE and len(known) > len(infos):  # the file lists part of the frames it is of
        deviation = _compare_origins(case, tokens, scene_ray_origins(list(known.values())))
    assert deviation <= ORIGIN_TOLERANCE, f'an origin is off by {deviation:g} m (inf: another number of them)'
    groups = {frozenset(tokens[index] for index in scene) for scene in split_scenes(infos)}
    names = np.asarray(case['scene'])
    assert groups == {frozenset(np.asarray(tokens)[names == name].tolist()) for name in set(names)}
    return dict(origin_m=deviation)


def _compare_origins(case, tokens, origins):
    worst = 0.0
    for token, count, expected in zip(tokens, case['count'], case['origins']):
        if len(origins[token]) != count:
            return float('inf')
        worst = max(worst, float(np.abs(origins[token] - expected[:count]).max(initial=0)))
    return worst
