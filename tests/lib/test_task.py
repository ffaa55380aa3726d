"""The task of a config: wrong values are named, right ones of any number type are read."""

import numpy as np
import pytest

from lib.classes import OCC3D
from lib.errors import ConfigError
from lib.task import Task

GOOD = dict(label_set='occ3d', point_cloud_range=[0, 0, 0, 4, 4, 2], voxel_size=1.0)
BAD = {
    'point_cloud_range': [5, 'x', [0, 1], [0, 0, 0, 4, 4, 'a'], [0, 0, 0, 4, 4, float('nan')], [0, 0, 0, 4, 4, None]],
    'voxel_size': [0, -1, None, 'x', [1.0], float('inf'), True, 1e-9],
    'num_frames': [0, 1.5, '8', None, float('inf'), 10**400],
    'cameras': [[], 'CAM', 3, ['A', 'A'], [3], [''], None],
    'image_size': [256, [256], [16, 704], [256, '704'], [256.5, 704], [float('nan')] * 2],
    'panoptic': [None, 'yes', 1],
    'label_set': [None, 3, 'occ4d', [], {'name': 'x'}, {3: 4}, dict(name='x', class_names='free', things=[])],
}


@pytest.mark.parametrize('key, value', [(key, value) for key, values in BAD.items() for value in values])
def test_wrong_values_are_named(key, value):
    with pytest.raises(ConfigError, match='label' if key == 'label_set' else f'task.{key}') as caught:
        Task.from_config(dict(GOOD, **{key: value}))
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('cfg', [None, 3, [], {'label_set': 'occ3d', 3: 4}])
def test_what_is_no_task_is_named(cfg):
    with pytest.raises(ConfigError, match='task'):
        Task.from_config(cfg)


def test_any_type_of_number_and_a_label_set_of_ones_own_are_read():
    own = dict(name='mine', class_names=['a', 'b', 'free'], things=['b'], colours=dict(a=[1, 2, 3]))
    task = Task.from_config(dict(GOOD, point_cloud_range=list(np.arange(6.0)), voxel_size=np.float32(1), label_set=own))
    assert task.grid_shape == (3, 3, 3) and task.label_set.thing_ids == (1,)
    assert Task.from_config(dict(GOOD, image_size=[32.0, 64])).image_size == (32, 64)
    assert Task(OCC3D).label_set is OCC3D


@pytest.mark.parametrize(
    'change',
    [dict(name=3), dict(things=[3]), dict(colours=dict(a=[1, 2])), dict(colours=7), dict(voxel_counts=dict(a='x'))],
)
def test_wrong_fields_of_a_label_set_are_named(change):
    own = dict(name='mine', class_names=['a', 'b', 'free'], things=['b'])
    with pytest.raises(ConfigError, match=f'task.label_set.{next(iter(change))}.* must be '):
        Task.from_config(dict(GOOD, label_set=dict(own, **change)))
