"""SparseOcc as an installed package: the names that a program uses, and the commands of the console.

    pip install .                # after "make install", which brings PyTorch and OpenMMLab

    from sparseocc import SparseOccPredictor, load_config
    predictor = SparseOccPredictor('configs/toybench/small.py', 'weights/toybench_small.pth')
    occupancy = predictor.predict(images, cameras)

The package holds the folders of the repository, whose modules import one another as ``lib``, ``loaders``, ``models``
and ``tools``: importing ``sparseocc`` puts its own folder first on Python's path, and a program that uses it has no
modules of these names. The names below load what they need when they are first used.
"""

import importlib
import sys
from pathlib import Path

# the folder that holds lib, loaders, models, tools, configs and the scripts: this one, or the repository's top
ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / 'lib' / 'openmmlab.py').is_file())
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from lib import __version__  # noqa: E402

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
__all__ = ['ROOT', '__version__', *_HOMES]


def __getattr__(name):
    """What ``sparseocc.name`` stands for."""
    if name not in _HOMES:
        raise AttributeError(f'sparseocc has no {name!r}; it has {", ".join(__all__)}')
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return sorted(__all__)
