"""A drive as one HTML page that needs nothing else: voxels in WebGL, cameras, classes, instances, time line.

The page is made of the files in ``viewer/``. Volumes travel as class ids [X, Y, Z], compressed with gzip and
written in base64; images as JPEG.
"""

import base64
import gzip
import html
import json
from pathlib import Path
from typing import Dict, Iterable, List, Optional

import cv2
import numpy as np

from lib.errors import DataError, UserError
from lib.io import atomic_write
from lib.task import Task

from .frames import CameraView, Frame, Volume

_FOLDER = Path(__file__).resolve().parent / 'viewer'
_SCRIPTS = ('math', 'voxels', 'orbit', 'render', 'app', 'panel', 'cameras', 'selftest', 'main')
_GROUND = ('driveable_surface', 'other_flat', 'sidewalk', 'terrain')
_MAX_GRID = (1024, 1024, 256)  # what a face of the page's mesh has room for
_MAX_INSTANCE = 32000
_CAMERA_ORDER = ('CAM_FRONT_LEFT', 'CAM_FRONT', 'CAM_FRONT_RIGHT', 'CAM_BACK_LEFT', 'CAM_BACK', 'CAM_BACK_RIGHT')


def write_html(path, task: Task, frames: Iterable[Frame], title: str, image_width: int = 480, say=None) -> int:
    """Write the page; frames are taken one by one, so that a drive need not fit into memory.

    Args:
        title: heading of the page.
        image_width: of the embedded images, pixels; 0 leaves images out.
        say: takes a line for every image that is left out because it cannot be read.

    Returns:
        Number of samples written.

    Raises:
        UserError: the grid is too large for the page, there are no frames, or the file cannot be written.
    """
    if any(size > most for size, most in zip(task.grid_shape, _MAX_GRID)):
        raise UserError(f'the page shows grids up to {_MAX_GRID} voxels, the task has {task.grid_shape}; crop it')
    before, after = _page_parts(title)
    samples: List[Dict] = []
    with atomic_write(path) as temporary, open(str(temporary), 'w', encoding='utf-8') as page:
        page.write(before)
        for number, frame in enumerate(frames):
            page.write(_json_script(f'sample-{number}', _sample(frame, task, image_width, say)))
            samples.append(_summary(frame, task))
        if not samples:
            raise UserError('there are no samples to show; choose others with --sample, --samples or --scene')
        page.write(_json_script('drive', dict(_about(task), samples=samples)))
        page.write(after)
    return len(samples)


def _page_parts(title: str):
    """What comes before the data, and what after."""
    read = lambda name: (_FOLDER / name).read_text(encoding='utf-8')  # noqa: E731
    page = read('page.html').replace('{{title}}', html.escape(title)).replace('{{style}}', read('style.css'))
    scripts = '\n'.join(f'<script>\n{read(name + ".js")}</script>' for name in _SCRIPTS)
    before, after = page.split('{{data}}')
    return before, after.replace('{{scripts}}', scripts)


def _json_script(name: str, value) -> str:
    text = json.dumps(value, separators=(',', ':')).replace('<', '\\u003c')
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def _about(task: Task) -> Dict:
    labels = task.label_set
    classes = [
        dict(name=name, colour=list(colour), thing=name in labels.things, ground=name in _GROUND)
        for name, colour in zip(labels.occupied_names, labels.palette())
    ]
    grid = dict(shape=task.grid_shape, rangeMin=task.point_cloud_range[:3], voxelSize=task.voxel_size)
    return dict(classes=classes, grid=grid)


def _summary(frame: Frame, task: Task) -> Dict:
    """What the time line needs to know of a sample before it is unpacked."""
    position = None if frame.global_from_ego is None else frame.global_from_ego[:3, 3].tolist()
    return dict(
        token=frame.token, scene=frame.scene, seconds=frame.seconds, position=position, miou=_mean_iou(frame, task)
    )


