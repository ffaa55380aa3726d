"""OpenMMLab 1.x and nuscenes-devkit on current Python, NumPy and PyTorch.

Call :func:`prepare_openmmlab` before the first ``import mmdet`` / ``mmdet3d``:

    from lib.compat import prepare_openmmlab
    prepare_openmmlab()
"""

from .openmmlab import has_compiled_ops, prepare_openmmlab

__all__ = ['has_compiled_ops', 'prepare_openmmlab']
