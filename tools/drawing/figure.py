"""One picture of a sample: its camera images, occupancy seen obliquely and from above, and a legend.

Images are uint8 [height, width, 3], RGB; volumes are in the ego frame of the keyframe.
"""

import os
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lib.errors import DataError
from lib.task import Task

from .frames import Frame, Volume, prediction_volume, truth_volume
from .render import class_colours, instance_colours, render_bird_eye, render_oblique, with_ego

WIDTH = 1600
_GAP = 12
_CAPTION = 30
_BIRD_EYE = 400
_INK = (32, 36, 44)
_PAPER = (255, 255, 255)
_CAMERA_LAYOUT = ('CAM_FRONT_LEFT', 'CAM_FRONT', 'CAM_FRONT_RIGHT', 'CAM_BACK_LEFT', 'CAM_BACK', 'CAM_BACK_RIGHT')


def draw_frame(frame: Frame, task: Task, say: Optional[Callable[[str], None]] = None) -> np.ndarray:
    """Picture of a sample, uint8 [height, WIDTH, 3]; ``say`` takes a line for every image that cannot be read."""
    images = {}
    for camera in frame.cameras:
        try:
            images[camera.name] = camera.read()
        except DataError as error:
            if say:
                say(f'left out: {error}')
    return draw_figure(task, frame.volumes, images, frame.title)


def draw_figure(task: Task, volumes: Sequence[Volume], images: Dict[str, np.ndarray], title: str) -> np.ndarray:
    """Lay out cameras, volumes side by side, and the legend.

    Args:
        volumes: one or two of ``task.grid_shape``.
        images: RGB per camera name; may be empty.
        title: text of the first line.
    Returns:
        uint8 [height, WIDTH, 3].
    """
    rows = [_text_row(title, 22)]
    rows += _camera_rows(images)
    rows.append(_captioned([(_with_name(v, 'occupancy'), _oblique(task, v, len(volumes))) for v in volumes]))
    if any(v.instances is not None for v in volumes):
        rows.append(
            _captioned(
                [(_with_name(v, 'instances'), _oblique(task, v, len(volumes), by_instance=True)) for v in volumes]
            )
        )
    rows.append(_bird_eye_row(task, volumes))
    gap = np.full((_GAP, WIDTH, 3), 255, np.uint8)
    return np.concatenate([part for row in rows for part in (row, gap)])


def draw_from_above(
    task: Task, truth: Dict[str, np.ndarray], prediction: Dict[str, np.ndarray], title: str
) -> np.ndarray:
    """Truth and prediction from above, and the legend: what is quick to draw.

    Args:
        truth, prediction: ``semantics`` uint8 [X, Y, Z] and more, which is not shown.
        title: text of the first line.
    Returns:
        uint8 [height, WIDTH, 3].
    """
    volumes = [truth_volume(truth, task), prediction_volume(prediction)]
    return np.concatenate([_text_row(title, 22), _bird_eye_row(task, volumes)])


def _with_name(volume, what):
    return f'{volume.title}: {what}'


def _font(size: int):
    """DejaVu Sans as matplotlib ships it, or Pillow's own font."""
    try:
        import matplotlib

        return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf'), size)
    except (ImportError, OSError):
        return ImageFont.load_default()


def _text_row(text, size):
    row = Image.new('RGB', (WIDTH, size + 18), _PAPER)
    ImageDraw.Draw(row).text((_GAP, 8), text, fill=_INK, font=_font(size))
    return np.asarray(row)


def _resized(image: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.BICUBIC))


def _camera_rows(images) -> List[np.ndarray]:
    names = sorted(images, key=lambda n: _CAMERA_LAYOUT.index(n) if n in _CAMERA_LAYOUT else len(_CAMERA_LAYOUT))
    columns = min(3, len(names))
    rows = []
    for start in range(0, len(names), columns or 1):
        rows.append(_captioned([(name, images[name]) for name in names[start : start + columns]], columns))
    return rows


