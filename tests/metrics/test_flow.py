"""Occupancy and flow score: golden files, and small cases by hand."""

import functools
import json

import numpy as np
import pytest

from lib.classes import get_label_set
from lib.errors import DataError
from lib.metrics import Evaluator
from lib.metrics.counting import FlowRays, cast_flow, count_flow
from lib.metrics.counts import Counts, add_counts, class_scores, tallies, totals
from lib.metrics.origins import lidar_rays
from lib.task import Task

OPENOCC = get_label_set('openocc_v2')
SUM_TOLERANCE = 1e-6  # relative; NumPy's releases add float32 numbers in different orders (3e-8 seen)
CAR, TRUCK, ROAD, FREE = (OPENOCC.class_names.index(name) for name in ('car', 'truck', 'driveable_surface', 'free'))


def rays(labels, distances, flows=None):
    flows = np.zeros((len(labels), 2)) if flows is None else flows
    return FlowRays(np.array(labels, np.uint8), np.array(distances, np.float16), np.array(flows, np.float16))


def occ_score(counts):
    """(scores by class, totals) of samples."""
    sums = tallies(functools.reduce(add_counts, [Counts(1, 1, None, None, None, one) for one in counts]))
    return class_scores(sums), totals(sums, (1, 2, 4), OPENOCC.thing_ids)


def test_golden_files(golden_dir):
    """Every occ_score*.npz: RayIoU, both kinds of velocity error, and the scores, to the last bit but one; what
    is summed in single precision, to the order that this NumPy adds in."""
    paths = sorted(golden_dir.glob('occ_score*.npz'))
    assert paths
    for path in paths:
        with np.load(str(path)) as file:
            arrays = {name: file[name] for name in file.files}
        samples = sum(name.endswith('gt_cls') for name in arrays)
        ends = [
            [FlowRays(*(arrays[f's{s}_{side}_{part}'] for part in ('cls', 'dist', 'flow'))) for side in ('gt', 'pred')]
            for s in range(samples)
        ]
        score, means = occ_score([count_flow(truth, prediction, OPENOCC) for truth, prediction in ends])
        np.testing.assert_array_equal(score.flow_iou, arrays['iou_per_threshold'])
        expected = np.stack([arrays['ave_true_positives'], arrays['ave_all_rays']])
        np.testing.assert_allclose(score.velocity_error[0], expected[0], rtol=1e-15)
        np.testing.assert_allclose(score.velocity_error[1], expected[1], rtol=SUM_TOLERANCE)
        for name, value in json.loads(str(arrays['result'])).items():
            tolerance = SUM_TOLERANCE if 'all_rays' in name else 1e-15
            ours = means[f'OccScore_{name}' if name.startswith('RayIoU') else name]
            assert ours == pytest.approx(value, rel=tolerance, abs=0), (path, name)


def test_the_two_kinds_of_velocity_error_by_hand():
    """Four rays: a car found with an error of 1 m/s, a car 3 m off, a road, and free space, which counts nowhere."""
    truth = rays([CAR, CAR, ROAD, FREE], [10, 10, 5, 50], [(5, 0), (5, 0), (0, 0), (0, 0)])
    prediction = rays([CAR, CAR, ROAD, CAR], [11, 13, 5, 50], [(6, 0), (5, 4), (0, 1), (100, 0)])
    score, means = occ_score([count_flow(truth, prediction, OPENOCC)])
    assert score.velocity_error[0, CAR] == 1.0
    assert score.velocity_error[1, CAR] == (1 + 4 + 1) / 3
    assert np.isnan(score.velocity_error[:, TRUCK]).all() and np.isnan(score.velocity_error[:, ROAD]).all()
    np.testing.assert_array_equal(score.flow_iou[:, CAR], [0, 1 / 3, 1])  # 10 to 11 m is not below 1 m
    assert means['mAVE_true_positives'] == 1.0 and means['OccScore_true_positives'] == 0.9 * means['OccScore_RayIoU']
    assert means['OccScore_all_rays'] == 0.9 * means['OccScore_RayIoU']  # an error of 2 m/s is worth no less than none


def test_a_sample_without_a_true_positive_adds_no_rays_to_all_rays():
    found = count_flow(rays([CAR], [10], [(1, 0)]), rays([CAR], [10], [(1, 0.5)]), OPENOCC)
    missed = count_flow(rays([CAR, TRUCK], [10, 9], [(1, 0)] * 2), rays([ROAD, TRUCK], [10, 9], [(9, 0)] * 2), OPENOCC)
    score, _ = occ_score([found, missed])
    assert score.velocity_error[1, CAR] == 0.5 and score.velocity_error[1, TRUCK] == 8.0


