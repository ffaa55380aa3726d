"""docs/notebooks/toy.ipynb runs on the toy data, cell after cell."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / 'docs' / 'notebooks' / 'toy.ipynb'
DATA = "ROOT / 'data' / 'toy'"  # where the notebook has its data

pytestmark = pytest.mark.usefixtures('one_thread')


def cells():
    return [
        ''.join(cell['source']) for cell in json.loads(NOTEBOOK.read_text())['cells'] if cell['cell_type'] == 'code'
    ]


def test_every_cell_runs(toy_root, monkeypatch, capsys):
    matplotlib = pytest.importorskip('matplotlib')
    matplotlib.use('Agg')
    monkeypatch.chdir(ROOT)
    assert sum(DATA in cell for cell in cells()) == 1
    names = {}
    for number, cell in enumerate(cells()):
        code = compile(cell.replace(DATA, f'Path({str(toy_root)!r})'), f'cell {number}', 'exec')
        exec(code, names)
    assert len(names['totals']) == 5 and names['totals'][-1] < 2 * names['totals'][0]
    assert names['dense']['semantics'].shape == names['task'].grid_shape
    assert names['result'].num_samples == 1 and 'car' in capsys.readouterr().out


def test_nothing_of_a_run_is_committed():
    for cell in json.loads(NOTEBOOK.read_text())['cells']:
        assert not cell.get('outputs') and cell.get('execution_count') is None
