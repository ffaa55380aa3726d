"""Scores on hand-made cases, against slow versions written from their definitions, and on whole volumes."""

import json
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import raycast
from lib.errors import ConfigError, DataError
from lib.metrics import OccEvaluator, lidar_rays
from lib.metrics.comparison import RayEnds, group_segments
from lib.metrics.ray_iou import count_ray_iou, ray_iou
from lib.metrics.ray_pq import count_ray_pq, ray_pq
from lib.metrics.voxel_iou import count_voxel_iou, voxel_iou
from lib.task import Task

ROOT = Path(__file__).resolve().parents[2]
CAR, ROAD, TREE, FREE = 0, 1, 2, 3
CLASSES, THINGS, THRESHOLDS = 4, (CAR,), (1.0, 2.0, 4.0)
SMALL_LABELS = dict(name='small', class_names=('car', 'road', 'tree', 'free'), things=('car',))
needs_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and raycast.extension_available()), reason='needs a GPU and the built extension'
)


def ends(label, distance=None, instance=None):
    label = np.asarray(label, dtype=np.uint8)
    distance = np.zeros(len(label)) if distance is None else distance
    instance = np.zeros(len(label)) if instance is None else instance
    return RayEnds(label, np.asarray(distance, dtype=np.float32), np.asarray(instance, dtype=np.int32))


def score_iou(truth, prediction):
    return ray_iou([count_ray_iou(truth, prediction, CLASSES, THRESHOLDS)])


def score_pq(truth, prediction):
    pairs = group_segments(truth, prediction, CLASSES, THRESHOLDS)
    return ray_pq([count_ray_pq(pairs, CLASSES, THINGS, len(THRESHOLDS))])


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
    np.testing.assert_array_equal(score_iou(truth, prediction), expected)


def test_ray_iou_is_of_sums_not_a_mean_over_samples():
    first = count_ray_iou(ends([CAR] * 9), ends([CAR] * 9), CLASSES, THRESHOLDS)
    second = count_ray_iou(ends([CAR]), ends([ROAD]), CLASSES, THRESHOLDS)
    np.testing.assert_array_equal(ray_iou([first, second])[0, :2], [9 / 10, 0])


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
    np.testing.assert_array_equal(score_iou(*pair), slow_ray_iou(*pair))


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


def as_tensors(side):
    return RayEnds(*(torch.from_numpy(array) for array in (side.label, side.distance_m, side.instance)))


@settings(max_examples=50, deadline=None)
@given(pairs_of_ends())
def test_counting_tensors_equals_counting_arrays(pair):
    """What runs on a GPU, on CPU tensors."""
    tensors = [as_tensors(side) for side in pair]
    for count in (count_ray_iou, group_segments):
        for one, other in zip(count(*pair, CLASSES, THRESHOLDS), count(*tensors, CLASSES, THRESHOLDS)):
            np.testing.assert_array_equal(one, other)


# mIoU


def test_voxel_iou_by_hand():
    truth = np.array([CAR, CAR, ROAD, ROAD, FREE, FREE, 255], dtype=np.uint8).reshape(7, 1, 1)
    prediction = np.array([CAR, ROAD, ROAD, FREE, ROAD, FREE, CAR], dtype=np.uint8).reshape(7, 1, 1)
    np.testing.assert_array_equal(
        voxel_iou([count_voxel_iou(truth, prediction, None, CLASSES)]), [1 / 2, 1 / 4, np.nan]
    )
    mask = np.array([1, 1, 1, 0, 0, 1, 1], dtype=bool).reshape(7, 1, 1)
    np.testing.assert_array_equal(
        voxel_iou([count_voxel_iou(truth, prediction, mask, CLASSES)]), [1 / 2, 1 / 2, np.nan]
    )
    tensors = [torch.from_numpy(array) for array in (truth, prediction, mask)]
    on_cpu, as_on_gpu = (count_voxel_iou(*side, CLASSES) for side in ((truth, prediction, mask), tensors))
    for one, other in zip(on_cpu, as_on_gpu):
        np.testing.assert_array_equal(one, other)


# The evaluator


