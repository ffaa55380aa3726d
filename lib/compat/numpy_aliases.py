"""NumPy names that mmdet, mmdet3d and nuscenes-devkit still use, on a NumPy that has dropped them."""

import warnings

# removed name -> what it meant
_SCALARS = {'bool': bool, 'int': int, 'float': float, 'object': object, 'long': int}
_RENAMED = {'int0': 'intp', 'in1d': 'isin'}


def restore(numpy) -> None:
    """Add each missing alias to the module ``numpy``; names that exist keep their meaning."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # old NumPy warns when a deprecated alias is looked at
        for name, scalar in _SCALARS.items():
            if not hasattr(numpy, name):
                setattr(numpy, name, scalar)
        for name, current in _RENAMED.items():
            if not hasattr(numpy, name):
                setattr(numpy, name, getattr(numpy, current))
