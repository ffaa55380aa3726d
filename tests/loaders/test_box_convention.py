"""Info files of either box convention give the same boxes."""

import numpy as np

from lib.io import load_pickle_safe
from loaders.prepare.sweep_infos import holds_width_first, with_length_first

CAR = [10.0, 2.0, -0.5, 4.6, 1.9, 1.6, 0.3]


def info_of(*boxes, names=None):
    return dict(gt_boxes=np.array(boxes).reshape(-1, 7), gt_names=np.array(names or ['car'] * len(boxes)))


def as_before_1_0(box):
    x, y, z, length, width, height, yaw = box
    return [x, y, z, width, length, height, -yaw - np.pi / 2]


def test_length_first_stays_as_it_is():
    infos = [info_of(CAR), info_of()]
    assert not holds_width_first(infos)
    assert with_length_first(infos)[0] is infos[0]


def test_width_first_is_converted_and_the_input_kept():
    old = [info_of(as_before_1_0(CAR), as_before_1_0(CAR)), info_of()]
    before = old[0]['gt_boxes'].copy()
    np.testing.assert_allclose(with_length_first(old)[0]['gt_boxes'], [CAR, CAR], atol=1e-12)  # rounding of pi
    np.testing.assert_array_equal(old[0]['gt_boxes'], before)


def test_classes_that_are_about_square_do_not_decide():
    person = [0, 0, 0, 0.6, 0.7, 1.7, 0]
    assert not holds_width_first([info_of(CAR, person, person, names=['car', 'pedestrian', 'pedestrian'])])


def test_real_cars_drive_along_their_length(real_dir):
    """The heading of a car that moves is its yaw: 0.5 rad leaves room for curves and noisy velocities."""
    infos = with_length_first(load_pickle_safe(real_dir / 'nuscenes_mini_infos_val.pkl')['infos'])
    turns = []
    for info in infos:
        for box, name, (vx, vy) in zip(info['gt_boxes'], info['gt_names'], info['gt_velocity']):
            if name == 'car' and np.hypot(vx, vy) > 2:
                assert box[3] > box[4]
                turns.append(np.angle(np.exp(1j * (np.arctan2(vy, vx) - box[6]))))
    assert len(turns) > 50 and np.quantile(np.abs(turns), 0.95) < 0.5
