"""TF32 as the arguments say."""

import pytest
import torch

MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn


@pytest.fixture(autouse=True)
def settings_as_before():
    before = MATMUL.allow_tf32, CUDNN.allow_tf32, CUDNN.benchmark
    MATMUL.allow_tf32, CUDNN.allow_tf32 = False, True  # PyTorch's own
    yield
    MATMUL.allow_tf32, CUDNN.allow_tf32, CUDNN.benchmark = before


@pytest.mark.parametrize(
    'more, expected', [((), (False, True)), (('--tf32', 'on'), (True, True)), (('--tf32', 'off'), (False, False))]
)
def test_training_and_validation_set_tf32(workshop, more, expected):
    assert workshop.train(more=more) == 0
    assert (MATMUL.allow_tf32, CUDNN.allow_tf32) == expected
    MATMUL.allow_tf32, CUDNN.allow_tf32 = False, True
    weights = str(workshop.folder / 'run' / 'latest.pth')
    assert workshop.validate(['--config', str(workshop.config), '--weights', weights, *more]) == 0
    assert (MATMUL.allow_tf32, CUDNN.allow_tf32) == expected


def test_the_argument_wins_over_the_config(workshop):
    assert workshop.train('train.tf32=on', more=('--tf32', 'off')) == 0
    assert not MATMUL.allow_tf32 and not CUDNN.allow_tf32
