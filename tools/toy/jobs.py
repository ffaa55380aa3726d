"""What one process does for a toy data set: images or scans of a keyframe, labels and table rows of a scene."""

import functools
from pathlib import Path
from typing import List, NamedTuple, Tuple

import numpy as np

from lib.geometry import Grid

from . import pool, tables
from .files import write_bytes, write_jpeg, write_npz, write_png
from .labels import OCC3D_GRID, Labeller, RangeImage, openocc_labels
from .lidar import gather, scan, visible_share
from .names import ScenePlan
from .rig import (
    CAMERA_PERIOD_US,
    CAMERA_SWEEPS,
    KEYFRAME_US,
    LIDAR,
    LIDAR_PERIOD_US,
    LIDAR_SWEEPS,
    Camera,
    Rig,
    make_rig,
)
from .road import GROUND_CLASSES
from .work import Receipt, SurfaceParts, WorkFolder
from .world import ToyWorld

TRUTH_FOLDER = 'toy_truth'
ANNOTATION_RANGE = 75.0  # metres from the ego car
_FIRST_TIMESTAMP, _SCENE_SPACING = 1700000000000000, 3600 * 1000000
_SCANNED_SECONDS, _LEAD_PERIOD = 9.5, 0.1  # of a shorter scene the LiDAR also scans before and after
_CARVING_KEYFRAMES = 2  # before and after, whose scans show what is free


class Options(NamedTuple):
    """What to make.

    Attributes:
        out: data root.
        plan: the scenes.
        keyframes: per scene.
        size: (width, height) of the images.
        sweeps: write the images and scans between keyframes.
        seed: of everything.
        label_sets: names out of LABEL_SETS.
        grid: of the labels.
    """

    out: Path
    plan: ScenePlan
    keyframes: int
    size: Tuple[int, int]
    sweeps: bool
    seed: int
    label_sets: Tuple[str, ...]
    grid: Grid = OCC3D_GRID

    @property
    def labelled(self) -> bool:
        """The scenes have boxes and labels; test scenes have none."""
        return self.plan.version != 'v1.0-test'


IMAGES, SCANS, LABELS, ROWS = 'images', 'scans', 'labels', 'rows'


class Job(NamedTuple):
    """Something to do for keyframes ``first`` to ``last`` (excluded) of one scene. ``kind``: IMAGES or SCANS, with the
    sweeps up to the next keyframe; and once the scans of the whole scene are there, LABELS, and ROWS, the scene's part
    of the tables, which is of no keyframe."""

    options: Options
    scene: int
    first: int
    last: int
    kind: str


class _Moment(NamedTuple):
    """When a sensor fires: microseconds after the scene's first keyframe, the keyframe that it belongs to (a
    sweep to the one it leads up to, as in nuScenes), is it a keyframe."""

    offset_us: int
    keyframe: int
    is_key_frame: bool


class _Shot(NamedTuple):
    """One image: ``round`` counts the times that all cameras fire, from the keyframe on."""

    camera: Camera
    moment: _Moment
    round: int


@functools.lru_cache(maxsize=2)
def _open_world(seed, index, keyframes) -> ToyWorld:
    return ToyWorld(seed, index, keyframes)


@functools.lru_cache(maxsize=2)
def _open_renderer(seed, index, keyframes, device):
    import torch

    from .render import Renderer

    torch.set_num_threads(1)
    if device != 'cpu':
        torch.cuda.set_device(device)
    return Renderer(_open_world(seed, index, keyframes), torch.device(device))


def _world_of(job) -> ToyWorld:
    return _open_world(job.options.seed, job.scene, job.options.keyframes)


def _rig_of(job) -> Rig:
    return make_rig(job.options.seed, job.scene, job.options.size)


def run_job(job: Job) -> None:
    """Make all files of a job, its receipts last."""
    work = WorkFolder(job.options.out)
    if job.kind == ROWS:
        rows = tables.scene_rows(job.options.seed, _scene_record(job.options, job.scene), job.options.labelled)
        work.put_rows(job.scene, rows)
    for keyframe in range(job.first, job.last):
        pool.check_wanted()
        if job.kind == LABELS:
            _write_labels(job, keyframe)
            work.put_labels(job.scene, keyframe)
        elif job.kind == SCANS:
            work.put_receipt(job.scene, keyframe, _write_scans(job, keyframe, work))
        else:
            _write_images(job, keyframe)
            work.put_images(job.scene, keyframe)


