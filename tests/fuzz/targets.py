"""What is fuzzed: for each kind of file a valid one, how it is damaged, and the project's public way of reading it.

A target prepares valid files once; ``damage`` writes a damaged copy and returns its path; ``read`` reads it as the
project's commands do, and checks what it was given.
"""

import gzip
import io
import json
import pickle
import pprint
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent / 'loaders'))

from mutations import JUNK, mutate_array, mutate_bytes, mutate_value  # noqa: E402

from lib.labels import read_labels  # noqa: E402
from lib.metrics.counting import FlowRays, count_flow  # noqa: E402
from lib.metrics.formats import open_predictions  # noqa: E402
from lib.metrics.origins import read_keyframes, write_poses  # noqa: E402
from lib.metrics.submission import ABOUT, read_submission  # noqa: E402
from lib.prediction import write_record  # noqa: E402
from lib.task import Task  # noqa: E402

TASK = Task(
    'occ3d', panoptic=True, point_cloud_range=(-2, -2, -1, 2, 2, 1), voxel_size=0.4, num_frames=2, image_size=(32, 64)
)
GRID, FREE = TASK.grid_shape, TASK.label_set.free_id


class Volumes(NamedTuple):
    """Valid dense arrays."""

    semantics: np.ndarray
    instances: np.ndarray
    flow: np.ndarray


def make_volumes(seed=0) -> Volumes:
    rng = np.random.default_rng(seed)
    semantics = np.where(rng.random(GRID) < 0.3, rng.integers(0, FREE, GRID), FREE).astype(np.uint8)
    instances = np.where(semantics < FREE, rng.integers(0, 9, GRID), 0).astype(np.uint8)
    return Volumes(semantics, instances, rng.normal(size=GRID + (2,)).astype(np.float32))


def npz_bytes(arrays, store=np.savez_compressed) -> bytes:
    stream = io.BytesIO()
    store(stream, **arrays)
    return stream.getvalue()


