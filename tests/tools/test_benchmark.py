"""tools/benchmark.py: all rows of the table, compared with a stored run, and as Markdown."""

import contextlib
import json
import os
import sys

import pytest
import torch

from lib.errors import ConfigError, DataError, UserError
from lib.run import timing_script
from lib.run.processes import Processes
from tools import benchmark, benchmark_growth, benchmark_table
from tools.benchmark_table import Setting, compare, markdown

pytestmark = pytest.mark.usefixtures('one_thread')
HAS_BF16 = torch.__version__ >= '2'  # on the CPU
ROOT = os.path.join(os.path.dirname(__file__), '..', '..')
CONFIG = os.path.join(ROOT, 'configs', 'toy', 'semantic.py')
SMALL = [
    'task.num_frames=2',
    'task.cameras=["CAM_FRONT"]',
    'task.image_size=[64, 96]',
    'task.voxel_size=0.8',
    'task.point_cloud_range=[-16, -16, -1, 16, 16, 5.4]',
    'model.img_backbone.base_channels=16',
    'model.img_neck.in_channels=[16, 32, 64, 128]',
    'model.pts_bbox_head.transformer.topk_training=[50, 100, 200]',
    'model.pts_bbox_head.transformer.topk_testing=[50, 100, 200]',
]


def row(name, setting, milliseconds, gib=1.0):
    return dict(name=name, setting=setting, median_ms=milliseconds, peak_gib=gib)


def run(*arguments):
    arguments = ['--config', CONFIG, '--device', 'cpu', '--steps', '1', '--warmup', '0', *map(str, arguments)]
    benchmark.run(benchmark.parse_args([*arguments, '--override', *SMALL]), Processes())


def test_every_setting_that_a_cpu_has_is_timed_and_compared(tmp_path, capsys):
    first = tmp_path / 'first.json'
    run('--table', '--what', 'training', 'encoder', '--json', first)
    rows = json.loads(first.read_text())['rows']
    training = [row for row in rows if row['name'].startswith('training')]
    settings = ['fp32', 'TF32', *(['bf16', 'bf16, graph'] if HAS_BF16 else [])]
    assert [row['setting'] for row in training] == settings
    assert 'fp16, graph: left out, --amp fp16 needs a GPU' in capsys.readouterr().out
    first.write_text(json.dumps(dict(rows=[dict(training[0], median_ms=1e-3), *training[1:]])))
    words = rf'1 of {len(settings)} rows are worse than in .*first.json by more than 100000 %: training'
    with pytest.raises(UserError, match=words):
        run('--table', '--what', 'training', '--against', first, '--tolerance', 1000)
    assert capsys.readouterr().out.count(' ms (') == len(settings)


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


@pytest.fixture
def growth(tmp_path, monkeypatch):
    """What a small sweep stores; the training step with two samples does not fit."""
    for name, values in dict(VOXELS=(2,), FRAMES=(1, 2), IMAGES=((64, 128),), BATCHES=(1, 2)).items():
        monkeypatch.setattr(benchmark_growth, name, values)
    settings = Setting('step', dict(what=('training',))), Setting('labels', dict(what=('inference',)))
    monkeypatch.setattr(benchmark_growth, 'SETTINGS', settings)
    path, time_steps, calls = tmp_path / 'growth.json', timing_script.time_steps, []

    def time_or_fail(*arguments):
        calls.append(len(json.loads(path.read_text())['rows']) if calls else 0)
        if len(calls) == 2:
            raise ConfigError('train.cuda_graph: a training step cannot be captured (CUDA out of memory)')
        return time_steps(*arguments)

    monkeypatch.setattr(timing_script, 'time_steps', time_or_fail)
    run('--grow', '--json', path)
    assert calls == [0, 1, *range(1, len(calls) - 1)]  # rows are there as they come
    return path


def test_growth_is_timed_point_by_point_and_drawn(growth, tmp_path, monkeypatch, capsys):
    stored = json.loads(growth.read_text())
    rows, (ended,) = stored['rows'], stored['ended']
    assert ended['batch'] == 2 and ended['ended'] == 'needs more memory than the GPU has'
    assert [row['batch'] for row in rows if 'change' not in row] == [1, 1, 1, 2]
    full = benchmark_growth.curves(rows, 'voxels')['full']
    assert [(row['voxels'], row['frames'], row['batch']) for row in full] == [(200, 2, 1), (400, 2, 1)]
    assert [row['frames'] for row in benchmark_growth.curves(rows, 'frames')['cached']] == [1, 2]
    assert [row['image'] for row in benchmark_growth.curves(rows, 'image')['training']] == [[64, 96], [64, 128]]
    assert [row['batch'] for row in benchmark_growth.curves([*rows, ended], 'batch')['training']] == [1, 2]
    pytest.importorskip('matplotlib')
    out = tmp_path / 'growth.svg'
    monkeypatch.setattr(sys, 'argv', ['benchmark_growth.py', str(growth), str(growth), '--out', str(out)])
    benchmark_growth.main()  # a part that was run again counts once
    assert out.read_text().startswith('<?xml')
    growth.write_text(json.dumps(dict(rows=[row('encoder', '', 1.0)])))
    with pytest.raises(DataError, match='does not say how much work'):
        benchmark_growth.main()


def test_named_changes_alone():
    page = os.path.join(ROOT, 'docs', 'common_changes.md')
    chosen = ['--config', CONFIG, '--changes', page, '--only', 'more frames', benchmark.AS_IT_IS]
    configs = benchmark.configs_by_name(benchmark.parse_args(chosen))
    assert [(name, load().task.num_frames) for name, load in configs.items()] == [('more frames', 16), ('as it is', 1)]
    with pytest.raises(UserError, match="did you mean 'more frames'"):
        benchmark.configs_by_name(benchmark.parse_args([*chosen, 'mor frames']))
