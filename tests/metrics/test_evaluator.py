"""The evaluator on whole volumes: what it refuses, how it adds up, and that a GPU counts the same."""

import json
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated_ray_kernel import EmulatedExtension

from lib import raycast
from lib.errors import ConfigError, DataError
from lib.metrics import Evaluator, cuda, evaluate
from lib.task import Task

ROOT = Path(__file__).resolve().parents[2]
CAR, ROAD, TREE, FREE = 0, 1, 2, 3
SMALL_LABELS = dict(name='small', class_names=('car', 'road', 'tree', 'free'), things=('car',))
ORIGINS = np.array([[0.0, 0.0, 1.0], [5.2, -3.0, 1.1], [11.0, 4.0, 0.9]])
ALL = ('ray_iou', 'ray_pq', 'miou')
needs_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and raycast.extension_available()), reason='needs a GPU and the built extension'
)


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


def scored(task, samples=range(4), metrics=ALL, scenes=('one', 'two'), **how):
    """An evaluator that has seen some samples."""
    evaluator = Evaluator(task, metrics, **how)
    for seed in samples:
        scene = scenes[seed % len(scenes)]
        evaluator.update(street(task, seed + 100), street(task, seed), ORIGINS + 0.1 * seed, str(seed), scene)
    return evaluator


def figures(evaluator):
    """Everything that is scored, as text."""
    return json.dumps(evaluator.compute().as_dict(details=True), sort_keys=True)


# Scores


def test_truth_as_prediction_scores_one(task):
    evaluator = Evaluator(task, ALL)
    evaluator.update(street(task, 1), street(task, 1), ORIGINS)
    result = evaluator.compute().as_dict()
    names = ('RayIoU', 'RayIoU@1', 'RayPQ', 'RayPQ@4', 'RaySQ', 'RayRQ', 'RayPQ_things', 'RayPQ_stuff', 'mIoU')
    assert [result[name] for name in names + ('binary_IoU',)] == [1.0] * 10
    assert result['only_free'] is False and result['mIoU_voxels'] == 'mask_camera'
    assert set(result['per_class']) == {'car', 'road', 'tree'}
    assert result['per_class']['car']['RayPQ@1'] == 1.0


def test_result_is_plain_json_without_nan(task):
    evaluator = Evaluator(task, ALL)
    empty = street(task, 1, cars=0)
    evaluator.update(empty, empty, ORIGINS)
    result = evaluator.compute()
    loaded = json.loads(json.dumps(result.as_dict(details=True), allow_nan=False))
    assert loaded['per_class']['car']['RayIoU'] is None
    assert loaded['RayIoU'] == 1.0  # the mean leaves absent classes out
    assert result.as_table().splitlines()[2].split() == ['car'] + ['-'] * 9


def test_only_free_is_loud(task):
    nothing = dict(semantics=np.full(task.grid_shape, FREE), instances=np.zeros(task.grid_shape, np.int16))
    evaluator = Evaluator(task, ALL)
    evaluator.update(nothing, street(task, 1), ORIGINS)
    result = evaluator.compute()
    assert result.only_free and result.as_dict()['only_free'] is True
    assert result.as_dict()['RayIoU'] == 0
    assert result.as_table().startswith('!!! EVERY PREDICTION IS FREE')
    evaluator.update(street(task, 2), street(task, 1), ORIGINS)
    assert not evaluator.compute().only_free


def test_ignored_voxels_count_nowhere(task):
    truth = street(task, 1)
    truth['semantics'][20:] = 255
    some, everything = Evaluator(task, ALL), Evaluator(task, ALL)
    some.update(street(task, 1), truth, ORIGINS)
    everything.update(street(task, 1), street(task, 1), ORIGINS)
    result = some.compute()
    assert result.totals['RayIoU'] == 1.0 and result.totals['mIoU'] == 1.0
    assert 0 < result.counts.rays.sum() < everything.compute().counts.rays.sum()


