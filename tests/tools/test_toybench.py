"""Scripts of the toy benchmark: the guess that never looks, and upper bounds, on the tiny toy data set."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tools.toy.label_table import count, table
from tools.upper_bounds import fullest_blocks

ROOT = Path(__file__).resolve().parents[2]


def run(toy_root, script, *args):
    override = [f'data.{split}.data_root={toy_root}' for split in ('train', 'val')]
    config = ['--config', 'configs/toybench/small.py', '--max-samples', '2']
    words = [sys.executable, script, *config, *args, '--override', *override]
    said = subprocess.run(words, cwd=str(ROOT), check=True, stdout=subprocess.PIPE, text=True).stdout
    assert f'wrote {args[-1]}' in said


def test_baseline_and_upper_bounds(toy_root, tmp_path):
    run(toy_root, 'tools/baseline.py', '--json', str(tmp_path / 'guess.json'))
    run(toy_root, 'tools/upper_bounds.py', '--json', str(tmp_path / 'bounds.json'))
    guess, bounds = (json.loads((tmp_path / f'{name}.json').read_text()) for name in ('guess', 'bounds'))
    assert 0 < guess['RayIoU'] < bounds['seen by cameras']['RayIoU'] < 1
    assert bounds['seen by cameras']['mIoU'] == pytest.approx(1)
    for name, bound in bounds.items():
        assert 0.2 < bound['recall'] <= 1 and 0.5 < bound['RayIoU'] <= 1, name
    assert bounds['kept by the last, seen']['RayIoU'] < bounds['kept by stage 2']['RayIoU']


def test_fullest_blocks_hold_the_most():
    occupied = np.zeros((4, 4, 4), bool)
    occupied[:2, :2, :2], occupied[3, 3, 3], occupied[0, 3, 0] = True, True, True
    kept = fullest_blocks(occupied, 2, 2)
    assert kept.sum() == 16 and kept[:2, :2, :2].all() and kept[occupied].sum() == 9


def test_label_table_counts_classes_and_masks(toy_root):
    columns = count('toy', sorted((toy_root / 'occ3d').rglob('labels.npz')))
    assert 20000 < columns.all.sum() < 45000 and 0.3 < columns.camera.sum() / columns.all.sum() < 0.8
    assert np.array_equal(columns.all, columns.lidar)
    rows = table([columns]).split('\n')
    assert len(rows) == 20 and rows[-1].startswith('| voxels a keyframe') and '19,531' in rows[-1]