def _mean_iou(frame: Frame, task: Task) -> Optional[float]:
    """Voxel IoU of the sample, averaged over the classes that occur in it; None with nothing to compare."""
    if frame.truth is None or frame.prediction is None:
        return None
    n = task.label_set.num_occupied
    valid = (frame.truth.semantics < 255) & (frame.prediction.semantics < 255)
    truth, prediction = frame.truth.semantics[valid], frame.prediction.semantics[valid]
    both = np.bincount(truth[truth == prediction], minlength=256)[:n]
    union = np.bincount(truth, minlength=256)[:n] + np.bincount(prediction, minlength=256)[:n] - both
    return float((both[union > 0] / union[union > 0]).mean()) if union.any() else None


def _sample(frame: Frame, task: Task, image_width: int, say) -> Dict:
    order = {name: place for place, name in enumerate(_CAMERA_ORDER)}
    cameras = sorted(frame.cameras, key=lambda camera: order.get(camera.name, len(order)))
    pose = None if frame.global_from_ego is None else frame.global_from_ego.ravel().tolist()
    return dict(
        token=frame.token,
        scene=frame.scene,
        globalFromEgo=pose,
        truth=_packed_volume(frame.truth, task),
        prediction=_packed_volume(frame.prediction, task),
        cameras=[_camera(camera, image_width, say) for camera in cameras] if image_width else [],
    )


def _packed_volume(volume: Optional[Volume], task: Task) -> Optional[Dict[str, str]]:
    if volume is None:
        return None
    packed = dict(semantics=_pack(volume.semantics, np.uint8))
    if volume.instances is not None:
        things = np.isin(volume.semantics, task.label_set.thing_ids)  # label files may number stuff as well
        packed['instances'] = _pack(_small_ids(np.where(things, volume.instances, 0)), '<u2')
    if volume.mask_camera is not None:
        packed['mask'] = _pack(volume.mask_camera, np.uint8)
    return packed


def _small_ids(instances: np.ndarray) -> np.ndarray:
    """Ids that fit the page: as they are, or numbered anew if they are large; 0 stays 0."""
    if instances.max() <= _MAX_INSTANCE and instances.min() >= 0:
        return instances
    ids, places = np.unique(np.append(instances.ravel(), 0), return_inverse=True)
    zero = int(np.searchsorted(ids, 0))
    places = places[:-1].reshape(instances.shape)
    return np.where(places == zero, 0, np.where(places < zero, places + 1, places))


def _pack(volume: np.ndarray, dtype) -> str:
    """base64 of the gzip of an array in row-major order."""
    return base64.b64encode(gzip.compress(np.ascontiguousarray(volume, dtype=dtype).tobytes(), 6, mtime=0)).decode()


def _camera(camera: CameraView, width: int, say) -> Dict:
    """A camera with its image, and its calibration for the pixels of that image."""
    try:
        pixels = camera.read()
    except DataError as error:
        if say:
            say(f'left out: {error}')
        pixels = None
    full = (2 * camera.intrinsics[0, 2], 2 * camera.intrinsics[1, 2]) if pixels is None else pixels.shape[1::-1]
    size = (width, max(1, round(width * full[1] / full[0])))
    scale = np.diag([size[0] / full[0], size[1] / full[1], 1.0, 1.0])
    image_from_ego = scale @ camera.image_from_ego()
    scaled = scale[:3, :3] @ camera.intrinsics
    return dict(
        name=camera.name,
        width=size[0],
        height=size[1],
        focal=[scaled[0, 0], scaled[1, 1]],
        centre=[scaled[0, 2], scaled[1, 2]],
        imageFromEgo=image_from_ego.ravel().tolist(),
        egoFromCamera=camera.ego_from_camera.ravel().tolist(),
        image=None if pixels is None else _jpeg(pixels, size),
    )


def _jpeg(pixels: np.ndarray, size) -> str:
    """data: address of an RGB image at another size."""
    small = cv2.resize(np.ascontiguousarray(pixels[..., ::-1]), size, interpolation=cv2.INTER_AREA)
    _, content = cv2.imencode('.jpg', small, [cv2.IMWRITE_JPEG_QUALITY, 82])
    return 'data:image/jpeg;base64,' + base64.b64encode(content.tobytes()).decode()