def test_unknown_velocities_are_ignored():
    truth = rays([CAR, CAR], [10, 10], [(255, -255), (1, 0)])
    score, _ = occ_score([count_flow(truth, rays([CAR, CAR], [10, 10], [(0, 0), (1, 0.25)]), OPENOCC)])
    assert score.velocity_error[0, CAR] == 0.25 == score.velocity_error[1, CAR]
    assert (score.flow_iou[:, CAR] == 1).all()


def test_nothing_moving_leaves_no_score():
    _, means = occ_score([count_flow(rays([ROAD], [3]), rays([ROAD], [3]), OPENOCC)])
    assert np.isnan(means['mAVE_true_positives']) and np.isnan(means['OccScore_true_positives'])
    assert means['OccScore_RayIoU'] == 1.0


def test_rays_through_volumes_carry_the_velocity_of_the_voxel_they_end_in():
    task = Task('openocc_v2', point_cloud_range=(-4, -4, -1, 4, 4, 1), voxel_size=0.5)
    semantics = np.full(task.grid_shape, FREE, np.uint8)
    semantics[12:, :, :] = CAR  # a wall 2 m ahead, thicker than a ray goes
    flow = np.zeros(task.grid_shape + (2,), np.float32)
    flow[12] = (3, -1)
    origins = np.array([[0.0, 0.0, 0.1], [1.0, 0.5, 0.1]])
    found = cast_flow(semantics, flow, origins, task)
    directions = np.tile(lidar_rays(), (2, 1))
    assert found.label.shape == (2 * 14040,) and found.distance_m.dtype == found.flow.dtype == np.float16
    hit = found.label == CAR
    assert hit.any() and (found.flow[hit] == (3, -1)).all() and (found.flow[~hit] == 0).all()
    assert (directions[hit, 0] > 0).all()
    level = np.abs(directions[:, 2]) < 0.02
    ahead = np.flatnonzero(hit & level & (np.abs(directions[:, 1]) < 0.01))
    np.testing.assert_allclose(found.distance_m[ahead], np.where(ahead < 14040, 2.5, 1.5), atol=0.02)
    _, perfect = occ_score([count_flow(found, found, OPENOCC)])
    assert perfect['OccScore_true_positives'] == perfect['OccScore_all_rays'] == 1.0


def test_rays_of_other_origins_are_refused():
    with pytest.raises(DataError, match='the prediction has 1 rays, the truth 2'):
        count_flow(rays([CAR, CAR], [1, 1]), rays([CAR], [1]), OPENOCC)


def test_the_evaluator_scores_volumes_and_submissions_alike():
    task = Task('openocc_v2', point_cloud_range=(-8, -8, -1, 8, 8, 1), voxel_size=0.5)
    rng = np.random.default_rng(0)
    semantics = np.where(rng.random(task.grid_shape) < 0.1, rng.integers(0, 16, task.grid_shape), FREE)
    labels = dict(semantics=semantics, flow=rng.normal(size=task.grid_shape + (2,)))
    prediction = dict(semantics=np.where(rng.random(task.grid_shape) < 0.2, FREE, semantics), flow=labels['flow'] + 0.5)
    origins = np.array([[0.0, 0.0, 0.1], [1.0, 0.5, 0.1]])
    volumes, submitted = (Evaluator(task, ['occ_score']) for _ in range(2))
    volumes.update(prediction, labels, origins, 'a', 'one')
    submitted.update(cast_flow(prediction['semantics'], prediction['flow'], origins, task), labels, origins, 'a', 'one')
    result = volumes.compute()
    assert result.as_dict(details=True) == submitted.compute().as_dict(details=True)
    assert result.totals['mAVE_true_positives'] == pytest.approx(0.5 * 2**0.5, rel=0.01)  # half precision
    rows = {line.split()[0]: line.split() for line in result.as_table().splitlines()}
    assert rows['car'][2] == f'{result.as_dict()["per_class"]["car"]["AVE_true_positives"]:.3f}'
    assert rows['barrier'][2] == '-' and f'mAVE {result.totals["mAVE_all_rays"]:.3f} m/s, all rays' in result.as_table()
    with pytest.raises(DataError, match='the rays of a submission have no score but occ_score'):
        Evaluator(task, ['occ_score', 'miou']).update(cast_flow(**prediction, origins=origins, task=task), labels)
    with pytest.raises(DataError, match="the prediction of sample a has no 'flow'"):
        volumes.update(prediction['semantics'], labels, origins, 'a')
