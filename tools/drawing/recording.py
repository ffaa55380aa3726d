"""A drive as a Rerun recording (.rrd): cameras with images, voxels per class, boxes of instances, the ego's path.

Needs the optional package ``rerun-sdk`` (0.23 or newer). Everything of a sample lies under ``world/ego``, which
moves through the scene; ``world`` is the drive's global frame, moved to where the first sample is.
"""

from typing import Iterable, List

import cv2
import numpy as np

from lib.errors import DataError, UserError, reason
from lib.geometry import invert_rigid, voxel_centers
from lib.io import atomic_write
from lib.task import Task

from .frames import CameraView, Frame, Volume
from .render import EGO_BOX, EGO_COLOUR


def write_recording(path, task: Task, frames: Iterable[Frame], title: str, image_width: int = 640, say=None) -> int:
    """Write the recording.

    Args:
        title: name of the recording in the viewer.
        image_width: of the images, pixels; 0 leaves images out.
        say: takes a line for every image that is left out because it cannot be read.

    Returns:
        Number of samples written.

    Raises:
        UserError: rerun-sdk is missing or too old, there are no frames, or the file cannot be written.
    """
    rr = _import_rerun()
    count, positions, origins = 0, {}, {}
    with atomic_write(path) as temporary:
        stream = rr.RecordingStream('sparseocc')
        stream.save(str(temporary))
        stream.log('world', rr.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)
        _log_car(rr, stream)
        for count, frame in enumerate(frames, 1):
            stream.set_time('sample', sequence=count - 1)
            if frame.seconds is not None:
                stream.set_time('time', timestamp=frame.seconds)
            _log_pose(rr, stream, frame, origins, positions)
            for name in ('truth', 'prediction'):
                if getattr(frame, name) is not None:
                    _log_volume(rr, stream, task, f'world/ego/{name}', getattr(frame, name))
            for camera in frame.cameras:
                _log_camera(rr, stream, camera, image_width, say)
            if count == 1:
                _send_layout(rr, stream, frame, title)
        stream.flush()
        stream.disconnect()
        if not count:
            raise UserError('there are no samples to record; choose others with --sample, --samples or --scene')
    return count


def _import_rerun():
    try:
        import rerun
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == 'rerun'
        what = 'is not installed' if missing else f'cannot be used here ({reason(error)})'
        raise UserError(
            f'--rerun needs the package rerun-sdk, which {what}; pip install rerun-sdk, see docs/viewer.md'
        ) from error
    if not hasattr(rerun.RecordingStream, 'set_time'):
        raise UserError(f'--rerun needs rerun-sdk 0.23 or newer, here is {rerun.__version__}; pip install -U rerun-sdk')
    return rerun


def _log_car(rr, stream) -> None:
    low, high = np.asarray(EGO_BOX[:3]), np.asarray(EGO_BOX[3:])
    car = rr.Boxes3D(centers=[(low + high) / 2], half_sizes=[(high - low) / 2], colors=[EGO_COLOUR], fill_mode='solid')
    stream.log('world/ego/car', car, static=True)


def _log_pose(rr, stream, frame: Frame, origins, positions) -> None:
    """Place the ego, and draw the way of its scene so far; the scene's first sample is the origin of ``world``."""
    if frame.global_from_ego is None:
        return
    origin = origins.setdefault(frame.scene, invert_rigid(frame.global_from_ego))
    pose = origin @ frame.global_from_ego
    stream.log('world/ego', rr.Transform3D(translation=pose[:3, 3], mat3x3=pose[:3, :3]))
    way = positions.setdefault(frame.scene, [])
    way.append(pose[:3, 3])
    stream.log('world/path', rr.LineStrips3D([np.asarray(way)], colors=[(40, 120, 230)]))