def test_thresholds_can_be_chosen(task):
    published, other = scored(task), scored(task, thresholds=[4, 0.5])
    scores = other.compute().as_dict()
    assert [name for name in scores if '@' in name] == ['RayIoU@0.5', 'RayIoU@4', 'RayPQ@0.5', 'RayPQ@4']
    assert scores['RayIoU@4'] == published.compute().as_dict()['RayIoU@4']
    assert scores['RayIoU'] == (scores['RayIoU@0.5'] + scores['RayIoU@4']) / 2


@pytest.mark.parametrize(
    'mask, voxels', [('lidar', 'mask_lidar'), ('both', 'mask_camera and mask_lidar'), ('none', 'all')]
)
def test_the_mask_is_chosen_and_named(task, mask, voxels):
    truth, prediction = street(task, 1), street(task, 101)
    truth['mask_lidar'] = np.random.default_rng(5).random(task.grid_shape) < 0.4
    evaluator = Evaluator(task, ['miou'], miou_mask=mask)
    evaluator.update(prediction, truth)
    counted = dict(
        lidar=truth['mask_lidar'], both=truth['mask_lidar'] & truth['mask_camera'], none=np.ones(task.grid_shape, bool)
    )[mask]
    both, either = (
        [np.sum(how(truth['semantics'] == label, prediction['semantics'] == label)[counted]) for label in range(FREE)]
        for how in (np.logical_and, np.logical_or)
    )
    result = evaluator.compute()
    np.testing.assert_allclose(result.totals['mIoU'], np.mean(np.divide(both, either)), rtol=1e-15)
    assert result.as_dict()['mIoU_voxels'] == voxels
    assert ('all voxels' if mask == 'none' else f'the voxels of {voxels}') in result.as_table()


def test_masks_are_never_mixed(task):
    without = {name: volume for name, volume in street(task, 1).items() if name != 'mask_camera'}
    evaluator = Evaluator(task, ['miou'])
    evaluator.update(street(task, 0), street(task, 0), token='a')
    with pytest.raises(DataError, match='sample b have another mask .* mIoU never mixes them'):
        evaluator.update(street(task, 0), without, token='b')
    chosen = Evaluator(task, ['miou'], miou_mask='camera')
    with pytest.raises(DataError, match="label of sample b has no 'mask_camera'"):
        chosen.update(street(task, 0), without, token='b')
    other = Evaluator(task, ['miou'])
    other.update(street(task, 0), without, token='b')
    assert other.compute().mask == 'none'
    with pytest.raises(DataError, match='mIoU never mixes them'):
        other.update(street(task, 0), street(task, 0), token='c')
    with pytest.raises(DataError, match='mIoU never mixes them'):
        evaluator.merge(other)
    with pytest.raises(ConfigError, match='miou_mask'):
        Evaluator(task, ['miou'], miou_mask='camra')


def test_confusion_says_what_is_taken_for_what(task):
    truth, prediction = street(task, 1, cars=0), street(task, 1, cars=0)
    prediction['semantics'][prediction['semantics'] == TREE] = CAR
    evaluator = Evaluator(task, ('ray_iou', 'miou'), miou_mask='none')
    evaluator.update(prediction, truth, ORIGINS)
    confusion = evaluator.compute().as_dict(details=True)['confusion']
    for what in ('rays', 'voxels'):
        assert confusion[what][TREE][CAR] > 0 and confusion[what][TREE][TREE] == confusion[what][CAR][CAR] == 0
    assert np.sum(confusion['voxels']) == truth['semantics'].size


