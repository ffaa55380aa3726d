"""Small parts of the run set-up: meters, seeds, folders, settings, latencies, log."""

import math
import os
from pathlib import Path

import fakes
import numpy as np
import pytest
import torch

from lib.errors import CheckpointError, ConfigError, DataError, UserError
from lib.run.evaluation import begin, finish_in_order
from lib.run.folder import (
    CheckpointKeeper,
    _with_own_switches,
    checkpoints,
    create_run_folder,
    find_checkpoint_to_resume,
    resume_command,
)
from lib.run.loading import make_loader, read_batches
from lib.run.log import Countdown, HealthWatch, RunLog, WindowAverage, duration, shares
from lib.run.numerics import mix, seed_step
from lib.run.processes import Processes
from lib.run.train_script import check_norms
from lib.settings import EvaluationSettings, TrainSettings

VERSION = tuple(int(n) for n in torch.__version__.split('.')[:2])


def test_window_average_and_its_state():
    window = WindowAverage()
    window.add(dict(a=1.0, b=math.nan))
    restored = WindowAverage()
    restored.load_state_dict(window.state_dict())
    restored.add(dict(a=2.0, b=4.0))
    assert restored.take() == dict(a=1.5, b=4.0) and restored.take() == {}


def test_countdown_forgets_the_first_step_and_pauses():
    now = [0.0]
    countdown = Countdown(total=10, clock=lambda: now[0])
    assert countdown.text() == '?'
    for seconds in (100.0, 2.0, 2.0):
        now[0] += seconds
        countdown.step()
    assert countdown.seconds_left() == pytest.approx(7 * 2.0)
    now[0] += 50.0
    countdown.pause(50.0)
    now[0] += 2.0
    countdown.step()
    assert countdown.seconds_left() == pytest.approx(6 * 2.0)


@pytest.mark.parametrize('device, order', [('cpu', 'b0 f0 b1 f1 b2 f2'), ('cuda', 'b0 b1 f0 b2 f1 f2')])
def test_a_gpu_begins_with_the_next_before_one_is_waited_for(device, order):
    done = []

    def begin(number):
        done.append(f'b{number}')
        return lambda: done.append(f'f{number}') or number

    assert list(finish_in_order(map(begin, range(3)), torch.device(device))) == [0, 1, 2]
    assert ' '.join(done) == order
    assert list(finish_in_order(iter(()), torch.device(device))) == []


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_what_has_begun_before_an_error_arrives(device):
    def begun():
        yield lambda: 0
        yield lambda: 1
        raise DataError('the third cannot be read')

    results = finish_in_order(begun(), torch.device(device))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(DataError, match='the third'):
        next(results)


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_an_interrupt_waits_for_nothing(device):
    def begun():
        yield lambda: 0
        yield lambda: 1
        raise KeyboardInterrupt

    found = []
    with pytest.raises(KeyboardInterrupt):
        for _, result in zip(range(3), finish_in_order(begun(), torch.device(device))):
            found.append(result)
    assert found == ([0, 1] if device == 'cpu' else [0])


class _Detector(torch.nn.Module):
    def predict(self, number):
        return [f'predicted {number}']

    def forward(self, return_loss, img, **_):
        return self.predict(int(img))


class _Beginner(_Detector):
    def begin_prediction(self, img, **_):
        return lambda: [f'begun {int(img)}']


class _Heir(_Beginner):
    pass


class _Otherwise(_Beginner):
    def predict(self, number):
        return [f'otherwise {number}']


@pytest.mark.parametrize(
    'kind, said', [(_Detector, 'predicted'), (_Beginner, 'begun'), (_Heir, 'begun'), (_Otherwise, 'otherwise')]
)
def test_a_model_that_predicts_otherwise_is_asked_itself(kind, said):
    batch = dict(img=torch.tensor(3), lidar2img=torch.eye(4), ego2lidar=torch.eye(4), img_metas=[])
    assert begin(kind(), batch, torch.device('cpu'), None)() == [f'{said} 3']


@pytest.mark.parametrize('seconds, text', [(0, '0:00:00'), (59.6, '0:01:00'), (3661, '1:01:01'), (90000, '1d 1:00:00')])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_seeds_differ_by_every_number():
    seeds = {mix(*numbers) for numbers in [(1, 2, 3), (2, 1, 3), (1, 2, 4), (1, 3, 2), (1, 2)]}
    assert len(seeds) == 5 and all(0 <= s < 2**63 for s in seeds)
    draws = []
    for arguments in [(1, 5, 0, 0), (1, 5, 0, 0), (1, 6, 0, 0), (1, 5, 1, 0), (1, 5, 0, 1)]:
        seed_step(*arguments)
        draws.append((float(torch.rand(1)), float(np.random.rand())))
    assert draws[0] == draws[1] and len(set(draws)) == 4