@pytest.fixture(scope='module')
def task():
    """A grid unlike the usual one: other shape, range, voxel size and labels."""
    return Task(
        label_set=SMALL_LABELS, panoptic=True, point_cloud_range=(-6.0, -10.0, -2.0, 18.0, 10.0, 4.0), voxel_size=0.5
    )


def street(task, seed, cars=3):
    """dict(semantics, instances, mask_camera): a road, trees and some cars on it."""
    rng = np.random.default_rng(seed)
    semantics = np.full(task.grid_shape, FREE, dtype=np.uint8)
    instances = np.zeros(task.grid_shape, dtype=np.int16)
    semantics[:, :, 0] = ROAD
    semantics[:, 33:36, 1:8] = TREE
    for car in range(cars):
        x, y = rng.integers(0, 40), rng.integers(0, 28)
        semantics[x : x + 8, y : y + 4, 1:4] = CAR
        instances[x : x + 8, y : y + 4, 1:4] = car + 1
    return dict(semantics=semantics, instances=instances, mask_camera=rng.random(task.grid_shape) < 0.7)


ORIGINS = np.array([[0.0, 0.0, 1.0], [5.2, -3.0, 1.1], [11.0, 4.0, 0.9]])
ALL = ('ray_iou', 'ray_pq', 'miou')


def evaluate(task, samples=4, metrics=ALL, **settings_):
    evaluator = OccEvaluator(task, metrics, **settings_)
    stats = [
        evaluator.process(street(task, seed + 100), street(task, seed), ORIGINS, key=str(seed))
        for seed in range(samples)
    ]
    return evaluator, stats


def test_truth_as_prediction_scores_one(task):
    evaluator = OccEvaluator(task, ALL)
    result = evaluator.summarize([evaluator.process(street(task, 1), street(task, 1), ORIGINS)]).as_dict()
    assert [result[name] for name in ('RayIoU', 'RayIoU@1', 'RayPQ', 'RayPQ@4', 'mIoU')] == [1.0] * 5
    assert result['only_free'] is False and result['mIoU_voxels'] == 'mask_camera'
    assert set(result['per_class']) == {'car', 'road', 'tree'}
    assert result['per_class']['car']['RayPQ@1'] == 1.0


def test_result_is_plain_json_without_nan(task):
    evaluator = OccEvaluator(task, ALL)
    empty = street(task, 1, cars=0)
    result = evaluator.summarize([evaluator.process(empty, empty, ORIGINS)])
    loaded = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert loaded['per_class']['car']['RayIoU'] is None
    assert loaded['RayIoU'] == 1.0  # the mean leaves absent classes out
    assert result.as_table().splitlines()[2].split() == ['car'] + ['-'] * 9


def test_only_free_is_loud(task):
    evaluator = OccEvaluator(task, ALL)
    nothing = dict(semantics=np.full(task.grid_shape, FREE), instances=np.zeros(task.grid_shape, np.int16))
    result = evaluator.summarize([evaluator.process(nothing, street(task, 1), ORIGINS)])
    assert result.only_free and result.as_dict()['only_free'] is True
    assert result.as_dict()['RayIoU'] == 0
    assert result.as_table().startswith('!!! EVERY PREDICTION IS FREE')
    some = [
        evaluator.process(nothing, street(task, 1), ORIGINS),
        evaluator.process(street(task, 2), street(task, 1), ORIGINS),
    ]
    assert not evaluator.summarize(some).only_free


def test_ignored_voxels_count_nowhere(task):
    truth = street(task, 1)
    truth['semantics'][20:] = 255
    evaluator = OccEvaluator(task, ALL)
    stats = evaluator.process(street(task, 1), truth, ORIGINS)
    result = evaluator.summarize([stats]).as_dict()
    assert result['RayIoU'] == 1.0 and result['mIoU'] == 1.0
    assert (
        0
        < stats.rays.true.sum()
        < OccEvaluator(task).process(street(task, 1), street(task, 1), ORIGINS).rays.true.sum()
    )


