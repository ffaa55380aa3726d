"""Makes a toy data set: one job per keyframe, spread over processes; tables last.

The tables are written when everything else is, so a new folder that has them is complete.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

import numpy as np

from lib.errors import UserError

from . import tables
from .files import write_bytes, write_jpeg, write_npz, write_png
from .names import ScenePlan
from .rig import CAMERA_PERIOD_US, CAMERA_SWEEPS, KEYFRAME_US, LIDAR, LIDAR_PERIOD_US, LIDAR_SWEEPS, Rig, make_rig
from .road import GROUND_CLASSES
from .world import ToyWorld

LABEL_SETS = ('occ3d', 'openocc_v2')
TRUTH_FOLDER = 'toy_truth'
ANNOTATION_RANGE = 75.0  # metres from the ego car
GPU_BYTES_PER_WORKER = 5 << 29  # its context and the tensors of six images, about
_FIRST_TIMESTAMP, _SCENE_SPACING = 1700000000000000, 3600 * 1000000


class Options(NamedTuple):
    """What to make.

    Attributes:
        out: data root.
        plan: the scenes.
        keyframes: per scene.
        size: (width, height) of the images.
        sweeps: make the images and scans between keyframes.
        seed: of everything.
        workers: processes.
        device: 'cpu' or 'cuda', where images are traced.
        label_sets: names out of LABEL_SETS.
    """

    out: Path
    plan: ScenePlan
    keyframes: int
    size: Tuple[int, int]
    sweeps: bool
    seed: int
    workers: int
    device: str
    label_sets: Tuple[str, ...]


class Job(NamedTuple):
    """One keyframe of one scene, and the sweeps up to the next."""

    options: Options
    scene: int
    keyframe: int


class JobResult(NamedTuple):
    """What the tables need to know of a job; ``categories`` by object index."""

    scene: int
    sensors: List[tables.SensorRecord]
    boxes: List[tables.BoxRecord]
    categories: Dict[int, str]


class _Moment(NamedTuple):
    """When a sensor fires: microseconds after the scene's first keyframe, the keyframe that it belongs to (a
    sweep to the one it leads up to, as in nuScenes), is it a keyframe."""

    offset_us: int
    keyframe: int
    is_key_frame: bool


def generate(options: Options, progress) -> None:
    """Make the data set. ``progress(iterable, total)`` wraps the jobs' results to show how far they are.

    Raises:
        UserError: a file cannot be written, or a worker was killed.
    """
    jobs = [Job(options, s, k) for s in range(len(options.plan.names)) for k in range(options.keyframes)]
    results: Dict[int, List[JobResult]] = {}
    for result in progress(_run_jobs(jobs, options), len(jobs)):
        results.setdefault(result.scene, []).append(result)
    writer = tables.TableWriter(options.seed, annotations=options.plan.version != 'v1.0-test')
    for scene in sorted(results):
        writer.add_scene(_scene_record(options, scene, results[scene]))
    writer.write(options.out / options.plan.version)


def _run_jobs(jobs, options):
    workers = min(options.workers, len(jobs))
    if workers == 1:
        for job in jobs:
            yield run_job(job)
        return
    _compile_tracers()  # once here, not once in every worker
    fork = options.device == 'cpu' and 'fork' in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context('fork' if fork else 'spawn')
    stop = context.Event()
    try:
        with ProcessPoolExecutor(workers, context, _start_worker, (stop,)) as pool, _set_at_end(stop):
            for result in pool.map(run_job, jobs, chunksize=_run_length(len(jobs), workers)):
                yield result
    except BrokenProcessPool as error:
        raise UserError('a worker process was killed (out of memory?); run again with fewer --workers') from error


@contextlib.contextmanager
def _set_at_end(event):
    """Set the event when the block ends, in whatever way: workers that are still busy then give up."""
    try:
        yield
    finally:
        event.set()


class _Stopped(Exception):
    """Nobody waits for this job any more."""


_stop_event = None  # of the pool that this process works for


def _start_worker(stop):
    """Leave Ctrl-C to the parent, which sets ``stop``."""
    global _stop_event
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _stop_event = stop


def _check_wanted():
    if _stop_event is not None and _stop_event.is_set():
        raise _Stopped


def _run_length(jobs, workers):
    """Neighbouring jobs that one worker does in a row: opening a scene costs as much as a few label files."""
    return max(1, jobs // (6 * workers))


def _compile_tracers():
    """Run every compiled function once on next to nothing."""
    from .trace import PackedScene
    from .trace_cpu import trace_fan, trace_image, trace_rays
    from .trace_voxels import mark_seen

    scene = PackedScene(np.zeros(1, np.int32), np.ones((1, 11), np.float32), np.zeros((5, 3), np.float32))
    trace_image(scene, np.eye(3), np.eye(3), (2, 2))
    trace_rays(scene, np.eye(3))
    trace_fan(scene, np.eye(3), np.ones((1, 1, 3)), 10.0)
    mark_seen(np.zeros((2, 2, 2), bool), np.ones(3), np.eye(3), np.ones(3), np.zeros((2, 2, 2), np.uint8))


class _Scene:
    """A scene in the hands of a worker."""

    def __init__(self, seed, index, keyframes, size, device):
        import torch

        from .labels import Labeller
        from .render import Renderer

        torch.set_num_threads(1)
        self.world: ToyWorld = ToyWorld(seed, index, keyframes)
        self.rig: Rig = make_rig(seed, index, size)
        self.labeller = Labeller(self.world, self.rig)
        self.renderer = Renderer(self.world, torch.device(device))


@functools.lru_cache(maxsize=2)
def _open_scene(seed, index, keyframes, size, device):
    return _Scene(seed, index, keyframes, size, device)


def run_job(job: Job) -> JobResult:
    """Make all files of one keyframe, and of the sweeps up to the next keyframe."""
    o = job.options
    _check_wanted()
    scene = _open_scene(o.seed, job.scene, o.keyframes, o.size, o.device)
    sensors = _camera_records(job, scene) + _lidar_records(job, scene)
    if job.keyframe == 0:
        _write_map(job, scene.world)
    boxes = []
    if o.plan.version != 'v1.0-test':
        _write_labels(job, scene)
        boxes = _boxes(job, scene)
    return JobResult(job.scene, sensors, boxes, {o.index: o.type.category for o in scene.world.annotated})


def _moments(job, delay_us, period_us, sweeps) -> List[_Moment]:
    """The keyframe's moment, then those of its sweeps."""
    start = job.keyframe * KEYFRAME_US + delay_us
    moments = [_Moment(start, job.keyframe, True)]
    if job.options.sweeps and job.keyframe + 1 < job.options.keyframes:
        moments += [_Moment(start + j * period_us, job.keyframe + 1, False) for j in range(1, sweeps + 1)]
    return moments


