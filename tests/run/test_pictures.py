"""Pictures of validation samples while a model learns: which, when, and that training takes no notice."""

import contextlib
from types import SimpleNamespace

import fakes
import numpy as np
import pytest
import torch
from PIL import Image

from lib.run.evaluation import Evaluation
from lib.run.log import RunLog
from lib.run.pictures import ValidationPictures
from lib.run.processes import Processes
from lib.settings import TrainSettings
from lib.task import Task
from tools.drawing.figure import WIDTH, draw_from_above

TASK = Task('occ3d', point_cloud_range=(0, 0, 0, 1.6, 1.6, 0.8))


class NoisyModel(fakes.FakeModel):
    """Draws at random when it predicts, too."""

    def forward(self, *arguments, return_loss=True, **more):
        torch.rand(3)
        return super().forward(*arguments, return_loss=return_loss, **more)


def make(tmp_path, length=7, draw=fakes.draw):
    log = RunLog()
    log.open(str(tmp_path))
    evaluation = Evaluation(fakes.components(), TASK, fakes.FakeDataset(TASK, length), Processes(), log.say)
    return ValidationPictures(evaluation, 4, draw, log)


def pictures(folder):
    return sorted(path.name for path in (folder / 'pictures').glob('*'))


def test_two_samples_are_drawn_when_it_is_time(tmp_path):
    model = NoisyModel().train()
    with make(tmp_path) as taken:
        for iteration in range(1, 10):
            taken.take_if_due(model, iteration)
    assert pictures(tmp_path) == [f'validation_{i}_iter_{n}.png' for i in (0, 1) for n in (4, 8)]
    image = np.asarray(Image.open(str(tmp_path / 'pictures' / 'validation_1_iter_8.png')))
    assert image.shape == (2, 32, 3) and (image[0] == 5).all(), 'the true classes of sample 5'
    assert (image[1] != 17).sum() == 2 * 3, 'two voxels are predicted'


def test_mode_and_generators_stay_as_they_were(tmp_path):
    model = NoisyModel().train()
    before = torch.random.get_rng_state()
    with make(tmp_path, length=1) as taken:
        assert taken.take_if_due(model, 3) == 0 and taken.take_if_due(model, 4) > 0
        assert model.training and torch.equal(torch.random.get_rng_state(), before)
    assert pictures(tmp_path) == ['validation_0_iter_4.png']


@pytest.mark.parametrize('part', ['drawing', 'predicting'])
def test_what_goes_wrong_is_told_once_and_ends_the_pictures(tmp_path, capsys, part):
    def fail(*_, **__):
        raise RuntimeError('out of ink')

    model = fakes.FakeModel() if part == 'drawing' else SimpleNamespace(training=True, train=fail, eval=fail)
    with make(tmp_path, draw=fail if part == 'drawing' else fakes.draw) as taken:
        for iteration in range(1, 20):
            taken.take_if_due(model, iteration)
    with contextlib.suppress(FileNotFoundError):
        assert pictures(tmp_path) == []
    assert (
        capsys.readouterr().out.count('WARNING: no more pictures of validation samples (RuntimeError: out of ink)') == 1
    )


def test_training_takes_no_notice(workshop):
    """Losses and weights are the same to the bit, dropout included."""
    workshop.train('train.picture_interval=2', work_dir='drawn')
    workshop.train('train.picture_interval=0', work_dir='plain')
    drawn, plain = workshop.curve('drawn'), workshop.curve('plain')
    assert len(drawn) == 9 and drawn == plain
    assert pictures(workshop.folder / 'drawn') == [f'validation_{i}_iter_{n}.png' for i in (0, 1) for n in (2, 4, 6, 8)]
    assert not (workshop.folder / 'plain' / 'pictures').exists()
    weights = [workshop.load('latest.pth', name)['state_dict'] for name in ('drawn', 'plain')]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_without_a_validation_set_there_are_none(workshop):
    workshop.train('train.picture_interval=2', more=['--no-eval'])
    assert not (workshop.folder / 'run' / 'pictures').exists() and TrainSettings().picture_interval == 0


def test_the_board_shows_them(tmp_path):
    events = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    log = RunLog()
    log.open(str(tmp_path), tensorboard=True)
    log.picture('validation_0', 3, np.zeros((4, 6, 3), np.uint8))
    log.close()
    board = events.EventAccumulator(str(tmp_path / 'tensorboard'))
    board.Reload()
    assert [(event.step, event.width, event.height) for event in board.Images('validation_0')] == [(3, 6, 4)]


def test_from_above():
    truth = dict(semantics=np.full(TASK.grid_shape, 4, np.uint8))
    prediction = dict(semantics=np.full(TASK.grid_shape, 17, np.uint8))
    image = draw_from_above(TASK, truth, prediction, 'token, after 5 steps')
    assert image.shape[1] == WIDTH and image.dtype == np.uint8 and image.std() > 10
