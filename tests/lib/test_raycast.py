"""The ray caster against an independent slow one, against geometry, and its two other versions against it."""

import ctypes
import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from emulated_ray_kernel import EmulatedExtension
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slow_caster import cast_all

from lib import raycast
from lib.extension import Extension
from lib.raycast import cast_rays, kernels, trace

ROOT = Path(__file__).resolve().parents[2]
FREE = 3
needs_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and raycast.extension_available()), reason='needs a GPU and the built extension'
)
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def unit(vectors):
    vectors = np.asarray(vectors, dtype=np.float64)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


@st.composite
def scenes(draw):
    """A random volume with origins in, on the borders of, and outside it, and rays of every kind."""
    shape = tuple(draw(st.integers(1, 9)) for _ in range(3))
    voxel_size = draw(st.sampled_from([0.4, 0.25, 1.0, 0.1]))
    lower = np.array([draw(st.sampled_from([-2.0, 0.0, -0.7])) for _ in range(3)])
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    occupied = draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]))
    semantics = np.where(rng.random(shape) < occupied, rng.integers(0, FREE, shape), FREE).astype(np.uint8)
    in_voxels = rng.uniform(-3, np.array(shape) + 3, size=(4, 3))
    in_voxels[1] = np.round(in_voxels[1])  # on a corner
    in_voxels[2, draw(st.integers(0, 2))] = draw(st.integers(-2, 10))  # on a face
    in_voxels[3] = rng.uniform(0, shape)  # inside
    along_axes = np.concatenate([np.eye(3), -np.eye(3)])
    steps = (-1, 0, 1)
    diagonal = np.array([[x, y, z] for x in steps for y in steps for z in steps if x or y or z])
    directions = unit(np.concatenate([along_axes, diagonal, rng.normal(size=(12, 3))]))
    return semantics, lower + in_voxels * voxel_size, directions, lower, voxel_size


@quick
@given(scenes())
def test_equals_slow_caster(scene):
    semantics, origins, directions, lower, voxel_size = scene
    hits = cast_rays(semantics, origins, directions, lower, voxel_size, FREE)
    label, depth, voxel = cast_all(semantics, origins, directions, lower, voxel_size, FREE)
    np.testing.assert_array_equal(hits.voxel, voxel)
    np.testing.assert_array_equal(hits.label, label)
    np.testing.assert_array_equal(hits.distance_m, depth)  # the same operations: the same bits


@quick
@given(scenes())
def test_hits_are_where_geometry_says(scene):
    """Points along a ray meet nothing before the reported voxel, and leave it at the reported depth."""
    semantics, origins, directions, lower, voxel_size = scene
    inside = np.all((origins > lower) & (origins < lower + np.array(semantics.shape) * voxel_size), axis=1)
    origins = origins[inside]
    directions = directions[-12:]  # random ones: no sample point lies on a border
    hits = cast_rays(semantics, origins, directions, lower, voxel_size, FREE)
    rays = [(origin, direction) for origin in origins for direction in directions]
    for (origin, direction), depth, voxel in zip(rays, hits.distance_m, hits.voxel):
        direction = direction.astype(np.float64)
        # Not nearer than 1e-3 voxels to either end: origins may lie on a border, and positions are float32.
        margin = 1e-3 * voxel_size
        before = origin + np.linspace(margin, max(depth - margin, margin), 400)[:, None] * direction
        cells = np.floor((before - lower) / voxel_size).astype(int)
        cells = cells[np.all((cells >= 0) & (cells < semantics.shape), axis=1)]
        index = np.ravel_multi_index(cells.T, semantics.shape)
        last = np.flatnonzero(index == voxel)
        assert last.size == 0 or np.all(semantics.reshape(-1)[index[: last[0]]] == FREE)
        centre = (np.array(np.unravel_index(voxel, semantics.shape)) + 0.5) * voxel_size + lower
        assert np.abs((origin + depth * direction - centre) / voxel_size).max() < 0.5 + 1e-3