def _timestamp(scene_index, offset_us):
    return _FIRST_TIMESTAMP + scene_index * _SCENE_SPACING + offset_us


def _filename(job, channel, moment, suffix):
    name = '%s__%s__%d.%s' % (
        tables.log_name(job.options.plan.names[job.scene]),
        channel,
        _timestamp(job.scene, moment.offset_us),
        suffix,
    )
    return '/'.join(['samples' if moment.is_key_frame else 'sweeps', channel, name])


def _record(job, scene, channel, moment, filename, size):
    return tables.SensorRecord(
        channel,
        _timestamp(job.scene, moment.offset_us),
        filename,
        moment.keyframe,
        moment.is_key_frame,
        scene.world.ego_to_map(moment.offset_us * 1e-6),
        size,
    )


def _camera_records(job, scene):
    records = []
    cameras = list(scene.rig.cameras.values())
    moments = [_moments(job, camera.delay_us, CAMERA_PERIOD_US, CAMERA_SWEEPS) for camera in cameras]
    for round_ in zip(*moments):
        _check_wanted()
        # All cameras fire within 50 ms and share one shadow map.
        shadows = scene.renderer.shadows(round_[0].offset_us * 1e-6)
        views = scene.renderer.views(cameras, [moment.offset_us * 1e-6 for moment in round_], shadows)
        for camera, moment, view in zip(cameras, round_, views):
            filename = _filename(job, camera.name, moment, 'jpg')
            write_jpeg(job.options.out / filename, view.image)
            records.append(_record(job, scene, camera.name, moment, filename, camera.size))
    return records


def _lidar_records(job, scene):
    from .lidar import scan

    records = []
    for moment in _moments(job, 0, LIDAR_PERIOD_US, LIDAR_SWEEPS):
        rng = np.random.default_rng([job.options.seed, job.scene, 3, moment.offset_us])
        points = scan(scene.world, scene.rig, moment.offset_us * 1e-6, rng).points
        filename = _filename(job, LIDAR, moment, 'pcd.bin')
        write_bytes(job.options.out / filename, points.tobytes())
        records.append(_record(job, scene, LIDAR, moment, filename, (0, 0)))
    return records


