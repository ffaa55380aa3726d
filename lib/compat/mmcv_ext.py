"""A stand-in for ``mmcv._ext``, the module of mmcv's compiled ops.

mmdet and mmdet3d import ``mmcv.ops`` when they are imported, and ``mmcv.ops`` wants ``mmcv._ext``. SparseOcc
calls none of those ops, so a module whose functions fail with a clear sentence when called is enough.
"""

import importlib.machinery
import sys
import types

NAME = 'mmcv._ext'


class MissingOpError(RuntimeError):
    """One of mmcv's compiled ops was called, and they are not installed."""


class StandInExt(types.ModuleType):
    """Has every public name, as mmcv asks at import; calling one raises :class:`MissingOpError`."""

    def __init__(self):
        super().__init__(NAME, 'Stand-in: mmcv was installed without its compiled ops.')
        self.__spec__ = importlib.machinery.ModuleSpec(NAME, loader=None)

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        return _missing_op(name)

    @staticmethod
    def get_compiler_version():
        """For mmcv's report of the environment."""
        return 'not compiled'

    @staticmethod
    def get_compiling_cuda_version():
        """For mmcv's report of the environment."""
        return 'not compiled'


def _missing_op(name):
    def missing_op(*args, **kwargs):
        raise MissingOpError(
            f'mmcv.ops needs the compiled op {name!r}, and this mmcv has no compiled '
            'ops; run "make install MMCV_OPS=1" to compile them (about 20 minutes)'
        )

    missing_op.__name__ = name
    return missing_op


def register() -> None:
    """Put the stand-in where ``import mmcv._ext`` finds it."""
    sys.modules[NAME] = StandInExt()


def is_registered() -> bool:
    """The stand-in is in use."""
    return isinstance(sys.modules.get(NAME), StandInExt)