def wall(shape=(10, 6, 4)):
    semantics = np.full(shape, FREE, dtype=np.uint8)
    semantics[7] = 1
    return semantics


def test_depth_is_where_the_ray_leaves_the_voxel():
    hits = cast_rays(wall(), np.array([[0.5, 2.5, 1.5]]), np.array([[1.0, 0, 0]]), (0, 0, 0), 1.0, FREE)
    assert (hits.label[0], hits.distance_m[0]) == (1, 7.5)
    assert np.unravel_index(hits.voxel[0], wall().shape) == (7, 2, 1)


def test_without_a_hit_the_last_voxel_inside_counts():
    directions = np.array([[-1.0, 0, 0], [0, 1, 0]])
    hits = cast_rays(wall(), np.array([[0.5, 2.5, 1.5]]), directions, (0, 0, 0), 1.0, FREE)
    assert hits.label.tolist() == [FREE, FREE]
    np.testing.assert_array_equal(hits.distance_m, [0.5, 3.5])
    assert np.unravel_index(hits.voxel[1], wall().shape) == (0, 5, 1)


def test_a_ray_never_inside_takes_the_first_voxel():
    semantics = wall()
    semantics[0, 0, 0] = 2
    origins = np.array([[5.0, 3.0, 9.0], [-4.0, 3.0, 1.0]])
    hits = cast_rays(semantics, origins, np.array([[0.0, 0, 1], [0, 1, 0]]), (0, 0, 0), 0.5, FREE)
    assert hits.label.tolist() == [2] * 4
    assert hits.voxel.tolist() == [0] * 4
    np.testing.assert_array_equal(hits.distance_m, np.float32([-0.5] * 4))


def test_a_ray_from_outside_comes_in():
    hits = cast_rays(wall(), np.array([[-20.5, 2.5, 1.5]]), np.array([[1.0, 0, 0]]), (0, 0, 0), 1.0, FREE)
    assert (hits.label[0], hits.distance_m[0]) == (1, 28.5)


def test_at_most_a_thousand_steps_from_outside():
    semantics = np.full((4, 4, 4), 1, dtype=np.uint8)
    start = lambda steps: np.array([[-steps + 0.5, 2.5, 2.5]])  # noqa: E731
    near, far = (
        cast_rays(semantics, start(steps), np.array([[1.0, 0, 0]]), (0, 0, 0), 1.0, FREE) for steps in (999, 1001)
    )
    assert near.distance_m[0] == 999.5
    assert far.distance_m[0] == -1.0


@pytest.mark.parametrize('steps', [560, 700, *range(982, 1003)])
def test_steps_run_out_inside_the_grid(steps):
    """A ray that comes from far away ends where its steps do, whatever is behind; volumes do not cost it steps."""
    first = np.full((20, 3, 3), FREE, dtype=np.uint8)
    second = first.copy()
    first[5], second[7] = 1, 2
    origin, along_x = np.array([[-steps + 0.5, 1.5, 1.5]]), np.array([[1.0, 0, 0]])
    together = trace([first, second], origin, along_x, (0, 0, 0), 1.0, FREE)
    for volume, voxel, depth in zip((first, second), together.voxel, together.distance_m):
        _, expected_depth, expected_voxel = cast_all(volume, origin, along_x, (0.0, 0.0, 0.0), 1.0, FREE)
        assert (voxel[0], depth[0]) == (expected_voxel[0], expected_depth[0])


def test_a_long_grid_is_crossed_whole():
    semantics = np.full((1500, 1, 1), FREE, dtype=np.uint8)
    semantics[1490] = 1
    hits = cast_rays(semantics, np.array([[0.5, 0.5, 0.5]]), np.array([[1.0, 0, 0]]), (0, 0, 0), 1.0, FREE)
    assert (hits.label[0], hits.distance_m[0]) == (1, 1490.5)


