"""Labels on other voxels: against a loop over voxels and places that follows the rule word by word."""

import math
from collections import Counter

import numpy as np
import pytest

from lib.classes import IGNORE_LABEL
from lib.geometry import Grid, find_sources, held_classes, invert_rigid, make_transform, rotation_z, take

FREE = 5
TURNED = make_transform(rotation_z(0.4), [0.3, -0.7, 0.2])


def labels(shape, seed=0):
    """Mostly free, some ignored, some of five classes."""
    rng = np.random.default_rng(seed)
    ids = rng.choice([0, 1, 2, 3, 4, FREE, IGNORE_LABEL], shape, p=[0.1, 0.1, 0.05, 0.05, 0.05, 0.6, 0.05])
    return ids.astype(np.uint8)


def by_loop(wanted, given, given_from_wanted, ids):
    result = np.full(wanted.shape, IGNORE_LABEL)
    edge = max(1, math.ceil(wanted.voxel_size / given.voxel_size - 1e-3))
    for voxel in np.ndindex(*wanted.shape):
        met = []
        for place in np.ndindex(edge, edge, edge):
            inside = (np.array(voxel) + (np.array(place) + 0.5) / edge) * wanted.voxel_size
            point = (given_from_wanted @ np.append(inside + wanted.point_cloud_range[:3], 1))[:3]
            index = np.floor((point - given.point_cloud_range[:3]) / given.voxel_size + 1e-6).astype(int)
            known = ((index >= 0) & (index < given.shape)).all()
            met.append(int(ids[tuple(index)]) if known else IGNORE_LABEL)
        counts = Counter(met)
        occupied = sorted((-count, label) for label, count in counts.items() if label not in (FREE, IGNORE_LABEL))
        result[voxel] = occupied[0][1] if occupied else IGNORE_LABEL if counts[IGNORE_LABEL] else FREE
    return result


@pytest.mark.parametrize(
    'wanted, given, transform',
    [
        (Grid('ego', (0, 0, 0, 4, 3, 2), 0.5), Grid('ego', (0, 0, 0, 4, 3, 2), 0.5), np.eye(4)),
        (Grid('ego', (0, 0, 0, 4, 3, 2), 0.5), Grid('ego', (-1, 0.5, 0, 3, 4.5, 1), 0.5), np.eye(4)),
        (Grid('ego', (0, 0, 0, 4, 3, 2), 1.0), Grid('ego', (0, 0, 0, 4, 3, 2), 0.5), np.eye(4)),
        (Grid('ego', (0, 0, 0, 3.6, 3.6, 2.4), 0.4), Grid('ego', (-1, -1, -1, 4, 4, 2), 0.5), np.eye(4)),
        (Grid('ego', (0, 0, 0, 3, 3, 1.5), 0.5), Grid('ego', (-1, -1, -1, 3.8, 3.8, 2), 0.2), np.eye(4)),
        (Grid('ego', (0, 0, 0, 4, 3, 2), 0.5), Grid('lidar', (-2, -2, -1, 4, 4, 2), 0.5), TURNED),
        (Grid('ego', (0, 0, 0, 3, 3, 1), 1.0), Grid('lidar', (-2, -2, -1, 4, 4, 2), 0.4), TURNED),
    ],
    ids=['same', 'shifted', 'half', 'finer', 'not a multiple', 'turned', 'turned and coarser'],
)
def test_the_rule(wanted, given, transform):
    ids = labels(given.shape)
    found = take(ids, find_sources(wanted, given, transform, ids, FREE), IGNORE_LABEL)
    assert (found == by_loop(wanted, given, transform, ids)).all()
    assert len(np.unique(found)) >= 3


def test_every_array_comes_from_the_same_voxel():
    """An instance id belongs to the class that won, and masks and vectors follow it."""
    wanted, given = Grid('ego', (0, 0, 0, 3, 3, 1), 1.0), Grid('ego', (0, 0, 0, 3, 3, 1), 0.25)
    ids = labels(given.shape, 1)
    sources = find_sources(wanted, given, np.eye(4), ids, FREE)
    instances = ids.astype(np.int32) * 10
    assert (take(instances, sources, 0) == take(ids, sources, IGNORE_LABEL).astype(np.int32) * 10).all()
    flow = np.stack([ids, ids], axis=-1)
    assert take(flow, sources, 0).shape == (*wanted.shape, 2)


def test_of_equals_the_lowest_id_wins_and_one_occupied_voxel_goes_before_many_free():
    wanted, given = Grid('ego', (0, 0, 0, 1, 1, 1), 1.0), Grid('ego', (0, 0, 0, 1, 1, 1), 0.5)
    for content, expected in (
        ([FREE] * 7 + [3], 3),
        ([IGNORE_LABEL] * 7 + [3], 3),
        ([4, 4, 2, 2] + [FREE] * 4, 2),
        ([4, 4, 4, 2] + [FREE] * 4, 4),
        ([FREE] * 7 + [IGNORE_LABEL], IGNORE_LABEL),
        ([FREE] * 8, FREE),
    ):
        ids = np.array(content, np.uint8).reshape(2, 2, 2)
        assert take(ids, find_sources(wanted, given, np.eye(4), ids, FREE), 9).item() == expected


def test_what_became_of_voxels_of_the_file():
    wanted, given = Grid('ego', (0, 0, 0, 4, 4, 2), 1.0), Grid('lidar', (-2, -2, -1, 4, 4, 2), 0.5)
    places = np.argwhere(np.ones(given.shape, bool))
    result = np.random.default_rng(0).integers(0, 5, wanted.shape).astype(np.uint8)
    classes = held_classes(wanted, given, TURNED, places, result)
    centres = (places + 0.5) * 0.5 + given.point_cloud_range[:3]
    back = invert_rigid(TURNED)
    for place, label in list(zip(centres, classes))[::37]:
        index = np.floor((back @ np.append(place, 1))[:3] + 1e-6).astype(int)
        inside = ((index >= 0) & (index < wanted.shape)).all()
        assert label == (result[tuple(index)] if inside else -1)
    assert 0 < (classes < 0).sum() < len(classes)
