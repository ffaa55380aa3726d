"""The demo's own part: what it says without weights, and what its summary holds; its steps are tested as scripts."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from lib.config import load_config
from lib.errors import CheckpointError
from tools import demo


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def fake_step(command, env, **_):
    """Write what the scripts would, as far as the summary reads it."""
    assert env['OMP_WAIT_POLICY'] == 'PASSIVE' and 'PATH' in env
    script, arguments = command[1], command[2:]
    after = lambda flag: demo.Path(arguments[arguments.index(flag) + 1])  # noqa: E731
    rayiou = {'tools/baseline.py': 0.05, 'val.py': 0.2}
    scores = dict(RayIoU=rayiou.get(script), num_samples=4)
    if 'miou' in load_config(demo.CONFIG).evaluation.metrics:
        scores['mIoU'] = 0.3
    scores['per_class'] = dict(car=dict(RayIoU=0.4), bus=dict(RayIoU=0.0), trailer=dict(RayIoU=None))
    if script == 'train.py':
        lines = [dict(kind='start'), dict(loss=9.0), dict(loss=7.5)]
        write(after('--work-dir') / 'metrics.jsonl', '\n'.join(map(json.dumps, lines)))
    elif script == 'timing.py':
        write(after('--out'), dict(rows=[1]))
    else:
        write(after('--json' if '--json' in arguments else '--out'), scores)
    return SimpleNamespace(returncode=0)


def test_summary_of_a_run(tmp_path, monkeypatch, capsys):
    weights = tmp_path / 'weights.pth'
    weights.write_bytes(b'')
    monkeypatch.setattr(subprocess, 'run', fake_step)
    monkeypatch.setattr('sys.argv', ['demo.py', '--out', str(tmp_path / 'demo'), '--weights', str(weights)])
    demo.main()
    summary = json.loads((tmp_path / 'demo' / 'summary.json').read_text())
    assert (summary['rayiou'], summary['baseline_rayiou'], summary['beats_baseline']) == (0.2, 0.05, True)
    assert summary['miou'] == 0.3
    assert summary['losses'] == [9.0, 7.5] and summary['loss_fell'] and summary['classes_above_zero'] == 1
    assert {'seconds', 'picture', 'video', 'miou', 'seed', 'seconds_per_step', 'timing', 'finetuned_rayiou'} <= set(
        summary
    )
    assert len(summary['seconds_per_step']) == demo.STEPS
    assert (tmp_path / 'demo' / 'picture.png').exists() and (tmp_path / 'demo' / 'drive.gif').exists()
    assert 'fine-tuning: loss 9.0 -> 7.5' in capsys.readouterr().out


def test_missing_weights_are_told_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr('sys.argv', ['demo.py', '--out', str(tmp_path / 'demo'), '--weights', 'nowhere.pth'])
    with pytest.raises(CheckpointError, match='nowhere.pth is not there'):
        demo.main()
    assert not (tmp_path / 'demo').exists()