def _write_scans(job, keyframe, work) -> Receipt:
    o, world, rig = job.options, _world_of(job), _rig_of(job)
    if keyframe == 0:
        _write_map(job, world)
    records, scans = _lidar_records(job, keyframe, world, rig)
    boxes = []
    if o.labelled:
        surfaces = [found.surface for found in scans]
        surfaces += [scan(world, rig, t).surface for t in _times_beyond(keyframe, o.keyframes)]
        work.put_scans(job.scene, keyframe, SurfaceParts(gather(surfaces), scans[0].distance))
        boxes = _boxes(world, rig, keyframe, scans[0].owner)
    for camera, moment, _ in _shots(job, keyframe, rig):
        filename = _filename(job, camera.name, moment, 'jpg')
        records.append(_record(job, world, camera.name, moment, filename, camera.size))
    return Receipt(records, boxes, {item.index: item.type.category for item in world.annotated})


def _times_beyond(keyframe, keyframes):
    """Seconds of the scans before a short scene begins, or after its end."""
    duration = (keyframes - 1) * KEYFRAME_US * 1e-6
    lead = _LEAD_PERIOD * np.arange(1, 1 + int(max(_SCANNED_SECONDS - duration, 0.0) / 2 / _LEAD_PERIOD))
    before = list(-lead) if keyframe == 0 else []
    return before + (list(duration + lead) if keyframe + 1 == keyframes else [])


def _moments(job, keyframe, delay_us, period_us, sweeps, every=False) -> List[_Moment]:
    """The keyframe's moment, then those of its sweeps, if they are written or ``every`` one is wanted."""
    start = keyframe * KEYFRAME_US + delay_us
    moments = [_Moment(start, keyframe, True)]
    if (job.options.sweeps or every) and keyframe + 1 < job.options.keyframes:
        moments += [_Moment(start + j * period_us, keyframe + 1, False) for j in range(1, sweeps + 1)]
    return moments


def _timestamp(scene_index, offset_us):
    return _FIRST_TIMESTAMP + scene_index * _SCENE_SPACING + offset_us


def _filename(job, channel, moment, suffix):
    log, stamp = tables.log_name(job.options.plan.names[job.scene]), _timestamp(job.scene, moment.offset_us)
    name = f'{log}__{channel}__{stamp}.{suffix}'
    return '/'.join(['samples' if moment.is_key_frame else 'sweeps', channel, name])


def _record(job, world, channel, moment, filename, size):
    return tables.SensorRecord(
        channel,
        _timestamp(job.scene, moment.offset_us),
        filename,
        moment.keyframe,
        moment.is_key_frame,
        world.ego_to_map(moment.offset_us * 1e-6),
        size,
    )


def _shots(job, keyframe, rig) -> List[_Shot]:
    """Round by round, so that images of about the same time follow one another."""
    cameras = list(rig.cameras.values())
    moments = [_moments(job, keyframe, camera.delay_us, CAMERA_PERIOD_US, CAMERA_SWEEPS) for camera in cameras]
    return [_Shot(c, m, k) for k, round_ in enumerate(zip(*moments)) for c, m in zip(cameras, round_)]


def _write_images(job, keyframe):
    o, shots = job.options, _shots(job, keyframe, _rig_of(job))
    renderer = _open_renderer(o.seed, job.scene, o.keyframes, pool.device())
    times = [shot.moment.offset_us * 1e-6 for shot in shots]
    # All cameras fire within 50 ms and share the shadow map of the first.
    firsts = [t for k, t in enumerate(times) if k == 0 or shots[k].round > shots[k - 1].round]
    images = renderer.images(
        [shot.camera for shot in shots], times, renderer.shadows(*firsts), [shot.round for shot in shots]
    )
    for shot, image in zip(shots, images):
        pool.check_wanted()
        write_jpeg(o.out / _filename(job, shot.camera.name, shot.moment, 'jpg'), image)