def random_case(seed=0, shape=(40, 40, 16), volumes=2):
    rng = np.random.default_rng(seed)
    semantics = [
        np.where(rng.random(shape) < density, rng.integers(0, FREE, shape), FREE).astype(np.uint8)
        for density in np.linspace(0.002, 0.05, volumes)
    ]
    origins = rng.uniform(-9, 9, size=(5, 3)) * [1, 1, 0.4]
    return semantics, origins, unit(rng.normal(size=(2500, 3))), (-8.0, -8.0, -3.2), 0.4, FREE


def test_volumes_together_equal_volumes_alone():
    semantics, *rest = random_case(volumes=7)
    together = trace(semantics, *rest)
    for number, volume in enumerate(semantics):
        alone = cast_rays(volume, *rest)
        np.testing.assert_array_equal(together.voxel[number], alone.voxel)
        np.testing.assert_array_equal(together.distance_m[number], alone.distance_m)


@pytest.mark.parametrize('rays', [1, kernels.LANES - 1, kernels.LANES, kernels.LANES + 1, 3 * kernels.LANES])
def test_any_number_of_rays(rays):
    """Rays are cast in batches; the last one need not be full."""
    semantics, origins, directions, *rest = random_case(volumes=1)
    everything = cast_rays(semantics[0], origins[:1], directions, *rest)
    some = cast_rays(semantics[0], origins[:1], directions[:rays], *rest)
    np.testing.assert_array_equal(some.voxel, everything.voxel[:rays])
    np.testing.assert_array_equal(some.distance_m, everything.distance_m[:rays])
    assert len(cast_rays(semantics[0], origins[:0], directions, *rest).voxel) == 0


def test_threads_do_not_change_results(monkeypatch):
    semantics, *rest = random_case()
    monkeypatch.setattr(raycast, '_CHUNK', 700)
    one, three = (trace(semantics, *rest, threads=threads) for threads in (1, 3))
    np.testing.assert_array_equal(one.voxel, three.voxel)
    np.testing.assert_array_equal(one.distance_m, three.distance_m)


def test_number_of_threads(monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '3')
    assert raycast.num_threads() == 3
    monkeypatch.delenv('OMP_NUM_THREADS')
    assert raycast.num_threads() == len(os.sched_getaffinity(0))


def test_any_memory_layout_and_type():
    semantics, *rest = random_case(volumes=1)
    expected = cast_rays(semantics[0], *rest)
    volume = semantics[0]
    for variant in (np.asfortranarray(volume), volume.astype(np.int64), torch.from_numpy(volume)):
        hits = cast_rays(variant, *rest)
        np.testing.assert_array_equal(hits.label, expected.label)
        np.testing.assert_array_equal(hits.distance_m, expected.distance_m)


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(semantics=np.zeros((3, 3), np.uint8)), r'\[X, Y, Z\]'),
        (dict(semantics=np.zeros((3, 0, 3), np.uint8)), 'not empty'),
        (dict(origins=np.zeros((2, 2))), 'origins'),
        (dict(directions=np.zeros(3)), 'directions'),
        (dict(voxel_size=0), 'voxel_size'),
        (dict(point_cloud_range=(0, 0)), 'point_cloud_range'),
        (dict(device='tpu'), 'tpu'),
    ],
)
def test_wrong_arguments_are_named(change, words):
    arguments = dict(
        semantics=np.zeros((3, 3, 3), np.uint8),
        origins=np.zeros((1, 3)),
        directions=np.array([[1.0, 0, 0]]),
        point_cloud_range=(0, 0, 0),
        voxel_size=1.0,
        free_id=FREE,
    )
    arguments.update(change)
    with pytest.raises(ValueError, match=words):
        cast_rays(**arguments)


def test_without_extension_the_cpu_is_used_and_says_so_once(monkeypatch):
    nowhere = Extension('lib.raycast.nowhere', 1, raycast.EXTENSION.build_command + ' # here', 'rays go elsewhere')
    monkeypatch.setattr(raycast, 'EXTENSION', nowhere)
    with pytest.warns(RuntimeWarning, match='build_ext'):
        assert raycast.choose_device('cuda:0') == 'cpu'
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert raycast.choose_device('cuda:0') == 'cpu'
        assert raycast.choose_device('cpu') == 'cpu'


