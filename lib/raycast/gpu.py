"""Ray casting on CUDA: loads the compiled extension on first use and launches it."""

from lib.extension import Extension

EXTENSION = Extension(
    'lib.raycast.raycast_cuda',
    interface_version=1,
    build_command='cd lib/raycast && python setup.py build_ext --inplace',
    otherwise='rays are cast on the CPU',
)


def extension_available(device='cuda') -> bool:
    """The CUDA extension is built and runs on the device; if not, a warning has said why, once."""
    return EXTENSION.find(device) is not None


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
    return EXTENSION.find(semantics.device).cast_rays(
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
                f'{name} must be contiguous {dtype} with {dims} dimensions, got {tensor.dtype} {tuple(tensor.shape)}'
            )
