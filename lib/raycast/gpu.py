"""Ray casting on CUDA: loads the compiled extension on first use and launches it."""

import importlib
import warnings

EXTENSION = 'lib.raycast.raycast_cuda'
_NOT_BUILT = (
    'the CUDA ray caster is not built, rays are cast on the CPU; build it with '
    '"cd lib/raycast && python setup.py build_ext --inplace"'
)
_state = {}


def _extension():
    """The compiled module, or None if it is not there or does not load."""
    if 'module' not in _state:
        import torch  # noqa: F401 (its libraries must be loaded before the extension's)

        try:
            _state['module'] = importlib.import_module(EXTENSION)
        except ImportError as error:
            _state['module'], _state['reason'] = None, str(error)
    return _state['module']


def extension_available() -> bool:
    """The CUDA extension is built and loads."""
    return _extension() is not None


def warn_not_built() -> None:
    """Say once per process that the CPU is used, and why."""
    if not _state.get('warned'):
        _state['warned'] = True
        reason = _state.get('reason', 'unknown reason')
        warnings.warn(f'{_NOT_BUILT} ({reason})', RuntimeWarning, stacklevel=3)


def trace(semantics, free_id, origins, directions, range_min, voxel_size, rays):
    """Cast rays through all volumes in one launch on the tensors' device and its current stream.

    Args:
        semantics: uint8 [V, X, Y, Z] on CUDA, V <= 8.
        origins: float64 [O, 3], directions: float32 [R, 3], same device, metres.
        range_min: three floats, metres. voxel_size: metres.
        rays: int32 [M], same device, in o * R + r.

    Returns:
        label uint8, voxel int32, distance float32, each [V, M].
    """
    _check(semantics, origins, directions, rays)
    return _extension().cast_rays(
        semantics, int(free_id), origins, directions, [float(v) for v in range_min], float(voxel_size), rays
    )


def _check(semantics, origins, directions, rays):
    """Raise ValueError for a tensor that the kernel cannot take; the binding checks again."""
    import torch

    expected = (
        ('semantics', semantics, torch.uint8, 4),
        ('origins', origins, torch.float64, 2),
        ('directions', directions, torch.float32, 2),
        ('rays', rays, torch.int32, 1),
    )
    for name, tensor, dtype, dims in expected:
        if not tensor.is_cuda or tensor.device != semantics.device:
            raise ValueError(f'{name} is on {tensor.device}; all tensors must be on one CUDA device')
        if tensor.dtype != dtype or tensor.dim() != dims or not tensor.is_contiguous():
            raise ValueError(
                '%s must be contiguous %s with %d dimensions, got %s %s'
                % (name, dtype, dims, tensor.dtype, tuple(tensor.shape))
            )