def test_interface_version_is_that_of_the_header():
    header = (ROOT / 'lib' / 'raycast' / 'csrc' / 'ray_cast.h').read_text()
    assert f'kInterfaceVersion = {raycast.EXTENSION.interface_version};' in header


@pytest.mark.skipif(platform.machine() != 'x86_64', reason='looks at x86-64 vectors')
def test_steps_become_vector_instructions():
    """Else casting is three times slower, and nothing else says so."""
    step = numba.njit(error_model='numpy')(kernels._advance.py_func)  # not from the cache, which has no code to show
    step.compile('void(float64[::1], uint64)')
    (code,) = step.inspect_llvm().values()
    assert re.search(r'<\d+ x double>', code)


def test_import_compiles_nothing():
    code = 'import sys, lib.raycast; assert not {"numba", "torch", "lib.raycast.kernels"} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], cwd=str(ROOT), check=True)


def test_handling_of_tensors_around_the_kernel(monkeypatch):
    """The CUDA path but for the kernel, on CPU tensors."""

    def trace_one(semantics, free_id, origins, num_origins, directions, point_cloud_range, voxel_size):
        assert num_origins.tolist() == [len(origins[0])]
        volume = semantics[0, 0].numpy()
        hits = cast_rays(volume, origins[0].numpy(), directions.numpy(), point_cloud_range, voxel_size, free_id)
        arrays = (hits.label, hits.voxel, hits.distance_m)
        return tuple(torch.from_numpy(array)[None, None] for array in arrays)

    monkeypatch.setattr(raycast, 'trace_on_gpu', trace_one)
    semantics, origins, directions, *rest = random_case()
    directions.setflags(write=False)
    expected = cast_rays(semantics[0], origins, directions, *rest)
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # PyTorch warns about read-only arrays
        hits = raycast._cast_on_gpu(semantics[0], origins, directions, *rest, 'cpu')
    np.testing.assert_array_equal(expected.label, hits[0].numpy())
    np.testing.assert_array_equal(expected.distance_m, hits[1].numpy())
    np.testing.assert_array_equal(expected.voxel, hits[2].numpy())


@pytest.fixture(scope='module')
def host_library(tmp_path_factory):
    """The CUDA version's traversal, compiled for the CPU."""
    compiler = shutil.which('g++')
    if compiler is None:
        pytest.skip('needs g++')
    folder = tmp_path_factory.mktemp('traversal')
    (folder / 'host.cpp').write_text("""
        #include "traversal.h"
        extern "C" void trace(const unsigned char* semantics, const int* size, const double* lower,
                              double voxel_size, int free_id, int num_origins, const double* origins,
                              int num_directions, const float* directions, int* voxel_out,
                              float* distance_out) {
          raycast::Grid grid;
          for (int a = 0; a < 3; ++a) { grid.size[a] = size[a]; grid.lower_m[a] = lower[a]; }
          grid.voxel_size_m = static_cast<float>(voxel_size);
          for (int i = 0; i < num_origins * num_directions; ++i) {
            raycast::trace_ray(
                grid, origins + i / num_directions * 3, directions + i % num_directions * 3, 1u,
                [&](int voxel, unsigned pending) { return semantics[voxel] != free_id ? pending : 0u; },
                [&](unsigned, int voxel, float distance) {
                  voxel_out[i] = voxel;
                  distance_out[i] = distance;
                });
          }
        }""")
    library = folder / 'host.so'
    headers = str(ROOT / 'lib' / 'raycast' / 'csrc')
    subprocess.run(
        [
            compiler,
            '-O2',
            '-ffp-contract=off',
            '-std=c++14',
            '-shared',
            '-fPIC',
            '-I',
            headers,
            str(folder / 'host.cpp'),
            '-o',
            str(library),
        ],
        check=True,
    )
    return ctypes.CDLL(str(library))


