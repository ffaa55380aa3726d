"""Casting of rays through voxel volumes: checks of arguments, one function for either device, the CPU's threads, and
the launch of the compiled CUDA extension, which is loaded on first use.

V volumes, X, Y, Z their grid, O origins, R directions, M = O * R rays; on CUDA S samples at once.
"""

import importlib.util
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, List, NamedTuple, Optional, Sequence

import numpy as np

from ..extension import Extension

MAX_VOLUMES = 7
EXTENSION = Extension(
    f'{__package__}.raycast_cuda',
    interface_version=2,
    build_command='cd lib/raycast && python setup.py build_ext --inplace',
    otherwise='rays are cast on the CPU',
)
_CHUNK = 4096  # rays; many chunks per thread even out rays of different lengths
_pools = {}


class RayHits(NamedTuple):
    """Where M rays end in one volume. NumPy arrays from the CPU, tensors on the device from CUDA.

    Attributes:
        label: [M], label of the voxel the ray ends in (type of the labels).
        distance_m: float32 [M], metres from the origin to where the ray leaves that voxel.
        voxel: int32 [M], that voxel's row-major index in [X, Y, Z].
    """

    label: Any
    distance_m: Any
    voxel: Any


class RayEnds(NamedTuple):
    """Where M rays end in each of V volumes.

    Attributes:
        voxel: int32 [V, M], row-major index in [X, Y, Z].
        distance_m: float32 [V, M], metres from the origin to where the ray leaves that voxel.
    """

    voxel: np.ndarray
    distance_m: np.ndarray


def cast_rays(
    semantics, origins, directions, point_cloud_range: Sequence[float], voxel_size: float, free_id: int, device='cpu'
) -> RayHits:
    """Cast every direction from every origin through a volume.

    A ray ends in the first occupied voxel it meets inside the grid, or in the last voxel inside. A ray that
    never comes inside gets distance -voxel_size and voxel 0.

    Args:
        semantics: labels [X, Y, Z], integer 0..255, array or tensor.
        origins: [O, 3], metres, frame of the volume.
        directions: [R, 3], unit vectors; used in float32.
        point_cloud_range: (x0, y0, z0, ...) metres, lower corner of the volume first.
        voxel_size: metres.
        free_id: label that lets rays pass.
        device: ``'cpu'`` or a CUDA device. Without the built extension the CPU does it and says so once.

    Returns:
        RayHits of M = O * R rays, ray o * R + r in direction r from origin o; on ``device``.
    """
    if choose_device(device) != 'cpu':
        _check([semantics], origins, directions, point_cloud_range, voxel_size)
        return RayHits(*_cast_on_gpu(semantics, origins, directions, point_cloud_range, voxel_size, free_id, device))
    semantics = to_numpy(semantics)
    ends = trace([semantics], to_numpy(origins), to_numpy(directions), point_cloud_range, voxel_size, free_id)
    hits = RayHits(semantics.reshape(-1)[ends.voxel[0]], ends.distance_m[0], ends.voxel[0])
    return hits if _device_type(device) == 'cpu' else RayHits(*(_to_device(array, device) for array in hits))


def trace(
    volumes: Sequence[np.ndarray],
    origins: np.ndarray,
    directions: np.ndarray,
    point_cloud_range: Sequence[float],
    voxel_size: float,
    free_id: int,
    threads: Optional[int] = None,
) -> RayEnds:
    """Cast the same rays through several volumes at once on the CPU: the paths are walked once.

    Args:
        volumes: at most 7 of labels [X, Y, Z], e.g. truth and prediction.
        threads: None takes :func:`num_threads`.

    The other arguments are those of :func:`cast_rays`.
    """
    from .kernels import BORDER, mark_occupied, trace_rays  # compiles; only when a ray is cast

    _check(volumes, origins, directions, point_cloud_range, voxel_size)
    origins = np.array(origins, dtype=np.float64, order='C')
    directions = np.ascontiguousarray(directions, dtype=np.float32)
    lower, voxel_size = np.array(point_cloud_range[:3], dtype=np.float64), float(np.float32(voxel_size))
    cells = np.full([size + 2 for size in volumes[0].shape], BORDER, dtype=np.uint8)
    cells[1:-1, 1:-1, 1:-1] = 0
    for bit, volume in enumerate(volumes):
        mark_occupied(volume, free_id, 1 << bit, cells)
    starts = ((origins - lower) / voxel_size).astype(np.float32).astype(np.float64)
    total = len(origins) * len(directions)
    ends = RayEnds(np.empty((len(volumes), total), np.int32), np.empty((len(volumes), total), np.float32))
    common = (cells, starts, origins, directions, lower, voxel_size)
    _in_chunks(lambda first, last: trace_rays(*common, first, last, *ends), total, threads or num_threads())
    return ends