@pytest.mark.parametrize(
    'cfg, words',
    [
        (dict(amp='fp8'), 'train.amp'),
        (dict(on_data_error='ignore'), 'train.on_data_error'),
        (dict(log_interval=True), 'train.log_interval'),
        (dict(accumulate=0), 'train.accumulate'),
        (dict(tensorbord=1), "did you mean 'tensorboard'"),
        (dict(ema_decay=1), 'train.ema_decay'),
        (dict(ema_decay='high'), 'train.ema_decay must be a finite number'),
        (dict(class_balance=1.5), 'train.class_balance'),
        (3, 'train must be a dict'),
    ],
)
def test_wrong_settings(cfg, words):
    with pytest.raises(ConfigError, match=words):
        TrainSettings.from_config(cfg)


@pytest.mark.parametrize(
    'cfg, iteration, epochs, due',
    [
        (dict(), 4, 1, False),
        (dict(interval=2), 8, 2, True),
        (dict(interval=2), 8, None, False),
        (dict(interval_iters=4), 8, None, True),
        (dict(interval_iters=4), 9, 3, False),
    ],
)
def test_when_to_evaluate(cfg, iteration, epochs, due):
    settings = EvaluationSettings.from_config(cfg)
    assert settings.is_due(iteration, epochs) == due
    assert settings.best_by == ('RayIoU' if cfg else None)


def test_evaluation_settings():
    assert EvaluationSettings.from_config(None).interval == 0
    assert EvaluationSettings.from_config(dict(metrics=['miou'])).metrics == ('miou',)
    with pytest.raises(ConfigError, match='evaluation.interval'):
        EvaluationSettings.from_config(dict(interval=-2))


def write_run(folder, *iterations):
    folder.mkdir(parents=True)
    keeper = CheckpointKeeper(folder, keep=0)
    for n in iterations:
        keeper.save(dict(state_dict=dict(a=torch.zeros(1))), n)
    return folder


def test_auto_resume_takes_the_newest_run_that_has_a_whole_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint_to_resume('auto', None, 'c.py') == (None, [os.path.join('outputs', 'c')])
    old = write_run(tmp_path / 'outputs' / 'c' / '20240101_000000', 5, 12, 9)
    empty = tmp_path / 'outputs' / 'c' / '20240102_000000'
    empty.mkdir()
    os.utime(str(old), (1, 1))
    assert find_checkpoint_to_resume('auto', None, 'c.py').path.name == 'iter_12.pth'
    (old / 'iter_12.pth').write_bytes(b'PK\x03\x04 cut short')
    assert find_checkpoint_to_resume('auto', None, 'c.py').path.name == 'iter_9.pth'
    assert [p.name for p in checkpoints(old)] == ['iter_12.pth', 'iter_9.pth', 'iter_5.pth']
    with pytest.raises(CheckpointError, match='holds no whole checkpoint'):
        find_checkpoint_to_resume(str(empty), None, 'c.py')


def test_a_checkpoint_that_is_replaced_while_it_is_looked_at_is_not_missed(tmp_path, monkeypatch):
    folder = write_run(tmp_path / 'run', 5)

    def check(path):
        if path.name == 'iter_5.pth':  # the run goes on just now
            path.unlink()
            CheckpointKeeper(folder, keep=0).save(dict(state_dict=dict(a=torch.zeros(1))), 6)
            return False
        return True

    monkeypatch.setattr('lib.run.folder.is_complete', check)
    assert find_checkpoint_to_resume(str(folder), None, 'c.py').path.name == 'iter_6.pth'


def test_norms_over_processes_need_gpus():
    model = torch.nn.Sequential(torch.nn.SyncBatchNorm(4))
    check_norms(model, Processes())
    check_norms(torch.nn.BatchNorm1d(4), Processes(0, 2))
    with pytest.raises(ConfigError, match="'SyncBN' work between GPUs alone; set norm_cfg.type='BN'"):
        check_norms(model, Processes(0, 2))


def test_evidence_of_a_bad_step_is_no_checkpoint(tmp_path):
    folder = write_run(tmp_path / 'r', 5)
    (folder / 'nonfinite_iter_9.pth').write_bytes((folder / 'iter_5.pth').read_bytes())
    assert [p.name for p in checkpoints(folder)] == ['iter_5.pth']


def test_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='--work-dir'):
        create_run_folder(str(tmp_path / 'file' / 'run'), 'c.py')


def test_an_empty_folder_is_used_as_it_is(tmp_path):
    (tmp_path / 'run').mkdir()
    assert create_run_folder(str(tmp_path / 'run'), 'c.py') == tmp_path / 'run'