def trace_in_cpp(library, semantics, origins, directions, lower, voxel_size, free_id):
    lower = np.asarray(lower[:3], dtype=np.float64)
    size = np.array(semantics.shape, dtype=np.int32)
    origins = np.ascontiguousarray(origins, dtype=np.float64)
    voxel = np.empty(len(origins) * len(directions), dtype=np.int32)
    distance = np.empty(len(voxel), dtype=np.float32)
    pointer = lambda array: ctypes.c_void_p(array.ctypes.data)  # noqa: E731
    library.trace(
        pointer(semantics),
        pointer(size),
        pointer(lower),
        ctypes.c_double(voxel_size),
        free_id,
        len(origins),
        pointer(origins),
        len(directions),
        pointer(directions),
        pointer(voxel),
        pointer(distance),
    )
    return voxel, distance


def test_cpp_version_equals_numba_version(host_library):
    for seed in range(4):
        semantics, *rest = random_case(seed, volumes=1)
        voxel, distance = trace_in_cpp(host_library, semantics[0], *rest)
        hits = cast_rays(semantics[0], *rest)
        np.testing.assert_array_equal(voxel, hits.voxel)
        np.testing.assert_array_equal(distance, hits.distance_m)  # the same operations: the same bits


@quick
@given(scene=scenes())
def test_cpp_version_equals_numba_version_on_odd_rays(host_library, scene):
    semantics, origins, directions, lower, voxel_size = scene
    voxel, distance = trace_in_cpp(host_library, semantics, origins, directions, lower, voxel_size, FREE)
    hits = cast_rays(semantics, origins, directions, lower, voxel_size, FREE)
    np.testing.assert_array_equal(voxel, hits.voxel)
    np.testing.assert_array_equal(distance, hits.distance_m)


def test_works_after_a_fork(monkeypatch):
    """A pool of threads made before a fork does not hang the child (data loader workers are forked)."""
    if not hasattr(os, 'fork'):
        pytest.skip('needs fork')
    monkeypatch.setenv('OMP_NUM_THREADS', '2')
    semantics, *rest = random_case(volumes=1)
    expected = cast_rays(semantics[0], *rest).distance_m
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            total = cast_rays(semantics[0], *rest).distance_m.sum(dtype=np.float64)
            os.write(writer, pickle.dumps(float(total)))
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert pickle.loads(os.read(reader, 1000)) == expected.sum(dtype=np.float64)


def stacked(cases):
    """Tensors of several cases, as the kernel takes them; the volumes, origins and counts of each differ."""
    most = max(len(origins) for _, origins in cases)
    padded = [np.pad(origins, ((0, most - len(origins)), (0, 0))) for _, origins in cases]
    counts = torch.tensor([len(origins) for _, origins in cases], dtype=torch.int32)
    return torch.from_numpy(np.array([volumes for volumes, _ in cases])), torch.from_numpy(np.array(padded)), counts


def check_kernel(volumes, device):
    """Several samples in one launch, with different numbers of origins, against the CPU."""
    semantics, origins, directions, lower, voxel_size, free_id = random_case(3, volumes=volumes)
    cases = [(semantics, origins[:count]) for count in (5, 2, 0)] + [(random_case(4, volumes=volumes)[0], origins[1:])]
    tensors = [tensor.to(device) for tensor in stacked(cases)]
    rays = torch.from_numpy(directions).to(device)
    found = raycast.trace_on_gpu(tensors[0], free_id, tensors[1], tensors[2], rays, lower, voxel_size)
    label, voxel, distance = (tensor.cpu().numpy() for tensor in found)
    for sample, (of_sample, from_where) in enumerate(cases):
        known = len(from_where) * len(directions)
        expected = trace(of_sample, from_where, directions, lower, voxel_size, free_id)
        np.testing.assert_array_equal(voxel[sample, :, :known], expected.voxel)
        np.testing.assert_array_equal(distance[sample, :, :known], expected.distance_m)
        labels = [volume.reshape(-1)[index] for volume, index in zip(of_sample, expected.voxel)]
        np.testing.assert_array_equal(label[sample, :, :known], labels)
        assert np.all(label[sample, :, known:] == free_id)


