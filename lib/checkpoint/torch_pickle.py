"""A restricted pickle module for ``torch.load``, for PyTorch releases without ``weights_only`` (before 1.13).

Pass it as ``pickle_module``. It rebuilds tensors, plain containers and numbers; every other class or function
that a file names is refused.
"""

import pickle
from pickle import HIGHEST_PROTOCOL, UnpicklingError, dump, dumps  # noqa: F401 (what torch.load looks up)

_ALLOWED = frozenset(
    (
        ('collections', 'OrderedDict'),
        ('_codecs', 'encode'),
        ('torch', 'Size'),
        ('torch', 'device'),
        ('torch._utils', '_rebuild_tensor'),
        ('torch._utils', '_rebuild_tensor_v2'),
        ('torch._utils', '_rebuild_parameter'),
        ('torch.nn.parameter', 'Parameter'),
        ('torch.storage', 'UntypedStorage'),
        ('torch.storage', 'TypedStorage'),
        ('torch.storage', '_UntypedStorage'),
        ('torch.storage', '_TypedStorage'),
        ('numpy', 'dtype'),
        ('numpy.core.multiarray', 'scalar'),
        ('numpy._core.multiarray', 'scalar'),
    )
)
_BUILTINS = frozenset(
    ('bool', 'bytearray', 'complex', 'dict', 'float', 'frozenset', 'int', 'list', 'set', 'slice', 'str', 'tuple')
)
_TORCH_DTYPES = frozenset(
    ('float16', 'float32', 'float64', 'bfloat16', 'uint8', 'int8', 'int16', 'int32', 'int64', 'bool')
)


class Unpickler(pickle.Unpickler):
    """Finds only what a file of weights needs."""

    def find_class(self, module, name):
        is_storage = module in ('torch', 'torch.cuda') and name.endswith('Storage')
        is_dtype = module == 'torch' and name in _TORCH_DTYPES
        is_builtin = module in ('builtins', '__builtin__') and name in _BUILTINS
        if is_storage or is_dtype or is_builtin or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise UnpicklingError(f'Unsupported global: {module}.{name}')


def load(file, **options):
    """As ``pickle.load``, restricted."""
    return Unpickler(file, **options).load()


def loads(data, **options):
    """Refused: nothing in a file of weights is pickled inside a pickle."""
    raise UnpicklingError('a pickle within the pickle')
