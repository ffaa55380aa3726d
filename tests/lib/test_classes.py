"""Label sets of one's own."""

import math

import pytest

from lib.classes import OCC3D, get_label_set
from lib.errors import ConfigError

OWN = dict(name='own', class_names=('road', 'car', 'free'), things=('car',))


def test_without_counts_all_classes_weigh_the_same():
    assert get_label_set(OWN).class_weights() == (1.0, 1.0, 1.0)


def test_rare_classes_weigh_more():
    weights = get_label_set(dict(OWN, voxel_counts=dict(road=1000, car=10, free=10**6))).class_weights()
    assert weights == pytest.approx([1 / math.log(n) for n in (1000, 10, 10**6)], rel=1e-3)  # the 0.001 in the formula
    assert len(OCC3D.class_weights()) == 18 and max(OCC3D.class_weights()) < 0.1


def test_counts_of_some_classes_only_are_an_error_that_names_the_others():
    with pytest.raises(ConfigError, match=r"'own': voxel_counts lacks \['car', 'free'\]; give a count for every class"):
        get_label_set(dict(OWN, voxel_counts=dict(road=1000)))
    with pytest.raises(ConfigError, match="voxel_counts: 'roda' is not in class_names; did you mean 'road'"):
        get_label_set(dict(OWN, voxel_counts=dict(road=1, car=1, free=1, roda=1)))
