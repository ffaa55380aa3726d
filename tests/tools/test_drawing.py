"""The voxel renderer: what is in front covers what is behind, and axes point where they should."""

import numpy as np
import pytest

from lib.task import Task
from tools.drawing.figure import draw_figure
from tools.drawing.frames import Volume
from tools.drawing.render import BACKGROUND, Camera, class_colours, instance_colours, render_bird_eye, render_oblique

RANGE_MIN, VOXEL = (-8.0, -8.0, 0.0), 1.0
RED, GREEN = (250, 10, 10), (10, 250, 10)


def _volume(**voxels):
    """occupied and colours of a 16x16x4 grid with one block of voxels per colour."""
    occupied, colours = np.zeros((16, 16, 4), bool), np.zeros((16, 16, 4, 3), np.uint8)
    for name, where in voxels.items():
        occupied[where], colours[where] = True, RED if name == 'red' else GREEN
    return occupied, colours


def _share(image, colour):
    """Share of pixels whose strongest channel is that of ``colour`` by far."""
    channel = int(np.argmax(colour))
    others = [c for c in range(3) if c != channel]
    return (image[..., channel].astype(int) - image[..., others].max(axis=-1).astype(int) > 60).mean()


def test_bird_eye_points_ahead_up_and_left_left():
    occupied, colours = _volume(red=np.s_[15, 8, 0], green=np.s_[8, 15, 0])
    image = render_bird_eye(occupied, colours, pixels_per_voxel=1)
    assert image[0, 7, 0] > 150 and image[0, 7, 1] < 50  # farthest ahead: top row
    assert image[7, 0, 1] > 150 and image[7, 0, 0] < 50  # farthest left: first column
    assert tuple(image[15, 15]) == BACKGROUND


def test_bird_eye_shows_the_topmost_voxel():
    occupied, colours = _volume(red=np.s_[8, 8, 0], green=np.s_[8, 8, 3])
    assert _share(render_bird_eye(occupied, colours), GREEN) > 0
    assert _share(render_bird_eye(occupied, colours), RED) == 0


@pytest.mark.parametrize('position', [(-30.0, 0.5, 2.0), (30.0, -3.0, 1.0), (0.0, 30.0, 2.0), (1.0, -30.0, 2.0)])
def test_oblique_wall_hides_what_is_behind(position):
    """Seen from any side, the wall that faces the camera covers a lower block behind it."""
    wall = {(-1, 0): np.s_[2, :, :], (1, 0): np.s_[13, :, :], (0, 1): np.s_[:, 13, :], (0, -1): np.s_[:, 2, :]}
    side = tuple(int(np.sign(p)) if abs(p) > 20 else 0 for p in position[:2])
    occupied, colours = _volume(red=np.s_[7:9, 7:9, 0:2], green=wall[side])
    image = render_oblique(occupied, colours, RANGE_MIN, VOXEL, (120, 200), Camera(position, (0.0, 0.0, 1.5), 50.0))
    assert _share(image, GREEN) > 0.05
    assert _share(image, RED) == 0
    occupied, colours = _volume(red=np.s_[7:9, 7:9, 0:2])
    image = render_oblique(occupied, colours, RANGE_MIN, VOXEL, (120, 200), Camera(position, (0.0, 0.0, 1.5), 50.0))
    assert _share(image, RED) > 0  # without the wall the block is seen


def test_oblique_draws_left_on_the_left():
    occupied, colours = _volume(red=np.s_[8, 14, 0], green=np.s_[8, 1, 0])
    image = render_oblique(
        occupied, colours, RANGE_MIN, VOXEL, (120, 200), Camera((-20.0, 0.0, 12.0), (0.0, 0.0, 0.0), 60.0)
    )
    assert _share(image[:, :100], RED) > 0 and _share(image[:, 100:], RED) == 0
    assert _share(image[:, 100:], GREEN) > 0 and _share(image[:, :100], GREEN) == 0


def test_colours_of_ignored_voxels_and_of_instances():
    colours = class_colours(np.array([0, 1, 255], np.uint8), [RED, GREEN])
    assert colours.tolist() == [list(RED), list(GREEN), [90, 90, 90]]
    ids = instance_colours(np.arange(200))
    assert len(np.unique(ids[1:40], axis=0)) == 39  # neighbouring ids never share a colour


@pytest.mark.parametrize('count', [1, 2])
@pytest.mark.parametrize('cameras', [0, 1, 6])
def test_figure_of_any_number_of_cameras_and_volumes(count, cameras):
    task = Task(label_set='occ3d', point_cloud_range=(-8, -8, 0, 8, 8, 4), voxel_size=1.0)
    semantics = np.full(task.grid_shape, task.label_set.free_id, np.uint8)
    semantics[:, :, 0], semantics[8:10, 3:5, 1] = 11, 4
    instances = (semantics == 4).astype(np.int16)
    images = {name: np.zeros((90, 160, 3), np.uint8) for name in task.cameras[:cameras]}
    volumes = [Volume(f'v{i}', semantics, instances if i else None) for i in range(count)]
    image = draw_figure(task, volumes, images, 'title')
    assert image.dtype == np.uint8 and image.shape[1:] == (1600, 3)