def test_cached_truth_changes_nothing(task):
    evaluator, first = evaluate(task)
    again = [
        evaluator.process(street(task, seed + 100), street(task, seed), ORIGINS, key=str(seed)) for seed in range(4)
    ]
    without = evaluate(task, truth_cache_mb=0)[1]
    for stats in (again, without):
        assert pickle.dumps(stats) == pickle.dumps(first)
    moved = (street(task, 100), street(task, 0), ORIGINS + 0.3, '0')  # what is kept does not apply
    fresh = OccEvaluator(task, ALL).process(*moved)
    assert pickle.dumps(evaluator.process(*moved)) == pickle.dumps(fresh)


def test_cached_truth_is_bounded(task):
    evaluator, _ = evaluate(task, truth_cache_mb=1)
    sizes = [len(kept[1].rays) for kept in evaluator._cache._samples.values()]
    assert 0 < len(sizes) < 4
    assert sum(sizes) * 13 <= 1024 * 1024


def evaluate_part(arguments):
    task, indices = arguments
    evaluator = OccEvaluator(task, ALL)
    return [evaluator.process(street(task, seed + 100), street(task, seed), ORIGINS, key=str(seed)) for seed in indices]


@pytest.mark.parametrize('processes', [2, 3])
def test_any_number_of_processes_gives_the_same_bits(task, processes):
    evaluator, stats = evaluate(task, samples=5)
    parts = [list(range(rank, 5, processes)) for rank in range(processes)]
    with multiprocessing.get_context('fork').Pool(processes) as pool:  # quick: the child imports nothing
        results = pool.map(evaluate_part, [(task, part) for part in parts])
    by_index = {index: one for part, of_part in zip(parts, results) for index, one in zip(part, of_part)}
    gathered = evaluator.summarize([by_index[index] for index in range(5)])
    assert json.dumps(gathered.as_dict()) == json.dumps(evaluator.summarize(stats).as_dict())
    assert json.dumps(evaluator.summarize(stats[::-1]).as_dict()) == json.dumps(gathered.as_dict())


def test_stats_are_small(task):
    _, stats = evaluate(task, samples=1)
    assert len(pickle.dumps(stats[0])) < 4000


def test_a_sample_counted_twice_is_an_error(task):
    evaluator, stats = evaluate(task, samples=2)
    with pytest.raises(ValueError, match='twice'):
        evaluator.summarize(stats + stats[:1])


def test_nothing_to_score(task):
    with pytest.raises(DataError, match='no samples'):
        OccEvaluator(task).summarize([])


def test_unknown_metric_is_named(task):
    with pytest.raises(ConfigError, match='ray_uio'):
        OccEvaluator(task, ('ray_uio',))


@pytest.mark.parametrize(
    'name, change, words',
    [
        ('prediction', dict(semantics=np.zeros((4, 4, 4), np.uint8)), r'prediction of sample t1.*\[4, 4, 4\]'),
        ('prediction', dict(instances=None), "no 'instances'"),
        ('truth', dict(semantics=None), "label of sample t1 has no 'semantics'"),
        ('prediction', dict(semantics=None), "no 'semantics'"),
        ('prediction', 'id', 'id 9, allowed are 0..3'),
        ('truth', 'negative', 'id -1'),
    ],
)
def test_bad_volumes_are_named(task, name, change, words):
    volumes = dict(prediction=street(task, 1), truth=street(task, 1))
    if change == 'id':
        change = dict(semantics=np.full(task.grid_shape, 9, np.uint8))
    elif change == 'negative':
        change = dict(instances=np.full(task.grid_shape, -1, np.int16))
    volumes[name].update(change)
    with pytest.raises(DataError, match=words):
        evaluator = OccEvaluator(task, ('ray_iou', 'ray_pq'))
        evaluator.process(volumes['prediction'], volumes['truth'], ORIGINS, key='t1')


