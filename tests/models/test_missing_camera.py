"""A camera that a frame lacks: its place in the batch holds a black image, and nothing in it can matter."""

import numpy as np
import pytest
import torch
from small_model import small_batch, small_model, small_task

from lib.infos import NOWHERE
from loaders.pipelines.augmentation import ImageTransform


@pytest.mark.parametrize('place', [0, 1, 4])
@pytest.mark.parametrize('mirror', [False, True])
def test_what_stands_in_the_place_of_a_missing_image_changes_nothing(place, mirror):
    """Camera 0 of the current frame, which points that no camera sees are looked up in, is among the places."""
    task = small_task()
    model, batch = small_model(task).eval(), small_batch(task, with_labels=False)
    crop = ImageTransform(0.44, (99, 176), 40, 35, (64, 96), mirror)
    batch['lidar2img'][0, place] = torch.from_numpy(crop.matrix() @ NOWHERE).float()
    assert _same(model, batch, place)


def test_the_comparison_notices_an_image_that_is_seen():
    task = small_task()
    assert not _same(small_model(task).eval(), small_batch(task, with_labels=False), 0)


def _same(model, batch, place):
    """Predictions with a black and with a white image there are equal."""
    predictions = []
    for value in (0, 255):
        changed = dict(batch, img=batch['img'].clone())
        changed['img'][0, place] = value
        with torch.no_grad():
            predictions.append(model(return_loss=False, **changed)[0])
    assert predictions[0]['occ_loc'].size > 0
    return all(np.array_equal(predictions[1][key], expected) for key, expected in predictions[0].items())
