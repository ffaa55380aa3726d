"""SparseOcc as an installed package: the names that a program uses, and the commands of the console.

    pip install ".[eval]"        # the evaluator alone: NumPy, Numba, tqdm
    pip install .                # after "make install", which brings PyTorch and OpenMMLab

    from sparseocc import Evaluator, SparseOccPredictor, load_config
    predictor = SparseOccPredictor('configs/toybench/small.py', 'weights/toybench_small.pth')
    occupancy = predictor.predict(images, cameras)
    evaluator = Evaluator('occ3d')

The names of the evaluator stand alone: any project may use them. The others live in modules that import one another
as ``lib``, ``loaders``, ``models`` and ``tools``, as in the repository: the first use of one puts the folder that holds
them first on Python's path, and a program that uses them has no modules of these names. All load what they need when
they are first used.
"""

import importlib
import sys
from pathlib import Path

# the folder that holds lib, loaders, models, tools, configs and the scripts: this one, or the repository's top
ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / 'lib' / 'openmmlab.py').is_file())
if str(ROOT) not in __path__:
    __path__.append(str(ROOT))  # so that sparseocc.lib is there in either case

from .lib import __version__  # noqa: E402

_EVALUATOR = {
    'Evaluator': 'metrics',
    'EvalResult': 'metrics',
    'evaluate': 'metrics',
    'lidar_rays': 'metrics',
    'read_keyframes': 'metrics.origins',
    'scene_ray_origins': 'metrics',
}
_HOMES = {
    'SparseOccPredictor': 'tools.api',
    'Frame': 'tools.api',
    'Occupancy': 'tools.api',
    'load_config': 'lib.config',
    'UserError': 'lib.errors',
    'Task': 'lib.task',
    'prepare_openmmlab': 'lib.openmmlab',
    'build_model': 'models',
    'load_model_weights': 'lib.checkpoint',
    'build_dataset': 'loaders',
    'collate': 'loaders',
    'save_prediction': 'lib.prediction',
    'open_predictions': 'lib.metrics.formats',
    'to_dense': 'lib.prediction',
}
__all__ = ['ROOT', '__version__', *_EVALUATOR, *_HOMES]


def __getattr__(name):
    """What ``sparseocc.name`` stands for."""
    if name in _EVALUATOR:
        return getattr(importlib.import_module(f'{__name__}.lib.{_EVALUATOR[name]}'), name)
    if name not in _HOMES:
        raise AttributeError(f'sparseocc has no {name!r}; it has {", ".join(__all__)}')
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return sorted(__all__)
