"""Our numbers are the published ones: every golden file of the folder, also files never seen before.

The folder is tests/data/golden or $SPARSEOCC_GOLDEN_DIR; the device $SPARSEOCC_TEST_DEVICE (default cpu; on
a GPU TF32 is off, and the same tolerances hold, since only the order of additions differs).
Tolerances and their reasons: tests/parity_model.py.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from parity_metrics import check_origins, check_rayeval
from parity_model import ROOT, ModelCase, check_inference, check_merging, check_training

from lib.config import load_config
from lib.task import Task
from models import build_model

GOLDEN = Path(os.environ.get('SPARSEOCC_GOLDEN_DIR', ROOT / 'tests' / 'data' / 'golden'))
DEVICE = os.environ.get('SPARSEOCC_TEST_DEVICE', 'cpu')
RELEASES = {'v10': 'r50_nuimg_704x256_8f.py', 'v11': 'r50_nuimg_704x256_8f_v1.1.py'}


def golden_files(*patterns):
    paths = sorted(path for pattern in patterns for path in GOLDEN.glob(pattern))
    return [pytest.param(path, id=path.name) for path in paths]


MODEL_FILES = golden_files('*_semantic.npz', '*_panoptic.npz')


def assert_within(deviations):
    assert deviations
    wrong = ['{}: {:.3g} > {:.3g}'.format(*d[1:]) for d in deviations if not d.value <= d.tolerance]
    message = '%d of %d quantities deviate:\n%s'
    assert not wrong, message % (len(wrong), len(deviations), '\n'.join(wrong[:20]))


@pytest.fixture(autouse=True)
def full_precision():
    """TF32 off, as in the golden files."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope='module')
def case(request):
    return ModelCase(request.param, DEVICE)


def test_folder_holds_golden_files():
    assert GOLDEN.is_dir() and any(GOLDEN.glob('*.npz')), f'no golden files in {GOLDEN}'


@pytest.mark.parametrize('case', MODEL_FILES, indirect=True)
def test_inference(case):
    assert_within(check_inference(case))


@pytest.mark.parametrize('case', MODEL_FILES, indirect=True)
def test_losses_and_gradients(case):
    for b in case.samples:
        assert_within(check_training(case, b))


@pytest.mark.parametrize('path', golden_files('post*.npz'))
def test_merging(path):
    assert_within(check_merging(path, DEVICE))


@pytest.mark.parametrize('path', golden_files('rayeval*.npz'))
def test_ray_metrics(path):
    check_rayeval(path, DEVICE)


@pytest.mark.parametrize('path', golden_files('origins*.npz'))
def test_ray_origins(path, real_dir):
    check_origins(path, real_dir)


@pytest.mark.parametrize('path', golden_files('checkpoint_keys_v1*.json'))
def test_names_and_shapes_of_full_models(path):
    """Published checkpoints load with strict=True exactly if every name and shape agrees."""
    cfg = load_config(str(ROOT / 'configs' / RELEASES[path.stem.split('_')[-1]]), [])
    model = build_model(cfg.model, Task.from_config(cfg.task))
    ours = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert ours == json.loads(path.read_text())
