"""Ray casting on the CPU: the compiled traversal over chunks of rays, spread over threads."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Sequence

import numpy as np

_CHUNK = 4096  # rays; many chunks per thread even out rays of different lengths
_pools = {}


def num_threads() -> int:
    """Threads used: $OMP_NUM_THREADS if set (torchrun sets it), else the CPUs this process may use."""
    wanted = os.environ.get('OMP_NUM_THREADS', '')
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def trace(semantics, free_id, origins, directions, range_min, voxel_size, rays):
    """Cast rays through all volumes.

    Args:
        semantics: V <= 8 integer volumes [X, Y, Z].
        origins: float64 [O, 3], directions: float32 [R, 3], range_min: three floats, metres.
        voxel_size: metres.
        rays: int32 [M].

    Returns:
        voxel int32 and distance float32, each [V, M].
    """
    from .kernels import trace_rays  # compiles; only when a ray is cast

    occupied = occupancy_bits(semantics, free_id)
    voxel = np.empty((len(semantics), len(rays)), dtype=np.int32)
    distance = np.empty(voxel.shape, dtype=np.float32)
    common = (
        occupied,
        origins,
        directions,
        np.asarray(range_min, dtype=np.float64),
        float(np.float32(voxel_size)),
        rays,
    )
    _in_chunks(lambda first, last: trace_rays(*common, first, last, voxel, distance), len(rays))
    return voxel, distance


def occupancy_bits(semantics: Sequence[np.ndarray], free_id: int) -> np.ndarray:
    """uint8 [X, Y, Z] whose bit v says that volume v is not free there."""
    bits = np.not_equal(semantics[0], free_id).view(np.uint8)
    for volume in range(1, len(semantics)):
        bits |= np.not_equal(semantics[volume], free_id).view(np.uint8) << np.uint8(volume)
    return np.ascontiguousarray(bits)


def _in_chunks(work, total):
    """Call ``work(first, last)`` for consecutive ranges that cover ``total``, on several threads."""
    chunks = [(first, min(first + _CHUNK, total)) for first in range(0, total, _CHUNK)]
    threads = min(num_threads(), len(chunks))
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
