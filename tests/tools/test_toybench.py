"""Scripts of the toy benchmark: the guess that never looks, and upper bounds, on the tiny toy data set."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tools import baseline, upper_bounds
from tools.toy.label_table import count, table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(toy_root, monkeypatch, capsys):
    """Run a script on two samples with more arguments, the last of which is the file that it writes."""
    override = [f'data.{split}.data_root={toy_root}' for split in ('train', 'val')]
    config = ['--config', str(ROOT / 'configs/toybench/small.py'), '--max-samples', '2']

    def run_script(script, *args):
        monkeypatch.setattr(sys, 'argv', ['script', *config, *map(str, args), '--override', *override])
        script.main()
        assert f'wrote {args[-1]}' in capsys.readouterr().out

    return run_script


def test_baseline_and_upper_bounds(run, tmp_path):
    run(baseline, '--json', tmp_path / 'guess.json')
    run(upper_bounds, '--json', tmp_path / 'bounds.json')
    guess, bounds = (json.loads((tmp_path / f'{name}.json').read_text()) for name in ('guess', 'bounds'))
    assert 0 < guess['RayIoU'] < bounds['seen by cameras']['RayIoU'] < 1
    assert bounds['seen by cameras']['mIoU'] == pytest.approx(1)
    for name, bound in bounds.items():
        assert 0.2 < bound['recall'] <= 1 and 0.5 < bound['RayIoU'] <= 1, name
    assert bounds['kept by the last, seen']['RayIoU'] < bounds['kept by stage 2']['RayIoU']


def test_fullest_blocks_hold_the_most():
    occupied = np.zeros((4, 4, 4), bool)
    occupied[:2, :2, :2], occupied[3, 3, 3], occupied[0, 3, 0] = True, True, True
    kept = upper_bounds.fullest_blocks(occupied, 2, 2)
    assert kept.sum() == 16 and kept[:2, :2, :2].all() and kept[occupied].sum() == 9


def test_label_table_counts_classes_and_masks(toy_root):
    columns = count('toy', sorted((toy_root / 'occ3d').rglob('labels.npz')))
    assert 20000 < columns.all.sum() < 45000 and 0.3 < columns.camera.sum() / columns.all.sum() < 0.8
    assert np.array_equal(columns.all, columns.lidar)
    rows = table([columns]).split('\n')
    assert len(rows) == 20 and rows[-1].startswith('| voxels a keyframe') and '19,531' in rows[-1]
