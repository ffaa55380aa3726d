"""Counts and scores on hand-made cases, and against slow versions written from their definitions."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.metrics import cuda, lidar_rays
from lib.metrics.counting import count_voxels
from lib.metrics.counts import (
    Counts,
    class_scores,
    interval,
    mean,
    resample,
    rings_and_sectors,
    tallies,
    totals,
    whole_plan,
)
from lib.metrics.kernels import count_rays, count_segments, group_rays
from lib.task import Task

CAR, ROAD, TREE, FREE = 0, 1, 2, 3
CLASSES, THINGS, THRESHOLDS = 4, (CAR,), (1.0, 2.0, 4.0)
IS_THING = np.array([True, False, False])
LIMITS = np.array(THRESHOLDS, dtype=np.float32)


class Ends(NamedTuple):
    """Where rays end in one volume: uint8, float32 (metres) and uint16 [M]."""

    label: np.ndarray
    distance_m: np.ndarray
    instance: np.ndarray


def ends(label, distance=None, instance=None):
    label = np.asarray(label, dtype=np.uint8)
    distance = np.zeros(len(label)) if distance is None else distance
    instance = np.zeros(len(label)) if instance is None else instance
    return Ends(label, np.asarray(distance, dtype=np.float32), np.asarray(instance, dtype=np.uint16))


def where(truth, prediction, regions=None):
    """As if every ray ended in a voxel, and a column, of its own."""
    voxel = np.tile(np.arange(len(truth.label), dtype=np.int32), (2, 1))
    regions = np.zeros(len(truth.label), np.uint8) if regions is None else np.asarray(regions, np.uint8)
    return voxel, np.stack([truth.distance_m, prediction.distance_m]), regions, LIMITS


def iou_counts(truth, prediction):
    rays = np.zeros((1, CLASSES - 1, CLASSES, len(THRESHOLDS) + 1), dtype=np.int64)
    count_rays(truth.label, prediction.label, *where(truth, prediction), rays)
    return Counts(1, 1, rays, None, None)


def score_iou(*pairs):
    counts = [iou_counts(*pair) for pair in pairs]
    return class_scores(tallies(counts[0]._replace(rays=sum(one.rays for one in counts)))).ray_iou


def grouped(truth, prediction, regions=None):
    ids = (truth.instance, prediction.instance)
    return group_rays(truth.label, prediction.label, *ids, *where(truth, prediction, regions), FREE)


def pq_counts(truth, prediction, regions=None, members=((True,),)):
    members = np.asarray(members)
    segments = np.zeros((len(members), len(THRESHOLDS), CLASSES - 1, 5), dtype=np.int64)
    count_segments(*grouped(truth, prediction, regions), IS_THING, members, segments)
    return Counts(1, 1, None, segments, None)


def score_pq(truth, prediction):
    return class_scores(tallies(pq_counts(truth, prediction))).ray_pq


def score_voxels(truth, prediction, mask):
    task = Task(
        dict(name='small', class_names=('car', 'road', 'tree', 'free'), things=('car',)), False, (0, 0, 0, 7, 1, 1), 1
    )
    voxels = count_voxels(truth, prediction, mask, whole_plan(task), CLASSES)
    return class_scores(tallies(Counts(1, 1, None, None, voxels)))


# Rays


def test_rays_are_unit_vectors_pitch_by_pitch():
    rays = lidar_rays().astype(np.float64)
    assert lidar_rays().dtype == np.float32 and rays.shape == (39 * 360, 3)
    np.testing.assert_allclose(np.linalg.norm(rays, axis=1), 1, atol=1e-7)  # float32 components
    pitch = np.arcsin(rays[:, 2]).reshape(39, 360)
    np.testing.assert_allclose(pitch, np.repeat(pitch[:, :1], 360, axis=1), atol=1e-7)
    assert pitch[0, 0] == pytest.approx(-np.pi / 4, abs=1e-6)
    assert pitch[9, 0] == pytest.approx(-np.arctan(1 / 10), abs=1e-6)
    np.testing.assert_allclose(np.diff(pitch[9:, 0]), pitch[9, 0] - pitch[8, 0], atol=1e-6)
    assert pitch[-2, 0] < 0.21 <= pitch[-1, 0]


def test_azimuths_turn_from_x_to_y():
    rays = lidar_rays().reshape(39, 360, 3)
    azimuth = np.degrees(np.arctan2(rays[..., 1], rays[..., 0])) % 360
    np.testing.assert_allclose((azimuth - np.arange(360) + 180) % 360 - 180, 0, atol=1e-4)


# RayIoU


def test_ray_iou_by_hand():
    truth = ends([CAR, CAR, CAR, ROAD, ROAD, FREE], [10, 10, 10, 5, 5, 3])
    prediction = ends([CAR, CAR, ROAD, ROAD, FREE, CAR], [10.5, 13, 10, 6, 5, 3])
    # car: 3 true, 2 predicted (the ray with true label free does not count); right: 10.5 always, 13 below 4 m
    # road: 2 true, 2 predicted; the only right one is off by exactly 1 m, which is not below 1 m
    expected = np.array([[1 / 4, 0 / 4, np.nan], [1 / 4, 1 / 3, np.nan], [2 / 3, 1 / 3, np.nan]])
    np.testing.assert_array_equal(score_iou((truth, prediction)), expected)


def test_ray_iou_is_of_sums_not_a_mean_over_samples():
    pairs = (ends([CAR] * 9), ends([CAR] * 9)), (ends([CAR]), ends([ROAD]))
    np.testing.assert_array_equal(score_iou(*pairs)[0, :2], [9 / 10, 0])


def random_ends(draw, count):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    labels = rng.integers(0, CLASSES, size=(2, count))
    same = rng.random(count) < draw(st.sampled_from([0.0, 0.6, 0.95]))
    labels[1, same] = labels[0, same]
    ids = rng.integers(0, draw(st.integers(1, 6)), size=(2, count))
    ids[1, same] = ids[0, same]
    distances = rng.choice([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0], size=(2, count))
    return tuple(ends(*row) for row in zip(labels, distances, ids))


@st.composite
def pairs_of_ends(draw):
    return random_ends(draw, draw(st.integers(0, 120)))


def slow_ray_iou(truth, prediction):
    result = np.full((len(THRESHOLDS), CLASSES - 1), np.nan)
    for t, limit in enumerate(THRESHOLDS):
        for label in range(CLASSES - 1):
            counted = [ray for ray in range(len(truth.label)) if truth.label[ray] != FREE]
            true = {ray for ray in counted if truth.label[ray] == label}
            predicted = {ray for ray in counted if prediction.label[ray] == label}
            right = {ray for ray in true & predicted if abs(truth.distance_m[ray] - prediction.distance_m[ray]) < limit}
            union = len(true) + len(predicted) - len(right)
            if union:
                result[t, label] = len(right) / union
    return result


@settings(max_examples=150, deadline=None)
@given(pairs_of_ends())
def test_ray_iou_equals_its_definition(pair):
    np.testing.assert_array_equal(score_iou(pair), slow_ray_iou(*pair))


# RayPQ


def repeat(*runs):
    """[(value, times), ...] to a list."""
    return [value for value, times in runs for _ in range(times)]


def test_ray_pq_by_hand():
    # Two cars of 20 and 12 rays and a road of 30. The first car is found with 15 rays, the second is missed.
    truth = ends(repeat((CAR, 32), (ROAD, 30)), instance=repeat((1, 20), (2, 12), (3, 30)))
    prediction = ends(repeat((CAR, 15), (ROAD, 47)), instance=repeat((7, 15), (8, 47)))
    quality = score_pq(truth, prediction)
    assert quality[0, CAR] == (15 / 20) / (1 + 0.5 * 1)  # one match, one miss, no false alarm
    assert quality[0, ROAD] == 30 / 47
    assert np.isnan(quality[0, TREE])


def test_depth_counts_in_the_intersection_only():
    truth = ends([CAR] * 20, np.zeros(20), [1] * 20)
    prediction = ends([CAR] * 20, repeat((0.0, 12), (1.5, 8)), [1] * 20)
    quality = score_pq(truth, prediction)
    assert quality[0, CAR] == 0  # 12 of 28: no match, a miss and a false alarm
    assert quality[1, CAR] == 1


def test_half_is_no_match():
    truth, prediction = ends([ROAD] * 20 + [TREE] * 20), ends([ROAD] * 40)
    assert score_pq(truth, prediction)[0, ROAD] == 0  # 20 of 40


@pytest.mark.parametrize('rays, quality', [(9, 1.0), (10, 1 / 1.5)])
def test_small_segments_are_no_errors(rays, quality):
    truth = ends([ROAD] * (30 + rays))
    prediction = ends([ROAD] * 30 + [FREE] * rays)
    prediction.label[30:] = CAR
    truth.label[30:] = TREE
    result = score_pq(truth, prediction)[0]
    assert result[ROAD] == 1
    occurs = rays >= 10
    assert np.isnan(result[TREE]) == (not occurs) and np.isnan(result[CAR]) == (not occurs)


def test_ids_of_stuff_are_merged_in_the_truth_only():
    two_ids = repeat((1, 20), (2, 20))
    road = [ROAD] * 40
    assert score_pq(ends(road, instance=two_ids), ends(road))[0, ROAD] == 1
    # two predicted halves: neither has more than half of the union
    assert score_pq(ends(road), ends(road, instance=two_ids))[0, ROAD] == 0


def test_predicted_id_zero_is_a_segment():
    truth = ends([CAR] * 20, instance=[4] * 20)
    assert score_pq(truth, ends([CAR] * 20, instance=[0] * 20))[0, CAR] == 1


def test_an_id_that_spans_classes_joins_the_rest_of_its_class():
    # Id 5 covers cars and road: its car rays join those with id 0, which makes one segment of 30 car rays.
    truth = ends(repeat((CAR, 30), (ROAD, 10)), instance=repeat((0, 15), (5, 25)))
    whole = ends(repeat((CAR, 30), (ROAD, 10)), instance=[1] * 40)
    assert score_pq(truth, whole)[0, CAR] == 1
    # Where all its rays are cars, it is a segment of its own.
    truth = ends([CAR] * 30, instance=repeat((0, 15), (5, 15)))
    assert score_pq(truth, ends([CAR] * 30, instance=[1] * 30))[0, CAR] == 0


def slow_ray_pq(truth, prediction):
    counted = [ray for ray in range(len(truth.label)) if truth.label[ray] != FREE]
    classes_of_id = {}
    for ray in counted:
        classes_of_id.setdefault(truth.instance[ray], set()).add(truth.label[ray])
    true, predicted = {}, {}
    for ray in counted:
        label, number = truth.label[ray], truth.instance[ray]
        own = label in THINGS and number > 0 and len(classes_of_id[number]) == 1
        true.setdefault((label, number if own else 0), set()).add(ray)
        if prediction.label[ray] != FREE:
            predicted.setdefault((prediction.label[ray], prediction.instance[ray]), set()).add(ray)
    result = np.full((len(THRESHOLDS), CLASSES - 1), np.nan)
    for t, limit in enumerate(THRESHOLDS):
        close = {ray for ray in counted if abs(truth.distance_m[ray] - prediction.distance_m[ray]) < limit}
        for label in range(CLASSES - 1):
            mine = [rays for key, rays in sorted(true.items()) if key[0] == label]
            theirs = [rays for key, rays in sorted(predicted.items()) if key[0] == label]
            scores, hit_mine, hit_theirs = [], set(), set()
            for a, one in enumerate(mine):
                for b, other in enumerate(theirs):
                    common = len(one & other & close)
                    iou = common / (len(one) + len(other) - common)
                    if iou > 0.5:
                        scores.append(iou)
                        hit_mine.add(a)
                        hit_theirs.add(b)
            errors = sum(len(rays) >= 10 for a, rays in enumerate(mine) if a not in hit_mine)
            errors += sum(len(rays) >= 10 for b, rays in enumerate(theirs) if b not in hit_theirs)
            if scores or errors:
                segmentation = sum(scores) / len(scores) if scores else 0.0
                recognition = len(scores) / (len(scores) + 0.5 * errors)
                result[t, label] = segmentation * recognition
    return result


@settings(max_examples=200, deadline=None)
@given(pairs_of_ends())
def test_ray_pq_equals_its_definition(pair):
    # 1e-12: the definition multiplies two quotients, the evaluator divides once
    np.testing.assert_allclose(score_pq(*pair), slow_ray_pq(*pair), rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(pairs_of_ends(), pairs_of_ends())
def test_counting_tensors_equals_counting_arrays(one, other):
    """What runs on a GPU, on CPU tensors; two samples at once."""
    regions = [np.arange(len(pair[0].label)) % 3 for pair in (one, other)]
    rays = max(len(pair[0].label) for pair in (one, other))

    def stacked(name, fill=0):
        """Of both samples [S, 2, M], the shorter one filled up with rays that meet nothing."""
        rows = [
            [np.pad(getattr(side, name), (0, rays - len(side.label)), constant_values=fill) for side in pair]
            for pair in (one, other)
        ]
        return torch.from_numpy(np.array(rows).astype(np.int64 if name == 'instance' else np.array(rows).dtype))

    voxel = torch.arange(rays, dtype=torch.int32).expand(2, 2, rays)
    found = cuda.RayEnds(stacked('label', FREE), voxel, stacked('distance_m'))
    level = cuda.levels(found, LIMITS)
    region = cuda.regions(found, (np.arange(rays) % 3).astype(np.uint8), 1)
    shape = (3, CLASSES - 1, CLASSES, len(THRESHOLDS) + 1)
    counted = cuda.count_rays(found, level, region, shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, '_to_device', lambda name, volumes, device: stacked('instance'))
        groups = cuda.group_rays(found, level, region, None, FREE)
    for sample, pair in enumerate((one, other)):
        expected = np.zeros(shape, dtype=np.int64)
        count_rays(pair[0].label, pair[1].label, *where(*pair, regions[sample]), expected)
        np.testing.assert_array_equal(counted[sample], expected)
        keys, numbers = grouped(*pair, regions[sample])
        order = np.argsort(keys)
        np.testing.assert_array_equal(groups[sample][0], keys[order])
        np.testing.assert_array_equal(groups[sample][1], numbers[order])


# Parts of the ground plan


def test_segments_are_cut_at_the_borders_of_parts():
    # One car of 40 rays, 25 in region 0, of which 20 are found, and 15 in region 1, of which none is.
    truth = ends([CAR] * 40, instance=[1] * 40)
    prediction = ends(repeat((CAR, 20), (ROAD, 20)), instance=repeat((1, 20), (2, 20)))
    members = [[True, True], [True, False], [False, True]]
    counts = pq_counts(truth, prediction, repeat((0, 25), (1, 15)), members)
    quality = [class_scores(tallies(counts, part=part)).ray_pq[0, CAR] for part in range(3)]
    assert quality == [0, 20 / 25, 0]  # 20 of 40 is no match


def test_rings_and_sectors():
    task = Task('occ3d')
    regions = rings_and_sectors(task)
    assert regions.rings == ('0-10 m', '10-20 m', '20-40 m', 'over 40 m') and regions.sectors == task.cameras
    of_column = regions.of_column.reshape(200, 200)

    def at(x, y):
        region = of_column[int((x + 40) / 0.4), int((y + 40) / 0.4)]
        return regions.rings[region // 6], regions.sectors[region % 6]

    assert at(5, 0.1) == ('0-10 m', 'CAM_FRONT')
    assert at(10, 12) == ('10-20 m', 'CAM_FRONT_LEFT') and at(10, -12) == ('10-20 m', 'CAM_FRONT_RIGHT')
    assert at(-5, 20) == ('20-40 m', 'CAM_BACK_LEFT') and at(-5, -20) == ('20-40 m', 'CAM_BACK_RIGHT')
    assert at(-39, 1) == ('20-40 m', 'CAM_BACK') and at(39, 39) == ('over 40 m', 'CAM_FRONT_LEFT')
    members = regions.members
    assert members.shape == (1 + 4 + 6, 24) and members[0].all()
    assert members[1:5].sum(axis=0).tolist() == members[5:].sum(axis=0).tolist() == [1] * 24
    other = rings_and_sectors(Task('occ3d', cameras=('LEFT', 'CAM_FRONT')))
    assert other.sectors == ('all',) and other.members.tolist() == [[True] * 4] + np.eye(4, dtype=bool).tolist()


# mIoU


def test_voxel_iou_by_hand():
    truth = np.array([CAR, CAR, ROAD, ROAD, FREE, FREE, 255], dtype=np.uint8).reshape(7, 1, 1)
    prediction = np.array([CAR, ROAD, ROAD, FREE, ROAD, FREE, CAR], dtype=np.uint8).reshape(7, 1, 1)
    scores = score_voxels(truth, prediction, None)
    np.testing.assert_array_equal(scores.voxel_iou, [1 / 2, 1 / 4, np.nan])
    assert scores.occupied_iou == 3 / 5
    mask = np.array([1, 1, 1, 0, 0, 1, 1], dtype=bool).reshape(7, 1, 1)
    np.testing.assert_array_equal(score_voxels(truth, prediction, mask).voxel_iou, [1 / 2, 1 / 2, np.nan])


# Means and intervals


def test_quality_is_split_into_segmentation_and_recognition():
    truth = ends(repeat((CAR, 32), (ROAD, 30)), instance=repeat((1, 20), (2, 12), (3, 30)))
    prediction = ends(repeat((CAR, 15), (ROAD, 47)), instance=repeat((7, 15), (8, 47)))
    sums = tallies(pq_counts(truth, prediction))
    scores = class_scores(sums)
    assert scores.ray_sq[0, CAR] == 15 / 20 and scores.ray_rq[0, CAR] == 1 / 1.5
    np.testing.assert_allclose(scores.ray_sq * scores.ray_rq, scores.ray_pq, rtol=1e-15)
    means = totals(sums, THRESHOLDS, THINGS)
    assert means['RayPQ_things'] == 0.5 and means['RayPQ_stuff'] == 30 / 47
    assert means['RayPQ'] == (0.5 + 30 / 47) / 2 and means['RaySQ'] == (15 / 20 + 30 / 47) / 2
    nothing = class_scores(tallies(pq_counts(ends([CAR] * 20), ends([ROAD] * 20))))
    assert (nothing.ray_sq[0, CAR], nothing.ray_rq[0, CAR], nothing.ray_pq[0, CAR]) == (0, 0, 0)


def test_sums_of_ious_are_exact():
    """Sums over samples do not depend on their order: they are of whole numbers."""
    pairs = [(ends([ROAD] * 40), ends(repeat((ROAD, rays), (TREE, 40 - rays)))) for rays in range(21, 40)]
    counts = [pq_counts(*pair).segments for pair in pairs]
    sums = tallies(Counts(1, 1, None, sum(counts), None))
    assert sums['segments_iou'][0, ROAD] == math.fsum(rays / 40 for rays in range(21, 40))
    assert sums['segments_matched'][0, ROAD] == 19


def test_mean_leaves_out_what_is_not_there():
    np.testing.assert_array_equal(mean(np.array([[1.0, np.nan, 0.0], [np.nan] * 3])), [0.5, np.nan])


def test_resampled_scores_spread_around_the_score():
    rng = np.random.default_rng(0)
    scenes = [
        dict(voxels_true=np.array([100]), voxels_predicted=np.array([100]), voxels_matched=rng.binomial(100, 0.6, 1))
        for _ in range(40)
    ]
    scenes = [
        dict(one, **{name.replace('voxels', 'occupied'): value[0] for name, value in one.items()}) for one in scenes
    ]
    resampled = totals(resample(scenes), THRESHOLDS, THINGS)['mIoU']
    matched = np.array([one['voxels_matched'][0] for one in scenes])
    low, high = interval(resampled)
    # By the delta method: the standard error of the mean of m, times the slope of m / (200 - m).
    error = matched.std() / np.sqrt(40) * 200 / (200 - matched.mean()) ** 2
    score = matched.sum() / (8000 - matched.sum())
    np.testing.assert_allclose([low - score, high - score], [-1.96 * error, 1.96 * error], rtol=0.15)  # 1000 draws
    np.testing.assert_array_equal(resample(scenes)['voxels_matched'], resample(scenes)['voxels_matched'])
    same = resample([scenes[0]] * 5)
    assert np.all(same['voxels_matched'] == 5 * scenes[0]['voxels_matched'])


def test_interval_of_nothing():
    assert interval(np.full(10, np.nan)) is None