def choose_device(device) -> str:
    """``device`` as text, or ``'cpu'`` (said once) where it is CUDA but the extension cannot be used on it."""
    if _device_type(device) == 'cpu' or extension_available(device):
        return str(device)
    return 'cpu'


def extension_available(device='cuda') -> bool:
    """The CUDA extension is built and runs on the device; if not, a warning has said why, once."""
    if importlib.util.find_spec('torch') is None:
        warnings.warn('PyTorch is not installed, so rays are cast on the CPU', RuntimeWarning, stacklevel=3)
        return False
    return EXTENSION.find(device) is not None


def num_threads() -> int:
    """Threads used: $OMP_NUM_THREADS if set (torchrun sets it), else the CPUs this process may use."""
    wanted = os.environ.get('OMP_NUM_THREADS', '')
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    return count_cores()


def count_cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _device_type(device):
    kind = str(device).split(':')[0]
    if kind not in ('cpu', 'cuda'):
        raise ValueError(f'rays are cast on "cpu" or "cuda", not on {device!r}')
    return kind


def _check(volumes, origins, directions, point_cloud_range, voxel_size):
    """Raise ValueError for arguments that do not fit together; only shapes are looked at."""
    if not 1 <= len(volumes) <= MAX_VOLUMES:
        raise ValueError(f'1 to {MAX_VOLUMES} volumes can be cast through at once, got {len(volumes)}')
    shape = tuple(volumes[0].shape)
    if len(shape) != 3 or 0 in shape or any(tuple(volume.shape) != shape for volume in volumes):
        shapes: List = [tuple(volume.shape) for volume in volumes]
        raise ValueError(f'volumes must be [X, Y, Z] of one shape, not empty; got {shapes}')
    for name, points in (('origins', origins), ('directions', directions)):
        if len(points.shape) != 2 or points.shape[1] != 3:
            raise ValueError(f'{name} must be [n, 3], got shape {tuple(points.shape)}')
    if len(point_cloud_range) < 3 or not voxel_size > 0:
        raise ValueError(
            f'point_cloud_range needs its lower corner and voxel_size must be positive; got {list(point_cloud_range)} '
            f'and {voxel_size!r}'
        )


def _in_chunks(work, total, threads):
    """Call ``work(first, last)`` for consecutive ranges that cover ``total``, on several threads."""
    chunks = [(first, min(first + _CHUNK, total)) for first in range(0, total, _CHUNK)]
    threads = min(threads, len(chunks))
    if threads <= 1:
        work(0, total)
        return
    list(_pool(threads).map(lambda chunk: work(*chunk), chunks))  # raises what a chunk raised


def _pool(threads):
    """Thread pool of this process: threads do not survive a fork."""
    key = (os.getpid(), threads)
    if key not in _pools:
        _pools.clear()
        _pools[key] = ThreadPoolExecutor(threads, thread_name_prefix='raycast')
    return _pools[key]


def to_numpy(value) -> np.ndarray:
    """The array, or a tensor's values, wherever it is."""
    return value if isinstance(value, np.ndarray) else value.detach().cpu().numpy()


def _to_device(array, device):
    import torch

    return torch.from_numpy(array).to(device)


# -- on CUDA


def _cast_on_gpu(semantics, origins, directions, point_cloud_range, voxel_size, free_id, device):
    """Label, distance (metres) and voxel, [M] each, of one volume [X, Y, Z]; see :func:`cast_rays`."""
    import torch

    semantics = torch.as_tensor(semantics, device=device).to(torch.uint8)
    origins = to_tensor(origins, torch.float64, device)
    counts = torch.full((1,), len(origins), dtype=torch.int32, device=device)
    volumes, origins = semantics.contiguous()[None, None], origins[None]
    directions = to_tensor(directions, torch.float32, device)
    label, voxel, distance = trace_on_gpu(volumes, free_id, origins, counts, directions, point_cloud_range, voxel_size)
    return label[0, 0], distance[0, 0], voxel[0, 0]


def to_tensor(points, dtype, device):
    """Contiguous tensor of an array or tensor. PyTorch would warn about a read-only array."""
    import torch

    if not isinstance(points, torch.Tensor) and not points.flags.writeable:
        points = points.copy()
    return torch.as_tensor(points, dtype=dtype, device=device).contiguous()


def trace_on_gpu(semantics, free_id, origins, num_origins, directions, point_cloud_range, voxel_size):
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
    _check_tensors(semantics, origins, num_origins, directions)
    lower = [float(value) for value in point_cloud_range[:3]]
    module = EXTENSION.find(semantics.device)
    return module.cast_rays(semantics, int(free_id), origins, num_origins, directions, lower, float(voxel_size))


def _check_tensors(semantics, origins, num_origins, directions):
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