def _lidar_records(job, keyframe, world, rig):
    """Records of the scans that are written, and all scans up to the next keyframe."""
    records, scans = [], []
    o = job.options
    written = _moments(job, keyframe, 0, LIDAR_PERIOD_US, LIDAR_SWEEPS)
    for moment in _moments(job, keyframe, 0, LIDAR_PERIOD_US, LIDAR_SWEEPS, every=True):
        noise = np.random.default_rng([o.seed, job.scene, 3, moment.offset_us])
        scans.append(scan(world, rig, moment.offset_us * 1e-6, noise))
        if moment in written:
            filename = _filename(job, LIDAR, moment, 'pcd.bin')
            write_bytes(o.out / filename, scans[-1].points.tobytes())
            records.append(_record(job, world, LIDAR, moment, filename, (0, 0)))
    return records, scans


def map_file(scene_name: str) -> str:
    """Path of a scene's map mask, relative to the data root."""
    return 'maps/{}.png'.format(tables.token('map', scene_name))


def _write_map(job, world):
    """Map mask, north up: 255 where one can drive or walk along the road."""
    codes = [c for c, name in GROUND_CLASSES.items() if name in ('driveable_surface', 'sidewalk')]
    mask = np.where(np.isin(world.ground, codes), 255, 0).astype(np.uint8)
    write_png(job.options.out / map_file(job.options.plan.names[job.scene]), mask[::-1])


@functools.lru_cache(maxsize=1)
def _open_labeller(out, scene, seed, keyframes, size, grid):
    """The labeller of a scene whose scans are all made, and the range images of its keyframes."""
    work = WorkFolder(out)
    world, rig = _open_world(seed, scene, keyframes), make_rig(seed, scene, size)
    parts = [work.scans(scene, k) for k in range(keyframes)]
    images = [RangeImage(k * KEYFRAME_US * 1e-6, part.distance) for k, part in enumerate(parts)]
    return Labeller(world, rig, gather([part.surface for part in parts]), grid), images


def _write_labels(job, keyframe):
    o, name = job.options, job.options.plan.names[job.scene]
    labeller, images = _open_labeller(o.out, job.scene, o.seed, o.keyframes, o.size, o.grid)
    sample = tables.sample_token(o.seed, name, keyframe)
    t = keyframe * KEYFRAME_US * 1e-6
    near = images[max(keyframe - _CARVING_KEYFRAMES, 0) : keyframe + _CARVING_KEYFRAMES + 1]
    labels = labeller.labels(t, near)
    if 'occ3d' in o.label_sets:
        write_npz(
            o.out / 'occ3d' / name / sample / 'labels.npz',
            dict(semantics=labels.semantics, mask_lidar=labels.mask_lidar, mask_camera=labels.mask_camera),
        )
    if 'openocc_v2' in o.label_sets:
        arrays = openocc_labels(labels, _velocities(labeller.world, t))
        write_npz(o.out / 'openocc_v2' / name / sample / 'labels.npz', arrays)
    items = [tables.instance_token(o.seed, name, item.index) for item in labeller.world.annotated]
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


def _boxes(world, rig, keyframe, owner):
    """Boxes around the car; ``owner`` of the keyframe's scan."""
    t = keyframe * KEYFRAME_US * 1e-6
    points = np.bincount(owner[owner >= 0], minlength=len(world.objects))
    ego = world.ego_to_map(t)
    items = [
        o for o in world.annotated if np.hypot(o.pose(t).x - ego[0, 3], o.pose(t).y - ego[1, 3]) < ANNOTATION_RANGE
    ]
    visible = visible_share(world, t, (ego @ rig.lidar_to_ego)[:3, 3], items)
    boxes = []
    for item, share in zip(items, visible):
        pose = item.pose(t)
        boxes.append(
            tables.BoxRecord(
                keyframe,
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


def _scene_record(options: Options, scene: int) -> tables.SceneRecord:
    """What the tables say of a finished scene."""
    name, work = options.plan.names[scene], WorkFolder(options.out)
    receipts = [work.receipt(scene, k) for k in range(options.keyframes)]
    return tables.SceneRecord(
        name=name,
        description=f'Toy scene {scene}: a winding street with a crossing',
        timestamps=[_timestamp(scene, k * KEYFRAME_US) for k in range(options.keyframes)],
        rig=make_rig(options.seed, scene, options.size),
        categories=receipts[0].categories,
        sensors=[record for receipt in receipts for record in receipt.sensors],
        boxes=[box for receipt in receipts for box in receipt.boxes],
        map_file=map_file(name),
    )