def _map_file(job_or_name):
    return 'maps/{}.png'.format(tables.token('map', job_or_name))


def _write_map(job, world):
    """Map mask, north up: 255 where one can drive or walk along the road."""
    codes = [c for c, name in GROUND_CLASSES.items() if name in ('driveable_surface', 'sidewalk')]
    mask = np.where(np.isin(world.ground, codes), 255, 0).astype(np.uint8)
    write_png(job.options.out / _map_file(job.options.plan.names[job.scene]), mask[::-1])


def _write_labels(job, scene):
    from .labels import openocc_labels

    o, name = job.options, job.options.plan.names[job.scene]
    sample = tables.sample_token(o.seed, name, job.keyframe)
    t = job.keyframe * KEYFRAME_US * 1e-6
    labels = scene.labeller.labels(t)
    if 'occ3d' in o.label_sets:
        write_npz(
            o.out / 'occ3d' / name / sample / 'labels.npz',
            dict(semantics=labels.semantics, mask_lidar=labels.mask_lidar, mask_camera=labels.mask_camera),
        )
    if 'openocc_v2' in o.label_sets:
        arrays = openocc_labels(labels, _velocities(scene.world, t))
        write_npz(o.out / 'openocc_v2' / name / sample / 'labels.npz', arrays)
    items = [tables.instance_token(o.seed, name, item.index) for item in scene.world.annotated]
    write_npz(
        o.out / TRUTH_FOLDER / name / (f'{sample}.npz'),
        dict(instances=labels.instances, instance_tokens=np.array(items)),
    )


def _velocities(world, t):
    """float64 [n, 2]: metres per second along ego x and y of the annotated objects."""
    step = 0.05
    rotation = world.ego_to_map(t)[:3, :3]
    moved = []
    for item in world.annotated:
        before, after = item.pose(t - step), item.pose(t + step)
        moved.append([(b - a) / (2 * step) for a, b in zip(before[:3], after[:3])])
    return (np.array(moved) @ rotation)[:, :2]


def _boxes(job, scene):
    from .lidar import scan, visible_share

    world, t = scene.world, job.keyframe * KEYFRAME_US * 1e-6
    rng = np.random.default_rng([job.options.seed, job.scene, 3, job.keyframe * KEYFRAME_US])
    owner = scan(world, scene.rig, t, rng).owner
    points = np.bincount(owner[owner >= 0], minlength=len(world.objects))
    ego = world.ego_to_map(t)
    items = [
        o for o in world.annotated if np.hypot(o.pose(t).x - ego[0, 3], o.pose(t).y - ego[1, 3]) < ANNOTATION_RANGE
    ]
    visible = visible_share(world, t, (ego @ scene.rig.lidar_to_ego)[:3, 3], items)
    boxes = []
    for item, share in zip(items, visible):
        pose = item.pose(t)
        boxes.append(
            tables.BoxRecord(
                job.keyframe,
                item.index,
                np.array([pose.x, pose.y, pose.z + item.box_centre_z]),
                float(np.arctan2(np.sin(pose.yaw), np.cos(pose.yaw))),
                item.size,
                int(points[item.index]),
                float(share),
                item.moving,
            )
        )
    return boxes


def _scene_record(options, scene, results):
    name = options.plan.names[scene]
    return tables.SceneRecord(
        name=name,
        description='Toy scene %d: a winding street with a crossing' % scene,
        timestamps=[_timestamp(scene, k * KEYFRAME_US) for k in range(options.keyframes)],
        rig=make_rig(options.seed, scene, options.size),
        categories=results[0].categories,
        sensors=[r for result in results for r in result.sensors],
        boxes=[b for result in results for b in result.boxes],
        map_file=_map_file(name),
    )


def default_workers(device: str) -> int:
    """Cores this process may use; with a GPU no more than fit into its free memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    if device != 'cuda':
        return cores
    import torch

    free = torch.cuda.mem_get_info()[0] if hasattr(torch.cuda, 'mem_get_info') else 4 * GPU_BYTES_PER_WORKER
    return max(1, min(cores, free // GPU_BYTES_PER_WORKER))