def test_parts_add_up():
    task = Task('occ3d')
    rng = np.random.default_rng(0)
    volumes = []
    for seed in range(2):
        semantics = np.full(task.grid_shape, 17, np.uint8)
        semantics[:, :, 2] = 11
        semantics[rng.random(task.grid_shape) < 0.01] = 4
        volumes.append(dict(semantics=semantics, instances=np.where(semantics == 4, seed + 1, 0)))
    evaluator = Evaluator(task, ALL, breakdown=True, miou_mask='none')
    for token in 'ab':
        evaluator.update(volumes[0], volumes[1], np.array([[1.0, 0.0, 1.8]]), token, token)
    whole = Evaluator(task, ALL, miou_mask='none')
    whole.update(volumes[0], volumes[1], np.array([[1.0, 0.0, 1.8]]))
    result = evaluator.compute(night=dict(a=True, b=False))
    groups = result.groups()
    assert list(groups) == ['rings', 'sectors', 'conditions', 'scenes']
    assert list(groups['rings']) == ['0-10 m', '10-20 m', '20-40 m', 'over 40 m']
    assert groups['conditions']['night'] == groups['scenes']['a'] == whole.compute().totals
    assert result.totals == whole.compute().totals  # twice the same sample
    rays = result.counts.rays.reshape(4, 6, -1).sum(axis=-1)
    assert (rays > 0).all() and rays.sum() == 2 * whole.compute().counts.rays.sum()
    near, far = groups['rings']['0-10 m'], groups['rings']['20-40 m']
    assert near['RayIoU@1'] > far['RayIoU@1']  # rays that miss each other drift apart


def test_intervals_come_from_scenes(task):
    result = scored(task, range(8), scenes=[f'scene {n}' for n in range(4)]).compute()
    for name, (low, high) in result.intervals().items():
        assert low <= result.totals[name] <= high or name == 'RaySQ', name
    assert set(result.intervals()) == set(result.totals)
    assert '95 % from' in result.as_table() and '4 scenes' in result.as_table()
    assert scored(task, range(8), scenes=['one']).compute().intervals() == {}
    assert scored(task, range(8), scenes=['']).compute().scenes == {}


def test_samples_can_be_kept(task):
    result = scored(task, keep_samples=True).compute()
    assert [(token, scene) for token, scene, _ in result.samples] == [
        ('0', 'one'),
        ('1', 'two'),
        ('2', 'one'),
        ('3', 'two'),
    ]
    alone = Evaluator(task, ALL)
    alone.update(street(task, 102), street(task, 2), ORIGINS + 0.2)
    assert result.samples[2][2] == alone.compute().totals


# Adding up


def score_part(arguments):
    task, samples = arguments
    return scored(task, samples, keep_samples=True)


@pytest.mark.parametrize('processes', [2, 3])
def test_any_number_of_processes_gives_the_same_bits(task, processes):
    parts = [range(rank, 5, processes) for rank in range(processes)]
    with multiprocessing.get_context('fork').Pool(processes) as pool:  # quick: the child imports nothing
        first, *others = pool.map(score_part, [(task, part) for part in parts])
    first.merge(*others)
    assert figures(first) == figures(scored(task, range(5)))
    assert figures(scored(task, range(4, -1, -1))) == figures(first)
    assert len(first.compute().samples) == 5


def test_what_is_sent_between_processes_is_small(task):
    assert len(pickle.dumps(scored(task))) < 30000
    assert len(pickle.dumps(scored(task, range(12)))) < 1.1 * len(pickle.dumps(scored(task)))


def test_a_sample_counted_twice_is_an_error(task):
    evaluator = scored(task, range(2))
    with pytest.raises(DataError, match='sample 1 is counted twice'):
        evaluator.update(street(task, 1), street(task, 1), ORIGINS, '1')
    with pytest.raises(DataError, match='twice'):
        evaluator.merge(scored(task, range(1, 3)))


def test_reset_forgets(task):
    evaluator = scored(task)
    evaluator.reset()
    with pytest.raises(DataError, match='no samples'):
        evaluator.compute()
    evaluator.update(street(task, 100), street(task, 0), ORIGINS, '0')
    assert evaluator.compute().num_samples == 1


