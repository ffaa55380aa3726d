"""Averaged weights: the formula, what evaluation and checkpoints hold, and that a stopped run goes on exactly."""

import json

import fakes
import pytest
import torch

from lib.checkpoint import load_model_weights
from lib.run.optimizer import WeightAverage

EMA = 'train.ema_decay=0.8'


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


@pytest.mark.parametrize('fused', [True, False])
def test_the_average_is_the_recurrence(fused, monkeypatch):
    """Of parameters and running statistics, with the decay warmed up; counters are the model's."""
    if not fused:
        monkeypatch.delattr(torch, '_foreach_lerp_', raising=False)
    model = network()
    average, expected = WeightAverage(model, 0.5), {n: v.double() for n, v in model.state_dict().items()}
    for step in range(1, 13):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model(torch.randn(5, 3))
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = {n: decay * expected[n] + (1 - decay) * v.double() for n, v in model.state_dict().items()}
    state = average.state_dict()
    assert int(state.pop('1.num_batches_tracked')) == 12 and list(state) == [
        name for name in model.state_dict() if name != '1.num_batches_tracked'
    ]
    for name, value in state.items():  # float32 sums of a dozen numbers of order 1
        torch.testing.assert_close(value.double(), expected[name], atol=1e-5, rtol=1e-5)


def test_the_model_has_the_average_inside_the_block_only():
    model = network()
    average, begin = WeightAverage(model, 0.9), model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(ZeroDivisionError), average.in_model():
        assert torch.equal(model[0].weight, begin)
        raise ZeroDivisionError
    assert torch.equal(model[0].weight, begin + 1) and torch.equal(average.state_dict()['0.weight'], begin)


def test_training_takes_no_notice_and_the_average_is_scored_and_saved(workshop, capsys):
    workshop.train(work_dir='plain')
    workshop.train(EMA, work_dir='ema')
    assert workshop.curve('ema') == workshop.curve('plain')
    plain, ema = (workshop.load('latest.pth', run) for run in ('plain', 'ema'))
    assert 'ema' not in plain and 'ema_decay' not in plain['meta']
    for name, value in plain['state_dict'].items():
        assert torch.equal(ema['ema']['learning'][name], value) and not torch.equal(ema['state_dict'][name], value)
    assert 'averaged with decay 0.8' in workshop.log('ema') and ema['ema']['updates'] == 9
    path = str(workshop.folder / 'ema' / 'latest.pth')
    model = fakes.FakeModel()
    capsys.readouterr()
    load_model_weights(model, path)
    assert f'{path}: weights averaged over training (EMA with decay 0.8)' in capsys.readouterr().out
    assert all(torch.equal(value, ema['state_dict'][name]) for name, value in model.state_dict().items())
    scores = workshop.records('ema', 'eval')[9]
    assert scores['RayIoU'] != workshop.records('plain', 'eval')[9]['RayIoU']
    workshop.validate(['--config', str(workshop.config), '--weights', path, '--out', 'scores.json'])
    assert f'"RayIoU": {scores["RayIoU"]}' in (workshop.folder / 'scores.json').read_text()


def test_stopped_and_continued_is_as_never_stopped(workshop):
    options = (EMA, 'evaluation.interval_iters=2', 'train.checkpoint_interval_iters=1')
    workshop.train(*options, work_dir='whole')
    with pytest.raises(SystemExit):
        workshop.train(*options, "data.train.trouble={9: 'crash'}", 'data.train.trouble_epoch=1', work_dir='cut')
    assert 0 < max(workshop.records('cut')) < 6
    workshop.train(*options, work_dir='cut', more=('--resume', 'auto'))
    whole, cut = (workshop.load('latest.pth', run) for run in ('whole', 'cut'))
    for name, value in whole['state_dict'].items():
        assert torch.equal(cut['state_dict'][name], value)
        assert torch.equal(cut['ema']['learning'][name], whole['ema']['learning'][name])
    assert workshop.records('whole', 'eval') == workshop.records('cut', 'eval')


def test_switched_on_and_off_on_the_way(workshop):
    """The average begins at the weights of a checkpoint without one; without it training goes on from the weights."""
    workshop.train(work_dir='plain')
    workshop.train('runner.max_iters=4', more=('--no-eval',))
    workshop.train(EMA, 'runner.max_iters=6', more=('--no-eval', '--resume', 'auto'))
    assert workshop.load('latest.pth')['ema']['updates'] == 2
    workshop.train(more=('--no-eval', '--resume', 'auto'))
    plain, last = workshop.load('latest.pth', 'plain'), workshop.load('latest.pth')
    assert all(torch.equal(last['state_dict'][name], value) for name, value in plain['state_dict'].items())


def test_two_processes_average_as_one_and_score_the_model_that_they_save(workshop):
    """Running statistics differ from process to process until they are shared."""
    linear = (EMA, 'model.dropout=0', 'model.normed=False')  # what is left is linear in the samples
    normed = {decay: (f'train.ema_decay={decay}', 'model.batch_norm=True') for decay in ('0.0', '0.8')}
    runs = dict(normed, linear=linear).items()
    trainings = [['train', *workshop.arguments(*options, work_dir=name), '--device', 'cpu'] for name, options in runs]
    status, text = workshop.launch(*trainings, processes=2)
    assert status == 0, text
    workshop.train(*linear, work_dir='alone')
    one, two = (workshop.load('latest.pth', run)['state_dict'] for run in ('alone', 'linear'))
    for name, value in one.items():  # float32 sums in another order, carried along by AdamW for nine steps
        torch.testing.assert_close(two[name], value, atol=1e-4, rtol=1e-4)
    assert workshop.records('linear', 'eval')[9]['RayIoU'] >= 0
    for name in normed:
        weights = ['--weights', str(workshop.folder / name / 'latest.pth'), '--override', 'model.batch_norm=True']
        out = workshop.folder / f'{name}.json'
        assert workshop.validate(['--config', str(workshop.config), *weights, '--out', str(out)]) == 0
        assert workshop.records(name, 'eval')[9]['RayIoU'] == json.loads(out.read_text())['RayIoU']