@needs_cuda
@pytest.mark.parametrize('volumes', [1, 2, 7])
def test_cuda_equals_cpu(volumes):
    check_kernel(volumes, 'cuda')


@pytest.mark.parametrize('volumes', [1, 2, 7])
def test_kernel_equals_cpu_by_emulation(volumes, tmp_path, monkeypatch):
    monkeypatch.setattr(raycast, '_check_tensors', lambda *tensors: None)
    monkeypatch.setattr(raycast.EXTENSION, 'find', lambda device: extension)
    extension = EmulatedExtension(tmp_path)
    check_kernel(volumes, 'cpu')


@needs_cuda
@settings(max_examples=60, deadline=None)
@given(scenes())
def test_cuda_equals_cpu_on_odd_rays(scene):
    semantics, origins, directions, lower, voxel_size = scene
    on_cpu = cast_rays(semantics, origins, directions, lower, voxel_size, FREE)
    on_gpu = cast_rays(semantics, origins, directions, lower, voxel_size, FREE, device='cuda')
    np.testing.assert_array_equal(on_cpu.voxel, on_gpu.voxel.cpu().numpy())
    np.testing.assert_array_equal(on_cpu.distance_m, on_gpu.distance_m.cpu().numpy())


def kernel_tensors():
    return dict(
        semantics=torch.zeros(2, 1, 4, 4, 4, dtype=torch.uint8),
        origins=torch.zeros(2, 1, 3, dtype=torch.float64),
        num_origins=torch.ones(2, dtype=torch.int32),
        directions=torch.ones(5, 3),
    )


def test_the_kernel_is_kept_from_tensors_on_the_cpu():
    with pytest.raises(ValueError, match='semantics is on cpu'):
        raycast.trace_on_gpu(free_id=0, point_cloud_range=(0, 0, 0), voxel_size=1.0, **kernel_tensors())


@needs_cuda
@pytest.mark.parametrize(
    'name, change, words',
    [
        ('semantics', lambda tensor: tensor.int(), 'semantics must be contiguous torch.uint8'),
        ('semantics', lambda tensor: tensor[0], 'with 5 dimensions'),
        ('origins', lambda tensor: tensor.float(), 'origins must be contiguous torch.float64'),
        ('directions', lambda tensor: tensor.cpu(), 'directions is on cpu'),
        ('directions', lambda tensor: tensor.t().contiguous().t(), 'directions must be contiguous'),
        ('num_origins', lambda tensor: tensor.long(), 'num_origins must be contiguous torch.int32'),
    ],
)
def test_the_kernel_is_kept_from_wrong_tensors(name, change, words):
    tensors = {key: tensor.cuda() for key, tensor in kernel_tensors().items()}
    raycast.trace_on_gpu(free_id=0, point_cloud_range=(0, 0, 0), voxel_size=1.0, **tensors)
    tensors[name] = change(tensors[name])
    with pytest.raises(ValueError, match=words):
        raycast.trace_on_gpu(free_id=0, point_cloud_range=(0, 0, 0), voxel_size=1.0, **tensors)


@needs_cuda
def test_cuda_follows_the_current_stream():
    """The kernel waits for what its stream did before."""
    semantics, *rest = random_case(volumes=1)
    expected = cast_rays(semantics[0], *rest)
    volume = torch.full_like(torch.from_numpy(semantics[0]), FREE).cuda()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        volume.copy_(torch.from_numpy(semantics[0]))
        hits = cast_rays(volume, *rest, device='cuda')
        np.testing.assert_array_equal(hits.distance_m.cpu().numpy(), expected.distance_m)