def test_function_scores_what_is_at_hand(task):
    labels = {str(seed): street(task, seed) for seed in range(4)}
    predictions = {str(seed): street(task, seed + 100) for seed in range(4)}
    origins = {str(seed): ORIGINS + 0.1 * seed for seed in range(4)}
    scenes = {str(seed): ('one', 'two')[seed % 2] for seed in range(4)}
    result = evaluate(predictions, labels, origins, task, ALL, scenes)
    assert result.as_dict(details=True) == scored(task).compute().as_dict(details=True)
    only = evaluate({'0': predictions['0']['semantics']}, labels, task=task, metrics=['miou'], tokens=['0'])
    assert only.num_samples == 1
    for change, words in (
        (dict(predictions={}), 'sample 0 has no prediction'),
        (dict(origins=None), 'sample 0 has no ray origins'),
        (dict(tokens=['5']), 'sample 5 has no prediction'),
    ):
        with pytest.raises(DataError, match=words):
            evaluate(**dict(dict(predictions=predictions, labels=labels, origins=origins, task=task), **change))


# What is refused


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(metrics=('ray_uio',)), "'ray_uio' is not known; did you mean 'ray_iou'"),
        (dict(metrics='miou'), 'give a list'),
        (dict(metrics=()), 'give a list'),
        (dict(thresholds=[0, 1]), 'positive'),
        (dict(thresholds=[]), 'positive'),
        (dict(thresholds=range(1, 30)), 'at most'),
        (dict(task='occ3'), "unknown label set 'occ3'"),
    ],
)
def test_wrong_settings_are_named(change, words):
    with pytest.raises(ConfigError, match=words):
        Evaluator(**change)


