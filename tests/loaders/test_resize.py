"""Resizing: Pillow's pixels to the bit, whatever the sizes and the part asked for."""

import runpy
import sys

import numpy as np
import pytest
from PIL import Image

from lib.errors import UserError
from loaders.pipelines import resize
from loaders.pipelines.resize import bicubic_taps, resize_window


def _noise(height, width, seed=0, harsh=False):
    """Random uint8 [height, width, 3]; harsh: black and white, which overshoots."""
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(image > 127, 255, 0).astype(np.uint8) if harsh else image


def _pillow(image, height, width):
    """Along rows first, as Pillow up to version 12 does in one call; 13 goes along columns first for some sizes."""
    rows = Image.fromarray(image).resize((width, image.shape[0]), Image.BICUBIC)
    return np.asarray(rows.resize((width, height), Image.BICUBIC))


@pytest.mark.parametrize('seed', range(40))
def test_any_size_is_as_pillow_makes_it(seed):
    """Up, down, and by different factors along rows and columns."""
    height, width, new_height, new_width = np.random.default_rng(seed).integers(1, 200, 4).tolist()
    image = _noise(height, width, seed, harsh=seed % 2 == 1)
    made = resize_window(image, (new_height, new_width), (0, new_height), (0, new_width))
    np.testing.assert_array_equal(made, _pillow(image, new_height, new_width))


def test_every_width_of_training_is_as_pillow_makes_it():
    """1600 pixels to 0.38..0.55 of that; columns have the same weights."""
    image = _noise(2, 1600)
    for width in range(608, 881):
        np.testing.assert_array_equal(resize_window(image, (2, width), (0, 2), (0, width)), _pillow(image, 2, width))


def test_a_part_is_cut_from_the_whole():
    image = _noise(90, 160)
    whole = resize_window(image, (40, 70), (0, 40), (0, 70))
    np.testing.assert_array_equal(resize_window(image, (40, 70), (11, 33), (1, 69)), whole[11:33, 1:69])


def test_what_the_part_does_not_need_is_not_looked_at():
    image = _noise(90, 160)
    part = resize_window(image, (40, 70), (20, 40), (0, 70))
    first, _ = bicubic_taps(90, 40).of(20, 40).span()
    assert first > 30  # of row 20's centre at 46, less two of the result's pixels
    image[:first] = 0
    np.testing.assert_array_equal(resize_window(image, (40, 70), (20, 40), (0, 70)), part)


def test_a_view_with_gaps_is_read_as_it_is():
    image = _noise(60, 80)
    made = resize_window(image[:, ::2], (20, 30), (0, 20), (0, 30))
    np.testing.assert_array_equal(made, _pillow(np.ascontiguousarray(image[:, ::2]), 20, 30))


def test_importing_needs_no_numba_and_resizing_says_that_it_does(monkeypatch):
    monkeypatch.setitem(sys.modules, 'numba', None)
    module = runpy.run_path(resize.__file__)
    with pytest.raises(UserError, match="package 'numba' is not installed"):
        module['compile_resizing']()