@pytest.mark.parametrize(
    'file, label_set',
    [
        ('occ3d_29796060110c4163b07f06eff4af0753_labels.npz', 'occ3d'),
        ('occ3d_unknown_sample_labels.npz', 'occ3d'),
        ('openocc_unknown_sample_labels.npz', 'openocc_v2'),
    ],
)
def test_real_labels_against_themselves_score_one(real_dir, file, label_set):
    with np.load(str(real_dir / file)) as labels:
        wanted = ('semantics', 'instances', 'mask_camera')
        volumes = {name: labels[name] for name in labels.files if name in wanted}
    metrics = ('ray_iou', 'miou') + ('ray_pq',) * ('instances' in volumes)
    evaluator = OccEvaluator(Task(label_set=label_set), metrics)
    origins = np.array([[0.986, 0.0, 1.84], [5.2, -0.1, 1.9], [-20.3, 1.0, 1.8]])
    result = evaluator.summarize([evaluator.process(volumes, volumes, origins)]).as_dict()
    names = [name for name in result if name.split('@')[0] in ('RayIoU', 'RayPQ', 'mIoU')]
    assert len(names) == 5 + 4 * ('instances' in volumes)
    assert {name: result[name] for name in names} == dict.fromkeys(names, 1.0)


@needs_cuda
def test_cuda_gives_the_same_bits(task):
    evaluator, on_cpu = evaluate(task)
    on_gpu_evaluator, on_gpu = evaluate(task, device='cuda')
    again = [
        on_gpu_evaluator.process(street(task, seed + 100), street(task, seed), ORIGINS, key=str(seed))
        for seed in range(4)
    ]
    expected = json.dumps(evaluator.summarize(on_cpu).as_dict())
    for stats in (on_gpu, again):
        assert json.dumps(evaluator.summarize(stats).as_dict()) == expected


@needs_cuda
def test_cuda_takes_tensors_where_they_are(task):
    evaluator, on_cpu = evaluate(task, samples=1)
    expected = json.dumps(evaluator.summarize(on_cpu).as_dict())
    volumes = [
        {name: torch.from_numpy(array).cuda() for name, array in street(task, seed).items()} for seed in (100, 0)
    ]
    for device in ('cuda', 'cpu'):
        stats = OccEvaluator(task, ALL, device=device).process(*volumes, ORIGINS)
        assert json.dumps(evaluator.summarize([stats]).as_dict()) == expected


@needs_cuda
def test_golden_rays_on_cuda(golden_dir):
    from parity_metrics import check_rayeval

    for path in sorted(golden_dir.glob('rayeval*.npz')):
        check_rayeval(path, device='cuda')


# What the evaluation needs

ALLOWED = ('numpy', 'numba', 'llvmlite', 'tqdm', 'scipy', 'yaml')  # numba loads the last two where they are installed
EVALUATION = """
import sys
import numpy as np
from lib.infos import load_infos, split_scenes
from lib.metrics import OccEvaluator
from lib.metrics.origins import scene_ray_origins
from lib.metrics.formats import open_predictions
from lib.task import Task
task = Task(label_set='occ3d', point_cloud_range=(-2, -2, -1, 2, 2, 1))
evaluator = OccEvaluator(task, ('ray_iou', 'ray_pq', 'miou'))
volumes = dict(semantics=np.full((10, 10, 5), 4, np.uint8), instances=np.ones((10, 10, 5), np.int16))
assert evaluator.summarize([evaluator.process(volumes, volumes, np.zeros((1, 3)))]).as_dict()['RayIoU'] == 1.0
standard = set(sys.stdlib_module_names) | set(sys.builtin_module_names)
print(*{name.split('.')[0] for name, module in sys.modules.items() if getattr(module, '__file__', None)} - standard)
"""


@pytest.mark.skipif(sys.version_info < (3, 10), reason='needs the list of standard modules')
def test_an_evaluation_loads_numpy_and_numba_alone():
    done = subprocess.run(
        [sys.executable, '-c', EVALUATION], cwd=str(ROOT), stdout=subprocess.PIPE, text=True, check=True
    )
    loaded = {name for name in done.stdout.split() if not name.startswith(('_', 'sitecustomize', 'usercustomize'))}
    assert 'numba' in loaded and loaded - set(ALLOWED) <= {'lib'}


def test_importing_the_metrics_loads_numpy_alone():
    code = 'import sys, lib.metrics.origins; assert not {"numba", "torch", "mmcv", "loaders"} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], cwd=str(ROOT), check=True)