@pytest.mark.parametrize('workers', [0, 1])
def test_workers_learn_of_the_epoch(workers):
    """Also workers that live on from one epoch to the next."""
    dataset = fakes.FakeDataset(None, length=4)
    loader = make_loader(dataset, [[2]], fakes.collate, workers, torch.device('cpu'), persistent=True)
    batches = []
    for epoch in (0, 1, 0):
        loader.dataset.set_epoch(epoch)
        batches += [batch['img'] for batch in read_batches(loader)]
    assert torch.equal(batches[0], batches[2]) and not torch.equal(batches[0], batches[1])


def test_log_that_cannot_be_written_complains_once_and_goes_on(tmp_path, capsys):
    log = RunLog()
    log.say('one')
    log.open(str(tmp_path / 'gone'))
    log.say('two')
    captured = capsys.readouterr()
    assert 'one' in captured.out and 'two' in captured.out and captured.err.count('warning') == 1


def test_lines_from_before_the_folder_are_in_the_log(tmp_path):
    log = RunLog()
    log.say('early')
    log.open(str(tmp_path))
    log.say('late')
    early, late = (tmp_path / 'log.txt').read_text().splitlines()
    assert early.endswith('early') and late.endswith('late')


def test_other_processes_are_silent(tmp_path, capsys):
    log = RunLog(is_main=False)
    log.open(str(tmp_path))
    log.say('one')
    log.record('train', 1, dict(a=1))
    assert capsys.readouterr().out == '' and not list(tmp_path.iterdir())


def test_command_to_resume_with():
    """Old --resume and --work-dir go, whatever their form; quoted; as torchrun started it."""
    folder = Path('outputs/my run')
    argv = ['train.py', '--config', 'c.py', '--work-dir', 'x', '--resume=auto', '--override', 'a.b=[1, 2]']
    wanted = "train.py --config c.py --override 'a.b=[1, 2]' --resume 'outputs/my run'"
    assert resume_command(argv, folder, {}) == 'python ' + wanted
    two = dict(LOCAL_WORLD_SIZE='2', WORLD_SIZE='2')
    assert resume_command(argv, folder, two) == 'torchrun --nproc_per_node 2 ' + wanted
    assert resume_command(argv, folder, dict(two, WORLD_SIZE='4')).startswith('torchrun --nnodes 2 --nproc_per_node 2')


def windows(watch, count, **values):
    """Number of warnings in so many log lines; a value may be a function of the line's number."""
    return sum(len(watch.look({k: v(i) if callable(v) else v for k, v in values.items()})) for i in range(count))


def test_a_run_that_goes_well_is_not_warned_about():
    falling = dict(loss=lambda i: 50 / (1 + i), recall_0=0.9, recall_2=lambda i: 0.5 + i / 200, empty_masks=0.5)
    assert windows(HealthWatch(), 60, **falling) == 0


@pytest.mark.parametrize(
    'values, words',
    [
        (dict(empty_masks=1.0), 'only free'),
        (dict(recall_2=lambda i: 0.9 - i / 50), 'keeps fewer'),
        (dict(loss=lambda i: 50 + i % 2), 'where it began'),
    ],
)
def test_a_run_that_goes_wrong_is_told_once(values, words):
    watch = HealthWatch()
    lines = [watch.look({k: v(i) if callable(v) else v for k, v in values.items()}) for i in range(40)]
    (warning,) = [text for texts in lines for text in texts]
    assert words in warning and 'docs/training.md' in warning


def test_shares_over_passes():
    passes = [dict(a=(1, 2), b=(torch.tensor(0), 0)), dict(a=(torch.tensor(2.0), 2), b=(0, 0))]
    assert shares(passes) == dict(a=0.75) and shares([{}]) == {}


@pytest.mark.skipif(VERSION < (2, 4), reason='no such kernel on the CPU')
@pytest.mark.parametrize('saved, own', [(True, False), (False, True)])
def test_a_run_goes_on_with_its_own_kernels(saved, own):
    """A checkpoint of a GPU's run holds that its optimizer was fused, which another device may not have."""
    optimizers = []
    for fused in (saved, own):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizers.append(torch.optim.AdamW([weight], lr=0.1, fused=fused))
        weight.grad = torch.ones(3)
    optimizers[0].step()
    state = _with_own_switches(optimizers[0].state_dict(), optimizers[1])
    optimizers[1].load_state_dict(state)
    optimizers[1].step()
    assert bool(optimizers[1].param_groups[0]['fused']) == own
    assert float(optimizers[1].state_dict()['state'][0]['step']) == 2