def _captioned(items: Sequence[Tuple[str, np.ndarray]], columns: int = 0) -> np.ndarray:
    """Pictures in one row of equal columns, each under its caption."""
    columns = columns or len(items)
    width = (WIDTH - _GAP * (columns + 1)) // columns
    heights = [round(image.shape[0] * width / image.shape[1]) for _, image in items]
    row = Image.new('RGB', (WIDTH, max(heights) + _CAPTION), _PAPER)
    draw = ImageDraw.Draw(row)
    for i, ((caption, image), height) in enumerate(zip(items, heights)):
        left = _GAP + i * (width + _GAP)
        draw.text((left, 5), caption, fill=_INK, font=_font(17))
        row.paste(Image.fromarray(_resized(image, width, height)), (left, _CAPTION))
    return np.asarray(row)


def _coloured(task, volume, by_instance=False):
    """bool [X, Y, Z] occupied and uint8 [X, Y, Z, 3] colours, the ego car included."""
    occupied = volume.occupied(task)
    colours = class_colours(volume.semantics, task.label_set.palette())
    if by_instance:
        instances = volume.instances if volume.instances is not None else np.zeros_like(volume.semantics)
        things = np.isin(volume.semantics, task.label_set.thing_ids)
        pale = (colours * 0.25 + 150).astype(np.uint8)  # stuff steps back behind the things
        colours = np.where((things & (instances > 0))[..., None], instance_colours(instances), pale)
    return with_ego(occupied, colours, task.point_cloud_range, task.voxel_size)


def _oblique(task, volume, count, by_instance=False):
    occupied, colours = _coloured(task, volume, by_instance)
    width = (WIDTH - _GAP * (count + 1)) // count
    height = round(width * (0.58 if count > 1 else 0.45))
    return render_oblique(occupied, colours, task.point_cloud_range, task.voxel_size, (height, width))


def _bird_eye_row(task, volumes):
    row = Image.new('RGB', (WIDTH, _BIRD_EYE + _CAPTION), _PAPER)
    draw = ImageDraw.Draw(row)
    left = _GAP
    for volume in volumes:
        image = render_bird_eye(*_coloured(task, volume))
        width = min(2 * _BIRD_EYE, round(_BIRD_EYE * image.shape[1] / image.shape[0]))
        draw.text((left, 5), _with_name(volume, 'from above, ahead is up'), fill=_INK, font=_font(17))
        row.paste(Image.fromarray(image).resize((width, _BIRD_EYE), Image.BOX), (left, _CAPTION))
        draw.rectangle((left, _CAPTION, left + width - 1, _CAPTION + _BIRD_EYE - 1), outline=(200, 204, 210))
        _scale_bar(draw, task, left, width)
        left += width + _GAP
    _legend(draw, task, volumes, left + 2 * _GAP)
    return np.asarray(row)


def _scale_bar(draw, task, left, width):
    """Ten metres, at the lower left of a bird's eye view."""
    metres = task.grid_shape[1] * task.voxel_size
    length, base = round(10 * width / metres), _CAPTION + _BIRD_EYE - 10
    draw.line((left + 10, base, left + 10 + length, base), fill=_INK, width=3)
    draw.text((left + 10, base - 20), '10 m', fill=_INK, font=_font(14))


def _legend(draw, task, volumes, left):
    """Class colours, and how many voxels of each class every volume has."""
    counts = [np.bincount(v.semantics.ravel(), minlength=256) for v in volumes]
    entries = list(zip(task.label_set.occupied_names, task.label_set.palette()))
    draw.text((left, 5), 'class', fill=_INK, font=_font(17))
    columns = [left + 250 + 170 * i for i in range(len(volumes))]
    for x, volume in zip(columns, volumes):
        draw.text((x, 5), f'{volume.title}, voxels', fill=_INK, font=_font(17), anchor='ra')
    step = min(26.0, _BIRD_EYE / max(len(entries), 1))
    for i, (name, colour) in enumerate(entries):
        top = _CAPTION + round(i * step)
        draw.rectangle((left, top + 3, left + 30, top + round(step) - 4), fill=colour)
        draw.text((left + 42, top + 2), name, fill=_INK, font=_font(15))
        for x, count in zip(columns, counts):
            draw.text((x, top + 2), f'{count[i]}', fill=_INK, font=_font(15), anchor='ra')