def npy_bytes(array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def damage_arrays(rng, arrays):
    """Arrays of an npz, some changed, missing, too many or under another name."""
    arrays = dict(arrays)
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(sorted(arrays))
        action = rng.randrange(10)
        if action == 0 and len(arrays) > 1:
            del arrays[name]
        elif action == 1:
            arrays[rng.choice(('pred', 'arr_0', 'occ_loc', 'instances', 'x'))] = arrays[name]
        else:
            arrays[name] = mutate_array(rng, arrays[name])
    return arrays


class Predictions:
    """One prediction file of any form."""

    def __init__(self, folder):
        self.folder = folder
        semantics, instances, flow = make_volumes()
        at = tuple(np.argwhere(semantics < FREE).T)
        self.arrays = (
            {'pred': semantics, 'pano_inst': instances, 'flow': flow},
            {'semantics': semantics, 'instances': instances, 'mask_camera': semantics < 9},
            {
                'occ_loc': np.stack(at, axis=1)[None].astype(np.uint8),
                'sem_pred': semantics[at][None],
                'pano_sem': semantics[at][None],
                'pano_inst': instances[at][None].astype(np.int16),
            },
        )

    def damage(self, rng):
        arrays = rng.choice(self.arrays)
        if rng.random() < 0.2:
            kind, content = 'npy', npy_bytes(mutate_array(rng, arrays.get('pred', make_volumes()[0])))
        else:
            arrays = damage_arrays(rng, arrays) if rng.random() < 0.6 else arrays
            kind, content = 'npz', npz_bytes(arrays, rng.choice((np.savez, np.savez_compressed)))
        path = self.folder / kind / f'a.{kind}'
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(mutate_bytes(rng, content) if rng.random() < 0.5 else content)
        return path

    def read(self, path):
        dense = open_predictions(path.parent, TASK).read(path.stem)
        check_dense(dense)


def check_dense(dense):
    assert dense['semantics'].shape == GRID and dense['semantics'].dtype == np.uint8
    assert dense['semantics'].max() <= FREE
    if 'instances' in dense:
        assert dense['instances'].shape == GRID and dense['instances'].min() >= 0
    if 'flow' in dense:
        assert dense['flow'].shape == GRID + (2,) and np.isfinite(dense['flow']).all()


class PredictionZips(Predictions):
    """A zip of predictions with a record."""

    def damage(self, rng):
        arrays = rng.choice(self.arrays)
        record = self.folder / 'record'
        record.mkdir(exist_ok=True)
        write_record(record, TASK, 'c.py', 'w.pth', 'val')
        about = json.loads((record / 'predictions.json').read_text())
        text = json.dumps(mutate_value(rng, about, plain=True) if rng.random() < 0.5 else about, default=str)
        path = self.folder / 'all.zip'
        with zipfile.ZipFile(str(path), 'w', rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            archive.writestr('predictions.json', mutate_bytes(rng, text.encode()) if rng.random() < 0.3 else text)
            for number in range(2):
                inside = npz_bytes(damage_arrays(rng, arrays) if rng.random() < 0.2 else arrays)
                name = rng.choice((f't{number}.npz',) * 9 + (f't{number}.npy', 'scene/t0/pred.npz', '../../t.npz', '/'))
                archive.writestr(name, mutate_bytes(rng, inside) if rng.random() < 0.2 else inside)
        if rng.random() < 0.4:
            path.write_bytes(mutate_bytes(rng, path.read_bytes()))
        return path

    def read(self, path):
        predictions = open_predictions(path, TASK)
        predictions.choose(['t0', 't1'], only_predicted=True)
        for token in predictions.tokens:
            check_dense(predictions.read(token))


class Submissions:
    """A submission to the occupancy and flow challenge."""

    def __init__(self, folder):
        self.folder, self.task, rng = folder, Task('openocc_v2'), np.random.default_rng(0)
        self.truth = FlowRays(
            rng.integers(0, 17, 40).astype(np.uint8),
            rng.uniform(0, 60, 40).astype(np.float16),
            rng.normal(size=(40, 2)).astype(np.float16),
        )
        entry = dict(zip(('pcd_cls', 'pcd_dist', 'pcd_flow'), self.truth))
        about = {key: ['A'] if kind is list else 'x' for key, kind in ABOUT.items()}
        self.content = dict(about, results={'a': entry, 'b': entry})

    def damage(self, rng):
        content = to_pickle(rng, mutate_value(rng, self.content) if rng.random() < 0.6 else self.content)
        content = gzip.compress(mutate_bytes(rng, content) if rng.random() < 0.5 else content, 1)
        path = self.folder / 's.gz'
        path.write_bytes(mutate_bytes(rng, content) if rng.random() < 0.2 else content)
        return path

    def read(self, path):
        results = read_submission(path, self.task, {'a': 40, 'b': 40}).results
        for token in 'ab':
            assert count_flow(self.truth, results[token], self.task.label_set).rays.sum() <= 40


class Labels:
    """A label file."""

    def __init__(self, folder):
        self.folder = folder
        semantics, instances, flow = make_volumes()
        masks = {'mask_camera': (semantics > 3).astype(np.uint8), 'mask_lidar': (semantics > 5).astype(np.uint8)}
        self.arrays = dict(masks, semantics=semantics, instances=instances, flow=flow)

    def damage(self, rng):
        arrays = damage_arrays(rng, self.arrays) if rng.random() < 0.7 else self.arrays
        content = npz_bytes(arrays, rng.choice((np.savez, np.savez_compressed)))
        path = self.folder / 'labels.npz'
        path.write_bytes(mutate_bytes(rng, content) if rng.random() < 0.4 else content)
        return path

    def read(self, path):
        labels = read_labels(path, TASK)
        known = labels['semantics'][labels['semantics'] != 255]
        assert labels['semantics'].shape == GRID and known.size and known.max() <= FREE
        assert labels['instances'].min() >= 0


class ListedLabels:
    """A label file of SurroundOcc, brought onto a coarse grid of the LiDAR's frame."""

    def __init__(self, folder):
        self.folder = folder
        self.task = Task(
            'lidarseg',
            label_files='surroundocc',
            frame='lidar',
            point_cloud_range=(-48, -48, -5, 48, 48, 3),
            voxel_size=1,
        )
        rng = np.random.default_rng(0)
        self.rows = np.column_stack([rng.integers(0, n, 3000) for n in (200, 200, 16, 17)]).astype(np.int32)

    def damage(self, rng):
        rows = mutate_array(rng, self.rows) if rng.random() < 0.7 else self.rows
        path = self.folder / 'listed.npy'
        content = npy_bytes(rows)
        path.write_bytes(mutate_bytes(rng, content) if rng.random() < 0.4 else content)
        return path

    def read(self, path):
        semantics = read_labels(path, self.task)['semantics']
        known = semantics[semantics != 255]
        assert semantics.shape == self.task.grid_shape and known.max() <= self.task.label_set.free_id


class Infos:
    """An info file, opened as a data set: history, matrices, images, ray origins and labels of two samples."""

    def __init__(self, folder):
        from fake_nuscenes import FakeNuScenes

        from lib.io import load_pickle_safe
        from loaders.prepare.sweep_infos import write_sweep_infos

        self.folder = folder
        fake = FakeNuScenes(folder / 'nuscenes', keyframes=2, image_size=(64, 36), scenes=('scene-0061',))
        fake.write()
        fake.write_labels(TASK, instances=np.zeros(GRID, np.uint8))
        write_sweep_infos(fake.root, 'v1.0-mini', fake.root, processes=1)
        self.content = load_pickle_safe(fake.root / 'nuscenes_infos_train_sweep.pkl')

    def damage(self, rng):
        content = to_pickle(rng, mutate_value(rng, self.content) if rng.random() < 0.8 else self.content)
        path = self.folder / 'infos.pkl'
        path.write_bytes(mutate_bytes(rng, content) if rng.random() < 0.3 else content)
        return path

    def read(self, path):
        from lib.infos import box_array
        from loaders import build_dataset

        pipeline = [dict(type='LoadMultiViewImageFromMultiSweeps'), dict(type='RandomTransformImage')]
        cfg = dict(type='NuSceneOcc', data_root=str(self.folder / 'nuscenes'), ann_file=str(path), pipeline=pipeline)
        dataset = build_dataset(dict(cfg, test_mode=True, occ_gt_root='occ3d'), TASK)
        for index in range(len(dataset)):
            sample = dataset[index]
            assert np.isfinite(np.asarray(sample['lidar2img'])).all() and sample['img'].shape[1] == 3
            assert dataset.ray_origins(index).shape[1] == 3
            dataset.ground_truth(index)
            box_array(dataset.info(index), path)


class Origins:
    """A file of poses or of ray origins: JSON, npz, or infos of later releases."""

    def __init__(self, folder):
        self.folder = folder
        infos = [
            dict(
                token=f't{number}',
                scene_name='s',
                timestamp=number * 5e5,
                ego2global_translation=[float(number), 0.0, 0.0],
                ego2global_rotation=[1.0, 0.0, 0.0, 0.0],
                lidar2ego_translation=[0.0, 0.0, 1.8],
                lidar2ego_rotation=[1.0, 0.0, 0.0, 0.0],
            )
            for number in range(3)
        ]
        write_poses(folder / 'poses.json', infos, dict(s='Night, rain'))
        write_poses(folder / 'poses.npz', infos, dict(s='Night, rain'))
        self.json = json.loads((folder / 'poses.json').read_text())
        with np.load(str(folder / 'poses.npz')) as file:
            self.poses = {name: file[name] for name in file.files}
        count = np.array([2, 8])
        self.origins = dict(
            token=np.array(['a', 'b']), scene=np.array(['s', 's']), count=count, origins=np.ones((2, 8, 3))
        )
        later = dict(token='t', timestamp=1.5, ego2global=np.eye(4).tolist(), lidar_points=dict(lidar2ego=np.eye(4)))
        self.later = dict(metainfo={}, data_list=[later, dict(later, token='u')])

    def damage(self, rng):
        kind = rng.choice(('json', 'npz', 'npz', 'pkl'))
        damaged = rng.random() < 0.7
        if kind == 'json':
            content = json.dumps(
                mutate_value(rng, self.json, plain=True) if damaged else self.json, default=str
            ).encode()
        elif kind == 'npz':
            arrays = rng.choice((self.poses, self.origins))
            content = npz_bytes(damage_arrays(rng, arrays) if damaged else arrays)
        else:
            content = to_pickle(rng, mutate_value(rng, self.later) if damaged else self.later)
        path = self.folder / f'origins.{kind}'
        path.write_bytes(mutate_bytes(rng, content) if rng.random() < 0.3 else content)
        return path

    def read(self, path):
        keyframes = read_keyframes(path)
        assert set(keyframes.origins) == set(keyframes.scenes)
        for origins in keyframes.origins.values():
            assert origins.ndim == 2 and origins.shape[1] == 3 and np.isfinite(origins).all()


def to_pickle(rng, content) -> bytes:
    """A pickle of what can be pickled, else of nothing."""
    try:
        return pickle.dumps(content, protocol=rng.choice((2, 4, 5)))
    except (ValueError, OverflowError, pickle.PicklingError):
        return pickle.dumps(None)


class OwnData:
    """The JSON file of one's own images, their calibration and poses."""

    def __init__(self, folder):
        self.folder = folder
        for name in ('a.jpg', 'b.jpg'):
            (folder / name).write_bytes(b'')
        pose = {'rotation': [1, 0, 0, 0], 'translation': [0.5, 0, 1]}
        camera = {'intrinsic': [[250.0, 0, 160], [0, 250.0, 90], [0, 0, 1]], 'camera2ego': pose}
        images = {'left': 'a.jpg', 'right': {'path': 'b.jpg', 'ego2global': pose}}
        frames = [{'timestamp': 0.5 * time, 'ego2global': pose, 'images': images} for time in range(3)]
        self.content = {
            'cameras': {'left': camera, 'right': camera},
            'sequences': [{'name': 'drive', 'frames': frames}, {'name': 'again', 'frames': frames[:1]}],
        }

    def damage(self, rng):
        content = mutate_value(rng, self.content, plain=True) if rng.random() < 0.8 else self.content
        text = json.dumps(content, default=str).encode()
        path = self.folder / 'own.json'
        path.write_bytes(mutate_bytes(rng, text) if rng.random() < 0.4 else text)
        return path

    def read(self, path):
        from lib.infos import current_lidar2img, past_lidar2img
        from loaders.own_data import read_own_data

        own = read_own_data(str(path))
        for info in own.infos:
            for entry in info['cams'].values():
                assert np.isfinite(current_lidar2img(entry)).all() and np.isfinite(past_lidar2img(info, entry)).all()


class Checkpoints:
    """A checkpoint of a small model."""

    def __init__(self, folder):
        import torch

        torch.manual_seed(0)
        self.folder, self.torch = folder, torch
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
        meta = {'iteration': 3, 'epoch': 1, 'classes': ['a', 'b']}
        self.content = {'meta': meta, 'state_dict': dict(self.model.state_dict()), 'optimizer': {'state': {}}}

    def damage(self, rng):
        content = mutate_value(rng, self.content) if rng.random() < 0.7 else self.content
        stream = io.BytesIO()
        try:
            self.torch.save(content, stream, _use_new_zipfile_serialization=rng.random() < 0.6)
        except (ValueError, OverflowError, UnicodeEncodeError, RuntimeError):
            stream = io.BytesIO(pickle.dumps(None))
        path = self.folder / 'w.pth'
        content = stream.getvalue()
        path.write_bytes(mutate_bytes(rng, content) if rng.random() < 0.5 else content)
        return path

    def read(self, path):
        from lib.checkpoint import load_model_weights

        load_model_weights(self.model, str(path))
        assert all(value.dtype.is_floating_point or value.numel() == 1 for value in self.model.state_dict().values())


class Configs:
    """A config of the toy set: values changed, overrides, and characters of the file; now and then the model too."""

    def __init__(self, folder):
        from lib.config import load_config

        self.folder = folder
        config = load_config('configs/toy/panoptic.py')._cfg_dict.to_dict()
        self.content = {key: value for key, value in config.items() if key != 'published'}

    def damage(self, rng):
        content = mutate_value(rng, self.content, plain=True) if rng.random() < 0.7 else self.content
        content = content if isinstance(content, dict) else {}
        text = ''.join(
            f'{name} = {pprint.pformat(value)}\n' for name, value in content.items() if str(name).isidentifier()
        )
        text = text.replace('nan', 'float("nan")').replace('inf,', 'float("inf"),').encode('utf-8', 'replace')
        path = self.folder / 'config.py'
        path.write_bytes(mutate_bytes(rng, text) if rng.random() < 0.2 else text)
        key = rng.choice(('task.voxel_size', 'train.amp', 'model.x', 'data.val.pipeline.0.type', 'seed', '', 'runner'))
        self.overrides = [f'{key}={rng.choice(JUNK)!r}'] if rng.random() < 0.2 else []
        self.with_model = rng.random() < 0.2
        return path

    def read(self, path):
        import torch

        from lib.config import load_config, require_keys
        from lib.run import read_task
        from lib.run.batch_plan import plan_batch
        from lib.run.optimizer import Schedule, build_optimizer, clip_norm
        from lib.run.train_script import run_length
        from lib.settings import TrainSettings
        from loaders.pipelines import build_pipeline
        from models import build_model

        config = load_config(str(path), self.overrides)
        task = read_task(config)
        require_keys(config, ('data.train', 'data.train.pipeline', 'optimizer', 'runner', 'total_batch_size'))
        build_pipeline(config.data.train.pipeline, task)
        settings = TrainSettings.from_config(config.get('train'))
        plan_batch(config.total_batch_size, 1, settings.accumulate, settings.max_samples_per_gpu)
        epochs, iterations = run_length(config.runner, 10)
        Schedule.from_config(config.get('lr_config'), epochs, iterations, 10).factor(3)
        clip_norm(config.get('optimizer_config'))
        model = (
            build_model(config.model, task)
            if self.with_model
            else torch.nn.ModuleDict(dict(sampling_offset=torch.nn.Linear(2, 2)))
        )
        build_optimizer(model, config.optimizer)


TARGETS = {
    'predictions': Predictions,
    'prediction_zips': PredictionZips,
    'submissions': Submissions,
    'labels': Labels,
    'listed_labels': ListedLabels,
    'infos': Infos,
    'origins': Origins,
    'own_data': OwnData,
    'checkpoints': Checkpoints,
    'configs': Configs,
}
