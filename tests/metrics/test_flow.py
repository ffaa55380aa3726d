"""Occupancy and flow score: golden files, and small cases by hand."""

import json

import numpy as np
import pytest

from lib.classes import get_label_set
from lib.errors import DataError
from lib.metrics.flow import FlowRays, cast_flow, count_flow, occ_score
from lib.metrics.rays import lidar_rays
from lib.task import Task

OPENOCC = get_label_set('openocc_v2')
SUM_TOLERANCE = 1e-6  # relative; NumPy's releases add float32 numbers in different orders (3e-8 seen)
CAR, TRUCK, PEDESTRIAN, ROAD, FREE = (
    OPENOCC.class_names.index(name) for name in ('car', 'truck', 'pedestrian', 'driveable_surface', 'free')
)


def rays(labels, distances, flows=None):
    flows = np.zeros((len(labels), 2)) if flows is None else flows
    return FlowRays(np.array(labels, np.uint8), np.array(distances, np.float16), np.array(flows, np.float16))


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
        score = occ_score([count_flow(truth, prediction, OPENOCC) for truth, prediction in ends], OPENOCC)
        np.testing.assert_array_equal(score.ray_iou, arrays['iou_per_threshold'])
        expected = np.stack([arrays['ave_true_positives'], arrays['ave_all_rays']])
        np.testing.assert_allclose(score.velocity_error[0], expected[0], rtol=1e-15)
        np.testing.assert_allclose(score.velocity_error[1], expected[1], rtol=SUM_TOLERANCE)
        for name, value in json.loads(str(arrays['result'])).items():
            tolerance = SUM_TOLERANCE if 'all_rays' in name else 1e-15
            assert score.totals()[name] == pytest.approx(value, rel=tolerance, abs=0), (path, name)
            assert score.as_dict()[name] == score.totals()[name]


def test_the_two_kinds_of_velocity_error_by_hand():
    """Four rays: a car found with an error of 1 m/s, a car 3 m off, a road, and free space, which counts nowhere."""
    truth = rays([CAR, CAR, ROAD, FREE], [10, 10, 5, 50], [(5, 0), (5, 0), (0, 0), (0, 0)])
    prediction = rays([CAR, CAR, ROAD, CAR], [11, 13, 5, 50], [(6, 0), (5, 4), (0, 1), (100, 0)])
    score = occ_score([count_flow(truth, prediction, OPENOCC)], OPENOCC)
    assert score.velocity_error[0, CAR] == 1.0
    assert score.velocity_error[1, CAR] == (1 + 4 + 1) / 3
    assert np.isnan(score.velocity_error[:, TRUCK]).all() and np.isnan(score.velocity_error[:, ROAD]).all()
    np.testing.assert_array_equal(score.ray_iou[:, CAR], [0, 1 / 3, 1])  # 10 to 11 m is not below 1 m
    totals = score.totals()
    assert totals['mAVE_true_positives'] == 1.0 and totals['OccScore_true_positives'] == 0.9 * totals['RayIoU']
    assert totals['OccScore_all_rays'] == 0.9 * totals['RayIoU']  # an error of 2 m/s is worth no less than none


def test_a_sample_without_a_true_positive_adds_no_rays_to_all_rays():
    found = count_flow(rays([CAR], [10], [(1, 0)]), rays([CAR], [10], [(1, 0.5)]), OPENOCC)
    missed = count_flow(rays([CAR, TRUCK], [10, 9], [(1, 0)] * 2), rays([ROAD, TRUCK], [10, 9], [(9, 0)] * 2), OPENOCC)
    score = occ_score([found, missed], OPENOCC)
    assert score.velocity_error[1, CAR] == 0.5 and score.velocity_error[1, TRUCK] == 8.0


def test_unknown_velocities_are_ignored():
    truth = rays([CAR, CAR], [10, 10], [(255, -255), (1, 0)])
    score = occ_score([count_flow(truth, rays([CAR, CAR], [10, 10], [(0, 0), (1, 0.25)]), OPENOCC)], OPENOCC)
    assert score.velocity_error[0, CAR] == 0.25 == score.velocity_error[1, CAR]
    assert (score.ray_iou[:, CAR] == 1).all()


def test_nothing_moving_leaves_no_score_but_says_so():
    score = occ_score([count_flow(rays([ROAD], [3]), rays([ROAD], [3]), OPENOCC)], OPENOCC)
    assert score.as_dict()['mAVE_true_positives'] is None and score.as_dict()['RayIoU'] == 1.0
    assert score.as_dict()['OccScore_true_positives'] is None
    assert 'Occ Score - (velocity errors of true positives)' in score.as_table()


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
    perfect = occ_score([count_flow(found, found, OPENOCC)], OPENOCC).totals()
    assert perfect['OccScore_true_positives'] == perfect['OccScore_all_rays'] == 1.0


def test_rays_of_other_origins_are_refused():
    with pytest.raises(DataError, match='the prediction has 1 rays, the truth 2'):
        count_flow(rays([CAR, CAR], [1, 1]), rays([CAR], [1]), OPENOCC)
    with pytest.raises(DataError, match='nothing to score'):
        occ_score([], OPENOCC)


def test_table_and_numbers_agree():
    truth = rays([CAR, PEDESTRIAN], [10, 5], [(5, 0), (1, 1)])
    table = occ_score([count_flow(truth, truth, OPENOCC)] * 2, OPENOCC).as_table()
    assert 'Occ Score 100.00 (velocity errors of true positives)' in table and '2 samples' in table
    (car,) = [line for line in table.splitlines() if line.startswith('car')]
    assert car.split() == ['car', '100.00', '100.00', '100.00', '0.00', '0.00']
