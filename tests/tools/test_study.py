"""tools/study.py: what it reads, how it takes runs that fail, stop or go on, and its table."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from lib.config import load_config
from lib.errors import ConfigError, UserError
from tools import study
from tools.studies.table import summarize

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    'task.image_size=[64,160]',
    'task.num_frames=1',
    'total_batch_size=1',
    'train.amp=None',
    'train.tensorboard=False',
    'model.pts_bbox_head.transformer.topk_training=[60,150,400]',
    'model.pts_bbox_head.transformer.topk_testing=[60,150,400]',
]

# Stands for train.py and val.py. The learning rate says what is to happen: 1 goes well, 2 fails, 3 trains until it
# is stopped and goes well when it is started again.
FAKE = """
import json, os, signal, sys
args = sys.argv
after = lambda flag: args[args.index(flag) + 1]
rate = [word for word in args if word.startswith('optimizer.lr=')][0][-1]
if 'train.py' in args[0]:
    folder, steps = after('--work-dir'), 10
    print('training', rate, flush=True)
    if rate == '2':
        sys.exit('it went wrong')
    again = os.path.exists(folder)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    os.makedirs(folder, exist_ok=True)
    if rate == '3' and not again:
        signal.sigwait([signal.SIGTERM])
        steps = 4
    open(f'{folder}/iter_{steps}.pth', 'w').close()
    sys.exit(143 if steps == 4 else 0)
iteration = int(after('--weights').split('_')[-1][:-4])
seed = int(after('--seed')) if '--seed' in args else 0
score = iteration / 100 + seed / 50
scores = dict(RayIoU=score, mIoU=0.5, mIoU_voxels='mask_camera', run=dict(iteration=iteration))
scores['per_class'] = dict(car=dict(RayIoU=score), bus=dict(RayIoU=0.0), trailer=dict(RayIoU=None))
open(after('--out'), 'w').write(json.dumps(scores))
"""


def write_study(tmp_path, *variants, **more):
    path = tmp_path / 'study.json'
    path.write_text(json.dumps(dict(dict(config='configs/toybench/small.py', variants=variants), **more)))
    return str(path)


def variant(name, rate=1, **more):
    return dict(dict(name=name, override=[f'optimizer.lr={rate}']), **more)


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Start a study of fake scripts with more arguments; returns its exit status and what is in study.json.

    ``until`` is a run with whose beginning the time for training is over.
    """
    scripts = tmp_path / 'scripts'
    scripts.mkdir()
    for name in ('train.py', 'val.py'):
        (scripts / name).write_text(FAKE)
    monkeypatch.chdir(ROOT)

    is_over = study.Slots._train_time_is_over

    def start(path, *arguments, until=None):
        over = is_over if until is None else lambda _: (tmp_path / 'out' / until).exists()
        monkeypatch.setattr(study.Slots, '_train_time_is_over', over)
        monkeypatch.setattr(study, 'ROOT', scripts)
        monkeypatch.setattr(study, 'load_config', lambda path, override: load_config(str(ROOT / path), override))
        out = tmp_path / 'out'
        given = ['--study', path, '--out', str(out), '--device', 'cpu', '--iters', '10', *map(str, arguments)]
        monkeypatch.setattr(sys, 'argv', ['study.py', *given])
        status = 0
        try:
            study.main()
        except SystemExit as stop:
            status = stop.code
        return status, json.loads((out / 'study.json').read_text())

    return start


def test_a_failed_run_does_not_stop_the_others(started, tmp_path, capsys):
    path = write_study(tmp_path, variant('base', seeds=[0, 1]), variant('broken', 2), variant('other'))
    status, result = started(path)
    rows = {row['name']: row for row in result['rows']}
    assert status == 1 and result['runs']['broken_seed0']['error'].endswith('it went wrong')
    assert 'it went wrong' in (tmp_path / 'out' / 'broken_seed0.txt').read_text()
    assert rows['base']['runs'] == 2 and rows['base']['RayIoU'] == dict(mean=0.1, spread=0.0, difference=None)
    assert rows['other']['RayIoU']['difference'] == 0 and rows['broken']['RayIoU']['mean'] is None
    assert rows['base']['zero_classes'] == 1 and rows['base']['steps'] == [10]
    text = (tmp_path / 'out' / 'study.md').read_text()
    assert '| base | 2 | 10 | 10.00 ± 0.00 | 50.00 ± 0.00 |' in text and 'mIoU (mask_camera)' in text
    assert '- broken_seed0: **failed**' in text and 'FAILED broken_seed0' in capsys.readouterr().out


