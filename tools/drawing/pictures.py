"""Pictures and films as files. Images are uint8 [height, width, 3], RGB."""

from pathlib import Path
from typing import Sequence

import cv2
import numpy as np
from PIL import Image

from lib.errors import UserError
from lib.io import atomic_write


def save_image(path, image: np.ndarray) -> None:
    """Write a picture; the suffix names the format.

    Raises:
        UserError: the suffix names no picture format, or the file cannot be written.
    """
    with atomic_write(path) as temporary:
        try:
            written = cv2.imwrite(str(temporary), image[..., ::-1])
        except cv2.error as error:
            raise UserError(f'{path}: no picture format has this suffix; use .png or .jpg') from error
        if not written:
            raise UserError(f'{path} cannot be written; check the folder and the space left')


def save_video(path, images: Sequence[np.ndarray], fps: float) -> None:
    """Write a film as .mp4 or .gif (at half size); smaller pictures get a white rim, so that all have one size.

    Raises:
        UserError: this OpenCV has no encoder, or the file cannot be written.
    """
    images = _of_one_size(images)
    with atomic_write(path) as temporary:
        if Path(path).suffix == '.gif':
            _write_gif(temporary, images, fps)
        else:
            _write_mp4(temporary, images, fps, path)


def _of_one_size(images):
    """Pictures padded at the right and below to the largest height and width, both even as encoders want them."""
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    height, width = height + height % 2, width + width % 2
    return [
        np.pad(image, ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0)), constant_values=255)
        for image in images
    ]


def _write_gif(path, images, fps):
    frames = [Image.fromarray(image).resize((image.shape[1] // 2, image.shape[0] // 2)) for image in images]
    frames[0].save(str(path), save_all=True, append_images=frames[1:], duration=1000 / fps, loop=0)


def _write_mp4(path, images, fps, shown):
    height, width = images[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'mp4v'), fps, (width, height))
    if not writer.isOpened():
        raise UserError(f'{shown}: this OpenCV cannot write mp4; use a name that ends in .gif')
    for image in images:
        writer.write(np.ascontiguousarray(image[..., ::-1]))
    writer.release()
