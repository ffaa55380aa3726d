"""Ray casting on CUDA: loads the compiled extension on first use and launches it, many samples at once.

S samples, V volumes each, X, Y, Z the grid, O origins, R directions, M = O * R rays.
"""

import importlib.util
import warnings

from ..extension import Extension

MAX_VOLUMES = 7
EXTENSION = Extension(
    f'{__package__}.raycast_cuda',
    interface_version=2,
    build_command='cd lib/raycast && python setup.py build_ext --inplace',
    otherwise='rays are cast on the CPU',
)


def extension_available(device='cuda') -> bool:
    """The CUDA extension is built and runs on the device; if not, a warning has said why, once."""
    if importlib.util.find_spec('torch') is None:
        warnings.warn('PyTorch is not installed, so rays are cast on the CPU', RuntimeWarning, stacklevel=3)
        return False
    return EXTENSION.find(device) is not None


def cast_rays(semantics, origins, directions, point_cloud_range, voxel_size, free_id, device):
    """Label, distance (metres) and voxel, [M] each, of one volume [X, Y, Z]; see ``lib.raycast.cast_rays``."""
    import torch

    semantics = torch.as_tensor(semantics, device=device).to(torch.uint8)
    origins = to_tensor(origins, torch.float64, device)
    counts = torch.full((1,), len(origins), dtype=torch.int32, device=device)
    volumes, origins = semantics.contiguous()[None, None], origins[None]
    directions = to_tensor(directions, torch.float32, device)
    label, voxel, distance = trace(volumes, free_id, origins, counts, directions, point_cloud_range, voxel_size)
    return label[0, 0], distance[0, 0], voxel[0, 0]


def to_tensor(points, dtype, device):
    """Contiguous tensor of an array or tensor. PyTorch would warn about a read-only array."""
    import torch

    if not isinstance(points, torch.Tensor) and not points.flags.writeable:
        points = points.copy()
    return torch.as_tensor(points, dtype=dtype, device=device).contiguous()


def trace(semantics, free_id, origins, num_origins, directions, point_cloud_range, voxel_size):
    """Cast the rays of several samples in one launch on the tensors' device and its current stream.

    Args:
        semantics: uint8 [S, V, X, Y, Z] on CUDA, V <= 7.
        free_id: label that lets rays pass; also the label of rays whose origin a sample does not have.
        origins: float64 [S, O, 3], metres; num_origins: int32 [S], how many of them each sample has.
        directions: float32 [R, 3].
        point_cloud_range: three floats or more, metres, lower corner first. voxel_size: metres.

    Returns:
        label uint8, voxel int32, distance float32 (metres), each [S, V, M].
    """
    _check(semantics, origins, num_origins, directions)
    lower = [float(value) for value in point_cloud_range[:3]]
    module = EXTENSION.find(semantics.device)
    return module.cast_rays(semantics, int(free_id), origins, num_origins, directions, lower, float(voxel_size))


def _check(semantics, origins, num_origins, directions):
    """Raise ValueError for a tensor that the kernel cannot take; the binding checks again."""
    import torch

    expected = (
        ('semantics', semantics, torch.uint8, 5),
        ('origins', origins, torch.float64, 3),
        ('num_origins', num_origins, torch.int32, 1),
        ('directions', directions, torch.float32, 2),
    )
    for name, tensor, dtype, dims in expected:
        if not tensor.is_cuda or tensor.device != semantics.device:
            raise ValueError(f'{name} is on {tensor.device}; all tensors must be on one CUDA device')
        if tensor.dtype != dtype or tensor.dim() != dims or not tensor.is_contiguous():
            raise ValueError(
                f'{name} must be contiguous {dtype} with {dims} dimensions, got {tensor.dtype} {tuple(tensor.shape)}'
            )
