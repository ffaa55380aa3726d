"""tools/benchmark.py: all rows of the table, compared with a stored run, and as Markdown."""

import contextlib
import json
import os
import sys

import pytest
import torch

from lib.errors import DataError, UserError
from lib.run.processes import Processes
from tools import benchmark, benchmark_table
from tools.benchmark_table import compare, markdown

pytestmark = pytest.mark.usefixtures('one_thread')
HAS_BF16 = torch.__version__ >= '2'  # on the CPU
CONFIG = os.path.join(os.path.dirname(__file__), '..', '..', 'configs', 'toy', 'semantic.py')
SMALL = [
    'task.num_frames=2',
    'task.cameras=["CAM_FRONT"]',
    'task.image_size=[64, 96]',
    'task.voxel_size=0.8',
    'task.point_cloud_range=[-16, -16, -1, 16, 16, 5.4]',
    'model.pts_bbox_head.transformer.topk_training=[50, 100, 200]',
    'model.pts_bbox_head.transformer.topk_testing=[50, 100, 200]',
]


def row(name, setting, milliseconds, gib=1.0):
    return dict(name=name, setting=setting, median_ms=milliseconds, peak_gib=gib)


def run(*arguments):
    arguments = ['--config', CONFIG, '--device', 'cpu', '--steps', '1', '--warmup', '0', *map(str, arguments)]
    benchmark.run(benchmark.parse_args([*arguments, '--override', *SMALL]), Processes())


def test_every_setting_that_a_cpu_has_is_timed_and_compared(tmp_path, capsys):
    first, second = tmp_path / 'first.json', tmp_path / 'second.json'
    run('--table', '--what', 'training', 'encoder', '--json', first)
    rows = json.loads(first.read_text())['rows']
    training = [row for row in rows if row['name'].startswith('training')]
    settings = ['fp32', 'TF32', 'bf16'] if HAS_BF16 else ['fp32', 'TF32']
    assert [row['setting'] for row in training] == settings
    assert 'fp16, graph: left out, --amp fp16 needs a GPU' in capsys.readouterr().out
    run('--table', '--what', 'training', '--json', second, '--against', first, '--tolerance', 1000)
    assert capsys.readouterr().out.count(' ms (') == len(settings)
    first.write_text(json.dumps(dict(rows=[dict(training[0], median_ms=1e-3), *training[1:]])))
    words = rf'1 of {len(settings)} rows are worse than in .*first.json by more than 100000 %: training'
    with pytest.raises(UserError, match=words):
        run('--table', '--what', 'training', '--against', first, '--tolerance', 1000)


def test_training_runs_in_the_precision_of_the_config(monkeypatch):
    seen = []
    monkeypatch.setattr(benchmark.Bench, 'row', lambda self, name, step, size: (step(0), seen.append(name)))
    monkeypatch.setattr('lib.run.numerics.check_precision', lambda amp, device: None)
    monkeypatch.setattr('lib.run.numerics.autocast', lambda amp, device: seen.append(amp) or contextlib.nullcontext())
    monkeypatch.setitem(globals(), 'SMALL', [*SMALL, "train.amp='bf16'"])
    run('--what', 'training')
    assert seen == ['bf16', 'training bf16, batch 1 on each of 1']


def test_what_is_no_stored_run_is_told(tmp_path):
    path = tmp_path / 'other.json'
    path.write_text('[1]')
    with pytest.raises(DataError, match="has no 'rows'; give a file that"):
        run('--what', 'encoder', '--against', path)
    path.write_text(json.dumps(dict(rows=[row('another', '', 1.0)])))
    with pytest.raises(UserError, match='has none of the rows that were timed'):
        run('--what', 'encoder', '--against', path)


def test_slower_and_larger_rows_are_worse():
    stored = [row('a', 'fp32', 100), row('b', '', 100), row('c', '', 100, 2.0), row('e', '', 1)]
    now = [row('a', 'fp32', 109), row('b', '', 112), row('c', '', 50, 2.5), row('a', 'fp16', 1), row('d', '', 1)]
    lines, worse = compare(now, stored, 0.1)
    assert len(lines) == 3 and '(1.09 x)' in lines[0] and lines[0].startswith('a, fp32 ')
    assert worse == ['b', 'c']


def test_markdown_has_a_column_for_every_setting(tmp_path, monkeypatch, capsys):
    rows = [row('encoder', 'fp32', 2.345, 0.5), row('encoder', 'fp16', 1.0), row('training, batch 1', 'fp32', 123.4)]
    expected = [
        '| inference, milliseconds | fp32 | fp16 |',
        '| --- | --- | --- |',
        '| encoder | 2.35 | 1 |',
        '',
        '| inference, GiB | fp32 | fp16 |',
        '| --- | --- | --- |',
        '| encoder | 0.5 | 1 |',
    ]
    lines = markdown(rows).splitlines()
    assert lines[:7] == expected and '| training, batch 1 | 123 |' in lines
    path = tmp_path / 'run.json'
    path.write_text(json.dumps(dict(rows=rows)))
    monkeypatch.setattr(sys, 'argv', ['benchmark_table.py', str(path)])
    benchmark_table.main()
    assert capsys.readouterr().out.splitlines() == lines