@pytest.mark.parametrize(
    'name, change, words',
    [
        ('prediction', dict(semantics=np.zeros((4, 4, 4), np.uint8)), r'prediction of sample t1.*\[4, 4, 4\]'),
        ('prediction', dict(instances=None), "no 'instances', which ray_pq needs; leave"),
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
        Evaluator(task, ('ray_iou', 'ray_pq')).update(volumes['prediction'], volumes['truth'], ORIGINS, 't1')


@pytest.mark.parametrize('origins', [None, np.zeros((2, 2)), np.full((1, 3), np.nan)])
def test_bad_origins_are_named(task, origins):
    with pytest.raises(DataError, match='ray origins of sample t1'):
        Evaluator(task).update(street(task, 1), street(task, 1), origins, 't1')


def test_without_origins_nothing_is_counted(task):
    evaluator = Evaluator(task, ALL)
    evaluator.update(street(task, 1), street(task, 1), np.empty((0, 3)))
    assert np.isnan(evaluator.compute().totals['RayIoU'])


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
    evaluator = Evaluator(label_set, metrics)
    evaluator.update(volumes, volumes, np.array([[0.986, 0.0, 1.84], [5.2, -0.1, 1.9], [-20.3, 1.0, 1.8]]))
    scores = evaluator.compute().totals
    assert len(scores) == 6 + 8 * ('instances' in volumes) and set(scores.values()) == {1.0}


# On a GPU


def test_samples_wait_for_each_other_on_a_gpu(task, tmp_path, monkeypatch):
    """All of the CUDA path but the copies to the device, with the kernel compiled for the CPU."""

    def to_device(name, pairs, device):
        volumes = np.array(pairs)
        return torch.from_numpy(volumes.view(np.int16) if volumes.dtype == np.uint16 else volumes)

    extension = EmulatedExtension(tmp_path)
    monkeypatch.setattr(raycast, '_check_tensors', lambda *tensors: None)
    monkeypatch.setattr(raycast.EXTENSION, 'find', lambda device: extension)
    monkeypatch.setattr(cuda, '_to_device', to_device)
    monkeypatch.setattr('lib.metrics._CUDA_BATCH', 3)
    waiting = Evaluator(task, ALL, keep_samples=True, breakdown=True)
    waiting.device, on_cuda = 'cuda', waiting._counter.on_cuda
    monkeypatch.setattr(waiting._counter, 'on_cuda', lambda samples, device: on_cuda(samples, 'cpu'))
    for seed in range(4):
        scene = ('one', 'two')[seed % 2]
        origins = (ORIGINS + 0.1 * seed)[: 3 - seed % 3]
        waiting.update(street(task, seed + 100), street(task, seed), origins, str(seed), scene)
    assert len(waiting._waiting) == 1
    expected = Evaluator(task, ALL, keep_samples=True, breakdown=True)
    for seed in range(4):
        scene = ('one', 'two')[seed % 2]
        origins = (ORIGINS + 0.1 * seed)[: 3 - seed % 3]
        expected.update(street(task, seed + 100), street(task, seed), origins, str(seed), scene)
    assert figures(waiting) == figures(expected)
    assert waiting.compute().samples == expected.compute().samples


@needs_cuda
@pytest.mark.parametrize('samples', [1, 20])
def test_cuda_gives_the_same_bits(task, samples):
    assert figures(scored(task, range(samples), device='cuda')) == figures(scored(task, range(samples)))


@needs_cuda
def test_samples_may_have_different_numbers_of_origins(task):
    for device in ('cpu', 'cuda'):
        evaluator = Evaluator(task, ALL, device=device)
        for count in range(4):
            evaluator.update(street(task, count + 100), street(task, count), ORIGINS[:count], str(count))
        if device == 'cpu':
            expected = figures(evaluator)
    assert figures(evaluator) == expected


@needs_cuda
def test_cuda_takes_tensors(task):
    volumes = [
        {name: torch.from_numpy(array).cuda() for name, array in street(task, seed).items()} for seed in (100, 0)
    ]
    for device in ('cuda', 'cpu'):
        evaluator = Evaluator(task, ALL, device=device)
        evaluator.update(*volumes, ORIGINS, '0', 'one')
        assert figures(evaluator) == figures(scored(task, range(1)))


@needs_cuda
def test_golden_rays_on_cuda(golden_dir):
    from parity_metrics import check_rayeval

    for path in sorted(golden_dir.glob('rayeval*.npz')):
        check_rayeval(path, device='cuda')


# What the evaluation needs

FOREIGN = {
    'torch',
    'torchvision',
    'mmcv',
    'mmdet',
    'mmseg',
    'mmdet3d',
    'nuscenes',
    'cv2',
    'PIL',
    'loaders',
    'models',
    'tools',
}
EVALUATION = """
import sys
import numpy as np
from lib.infos import load_infos, split_scenes
from lib.metrics import Evaluator, scene_ray_origins
from lib.metrics.formats import open_predictions
from lib.task import Task
evaluator = Evaluator(Task('occ3d', point_cloud_range=(-2, -2, -1, 2, 2, 1)), ('ray_iou', 'ray_pq', 'miou'))
volumes = dict(semantics=np.full((10, 10, 5), 4, np.uint8), instances=np.ones((10, 10, 5), np.int16))
evaluator.update(volumes, volumes, np.zeros((1, 3)))
assert evaluator.compute().totals['RayIoU'] == 1.0
standard = set(sys.stdlib_module_names) | set(sys.builtin_module_names)
print(*{name.split('.')[0] for name, module in sys.modules.items() if getattr(module, '__file__', None)} - standard)
"""


@pytest.mark.skipif(sys.version_info < (3, 10), reason='needs the list of standard modules')
def test_an_evaluation_loads_numpy_and_numba_alone():
    done = subprocess.run(
        [sys.executable, '-c', EVALUATION], cwd=str(ROOT), stdout=subprocess.PIPE, text=True, check=True
    )
    loaded = set(done.stdout.split())  # what else numba finds to load depends on the machine
    assert 'numba' in loaded and not loaded & FOREIGN


def test_importing_the_metrics_loads_numpy_alone():
    code = 'import sys, lib.metrics.origins; assert not {"numba", "torch", "mmcv", "loaders"} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], cwd=str(ROOT), check=True)