def _log_volume(rr, stream, task: Task, where: str, volume: Volume) -> None:
    occupied = volume.occupied(task)
    for class_id, (name, colour) in enumerate(zip(task.label_set.occupied_names, task.label_set.palette())):
        indices = np.argwhere(occupied & (volume.semantics == class_id))
        if not len(indices):
            stream.log(f'{where}/{name}', rr.Clear(recursive=False))
            continue
        centres = voxel_centers(task.point_cloud_range, task.voxel_size, task.grid_shape, indices)
        half = [[task.voxel_size / 2] * 3]
        stream.log(f'{where}/{name}', rr.Boxes3D(centers=centres, half_sizes=half, colors=[colour], fill_mode='solid'))
    if volume.instances is not None:
        _log_instances(rr, stream, task, f'{where}/instances', volume)


def _log_instances(rr, stream, task: Task, where: str, volume: Volume) -> None:
    """Boxes around the voxels of each thing, named by class and id."""
    things = np.isin(volume.semantics, task.label_set.thing_ids) & (volume.instances > 0)
    indices = np.argwhere(things)
    ids, classes = volume.instances[things], volume.semantics[things]
    centres: List = []
    halves: List = []
    labels: List[str] = []
    colours: List = []
    for one in np.unique(ids):
        own, label = indices[ids == one], int(np.bincount(classes[ids == one]).argmax())
        low, high = own.min(axis=0), own.max(axis=0) + 1
        centres.append((low + high) / 2 * task.voxel_size + np.asarray(task.point_cloud_range[:3]))
        halves.append((high - low) / 2 * task.voxel_size)
        labels.append(f'{task.label_set.class_names[label]} {one}')
        colours.append(task.label_set.palette()[label])
    boxes = rr.Boxes3D(centers=centres, half_sizes=halves, labels=labels, colors=colours, show_labels=False)
    stream.log(where, boxes if len(ids) else rr.Clear(recursive=False))


def _log_camera(rr, stream, camera: CameraView, width: int, say) -> None:
    """Camera with its image; both are scaled alike."""
    where, pose = f'world/ego/cameras/{camera.name}', camera.ego_from_camera
    stream.log(where, rr.Transform3D(translation=pose[:3, 3], mat3x3=pose[:3, :3]))
    try:
        pixels = camera.read() if width else None
    except DataError as error:
        if say:
            say(f'left out: {error}')
        pixels = None
    full = (2 * camera.intrinsics[0, 2], 2 * camera.intrinsics[1, 2]) if pixels is None else pixels.shape[1::-1]
    size = (width or round(full[0]), round((width or full[0]) * full[1] / full[0]))
    intrinsics = np.diag([size[0] / full[0], size[1] / full[1], 1.0]) @ camera.intrinsics
    pinhole = rr.Pinhole(
        image_from_camera=intrinsics, resolution=size, camera_xyz=rr.ViewCoordinates.RDF, image_plane_distance=2.0
    )
    stream.log(where, pinhole)
    if pixels is None:
        stream.log(f'{where}/image', rr.Clear(recursive=False))
        return
    small = cv2.resize(np.ascontiguousarray(pixels[..., ::-1]), size, interpolation=cv2.INTER_AREA)
    _, content = cv2.imencode('.jpg', small, [cv2.IMWRITE_JPEG_QUALITY, 85])
    stream.log(f'{where}/image', rr.EncodedImage(contents=content.tobytes(), media_type='image/jpeg'))


def _send_layout(rr, stream, frame: Frame, title: str) -> None:
    """The 3D view large, the cameras beside it; of two volumes the prediction is shown first."""
    from rerun import blueprint

    stream.send_recording_name(title)
    hidden = ['- world/ego/truth/**'] if frame.truth is not None and frame.prediction is not None else []
    scene = blueprint.Spatial3DView(origin='world', name='occupancy', contents=['+ $origin/**'] + hidden)
    cameras = [
        blueprint.Spatial2DView(origin=f'world/ego/cameras/{camera.name}', name=camera.name) for camera in frame.cameras
    ]
    columns = [scene, blueprint.Grid(*cameras, grid_columns=2)] if cameras else [scene]
    stream.send_blueprint(blueprint.Blueprint(blueprint.Horizontal(*columns, column_shares=[2, 1][: len(columns)])))
