"""tools/plot_run.py: what it reads of a run's records, what it draws, and what it refuses."""

import json

import pytest

from lib.errors import DataError, UserError
from tools import plot_run


def write_run(folder, count=5, **values):
    folder.mkdir()
    lines = [
        dict(kind='train', iteration=i, loss=10 / i, lr=0.1, loss_mask_0=1.0, loss_mask_10=2.0) for i in range(1, count)
    ]
    lines += [dict(kind='eval', iteration=4, RayIoU=0.25), dict(kind='eval', iteration=4, RayIoU=0.5)]
    lines += [dict(kind='train', iteration=4, recall_0=0.9, loss_sem_ce_1=3.0, **values)]
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return str(folder)


def run(monkeypatch, *arguments):
    monkeypatch.setattr('sys.argv', ['plot_run.py', *arguments])
    plot_run.main()


def test_curves_of_a_run(tmp_path):
    curves = plot_run.read_run(write_run(tmp_path / 'a', grad_norm=float('nan')))
    assert curves['loss'] == [(1, 10), (2, 5), (3, 10 / 3), (4, 2.5)] and 'grad_norm' not in curves
    assert plot_run.panel_curves(curves, 'scores') == dict(RayIoU=[(4, 50)])  # of a continued run the last counts
    assert plot_run.panel_curves(curves, 'mask') == dict(mask=[(i, 2.0) for i in range(1, 5)])
    assert plot_run.panel_curves(curves, 'voxel') == dict(sem_ce=[(4, 3.0)])
    assert plot_run.panel_curves(curves, 'recall') == {'stage 0': [(4, 90)]}
    auxiliary = dict(loss_dn_class_0=[(1, 4.0)], loss_dn_class_1=[(1, 5.0)], loss_depth=[(1, 6.0)])
    assert plot_run.panel_curves(auxiliary, 'mask') == dict(dn_class=[(1, 5.0)])
    assert plot_run.panel_curves(auxiliary, 'voxel') == dict(depth=[(1, 6.0)])
    assert plot_run.smooth([(1, 1.0), (2, 3.0), (3, 5.0)], 2) == [(1, 1), (2, 2), (3, 4)]


@pytest.mark.parametrize('suffix, start', [('.png', b'\x89PNG'), ('.svg', b'<?xml')])
def test_pictures_of_one_and_of_several_runs(suffix, start, tmp_path, monkeypatch, capsys):
    pytest.importorskip('matplotlib')
    runs, out = [write_run(tmp_path / name) for name in 'ab'], str(tmp_path / f'x{suffix}')
    for chosen in (runs[:1], runs):
        run(monkeypatch, *chosen, '--out', out)
        with open(out, 'rb') as f:
            assert f.read(len(start)) == start
        assert f'{len(chosen)} runs' in capsys.readouterr().out


@pytest.mark.parametrize(
    'arguments, words',
    [
        (('none',), 'does not exist'),
        (('a', '--show', 'los'), "did you mean 'loss'"),
        (('a', 'a'), 'different --names'),
        (('a', '--out', 'nowhere/x.png'), 'nowhere/x.png'),
        (('bad',), 'line 1'),
        (('empty',), 'no records'),
    ],
)
def test_what_is_refused(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / 'a')
    for name, text in (('bad', '[1]\n'), ('empty', '')):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'metrics.jsonl').write_text(text)
    with pytest.raises((DataError, UserError)) as error:
        run(monkeypatch, *arguments)
    assert words in str(error.value)