def test_started_again_it_does_what_is_left(started, tmp_path):
    """The time limit stops the endless training, which saves; what is there is scored. Then it is finished."""
    path = write_study(tmp_path, variant('base'), variant('long', 3))
    status, result = started(path, until='long_seed0')
    assert status == 0 and [row['steps'] for row in result['rows']] == [[10], [4]]
    assert '4 (**cut off**, of 10)' in (tmp_path / 'out' / 'study.md').read_text()
    assert '- long_seed0: stopped' in (tmp_path / 'out' / 'study.md').read_text()
    status, result = started(path)
    assert status == 0 and [row['steps'] for row in result['rows']] == [[10], [10]]
    logs = {name: (tmp_path / 'out' / f'{name}_seed0.txt').read_text() for name in ('base', 'long')}
    assert started(path)[0] == 0
    assert logs == {name: (tmp_path / 'out' / f'{name}_seed0.txt').read_text() for name in logs}, 'nothing was left'
    assert logs['long'].count('training 3') == 2
    with pytest.raises(UserError, match='of a run with other settings'):
        started(path, '--override', 'seed=3')


def test_what_was_cut_off_is_left_unscored_where_wanted(started, tmp_path):
    status, result = started(write_study(tmp_path, variant('long', 3)), '--finished-only', until='long_seed0')
    assert status == 0 and result['runs']['long_seed0']['status'] == 'stopped' and result['rows'][0]['runs'] == 0


def test_scores_of_other_weights_and_their_spread(started, tmp_path):
    draws = dict(name='draws', weights_of='base', val_seeds=[0, 1, 2], override=['optimizer.lr=1'])
    status, result = started(write_study(tmp_path, variant('base'), draws), '--only', 'draws', '--per-gpu', 3)
    row = result['rows'][1]
    assert status == 0 and row['runs'] == 3 and row['seconds'] is None
    assert row['RayIoU']['mean'] == pytest.approx(0.12) and row['RayIoU']['spread'] == pytest.approx(0.02)
    assert row['RayIoU']['difference'] == pytest.approx(0.02)


def test_sigterm_stops_trainings_and_leaves(started, tmp_path, monkeypatch):
    path = write_study(tmp_path, variant('long', 3), variant('next'))
    begin = study.Slots._call

    def call(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return begin(self, *arguments)

    monkeypatch.setattr(study.Slots, '_call', call)
    status, result = started(path)
    assert status == 143 and {run['status'] for run in result['runs'].values()} <= {'stopped', 'waiting'}


def test_time_limits(tmp_path):
    args = study.parse_args(['--study', 's', '--out', str(tmp_path), '--time-limit', '60', '--score-limit', '20'])
    slots = study.Slots([], args, 0)
    for seconds, training_over, scoring_over in ((50, False, False), (70, True, False), (90, True, True)):
        slots.begin = time.monotonic() - seconds
        assert (slots._train_time_is_over(), slots._score_time_is_over()) == (training_over, scoring_over)


@pytest.mark.parametrize(
    'variants, more, told',
    [
        ([], {}, 'variants must be a list'),
        ([dict(name='a', overide=[])], {}, 'overide'),
        ([dict(name='a'), dict(name='a')], {}, 'the name a is given twice'),
        ([dict(name='a', seeds=0)], {}, 'seeds must be a list of int'),
        ([dict(name='a')], dict(base='b'), "base is 'b', which is none of the trained"),
        ([dict(name='a'), dict(name='b', weights_of='c')], {}, "weights_of of b is 'c'"),
        ([dict(name='a')], dict(config=None), 'config must be a text'),
    ],
)
def test_a_wrong_study_is_told(tmp_path, variants, more, told):
    with pytest.raises(ConfigError, match=told):
        study.read_study(write_study(tmp_path, *variants, **more))


@pytest.mark.parametrize('path', sorted(ROOT.glob('configs/**/*.json')), ids=lambda path: path.name)
def test_shipped_studies_fit_their_configs(path):
    for row in study.read_study(str(path))[0]:
        assert load_config(str(ROOT / row.config), [*row.override, *row.val_override])


def test_a_variant_is_trained_and_two_are_scored(toy_root, tmp_path, monkeypatch):
    uniform = ['model.pts_bbox_head.transformer.mask_guided=False']
    path = write_study(tmp_path, dict(name='base'), dict(name='uniform', weights_of='base', override=uniform))
    out = tmp_path / 'out'
    given = ['--study', path, '--out', str(out), '--device', 'cpu', '--iters', '2', '--data', str(toy_root)]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'argv', ['study.py', *given, '--workers', '0', '--override', *SMALL])
    study.main()
    result = json.loads((out / 'study.json').read_text())
    for row in result['rows']:
        assert row['steps'] == [2] and 0 <= row['RayIoU']['mean'] < 1 and row['mIoU']['mean'] is not None
    assert summarize([], 'base') == [] and (out / 'base_seed0' / 'log.txt').exists()
