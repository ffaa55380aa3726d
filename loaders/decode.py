"""Files of sensors to arrays: images to BGR uint8 [H, W, 3] by any of four decoders, and LiDAR scans to points.

One of the decoders, nvJPEG, is on the GPU: images stay JPEG files until they are there, and are resized there as Pillow
would. ``decoder='nvjpeg'`` of ``LoadMultiViewImageFromMultiSweeps`` is for inference. It need not round as
libjpeg-turbo does, nor blend half-size colours likewise; docs/performance.md says what is known of that. Resizing its
pixels is exact.

A scan of nuScenes is a file of float32, five a point: x, y, z in metres (frame of LIDAR_TOP), intensity, ring.
"""

import io
import os
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import cv2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lib.errors import ConfigError, DataError
from lib.infos import relocate

NVJPEG = 'nvjpeg'
_JPEG_START, _JPEG_END = b'\xff\xd8', b'\xff\xd9'
_VALUES = 5  # of a LiDAR point
_REMEDY = "use decoder='cv2'"
_TRAILER = 4096  # bytes at the end of a file in which the end mark of a JPEG is looked for


def check_decoder(decoder: str) -> None:
    """Raise ConfigError if the decoder is unknown or what it needs is not installed."""
    if decoder not in _DECODERS:
        raise ConfigError(f'unknown image decoder {decoder!r}; use one of {sorted(_DECODERS)}')
    if decoder == 'turbojpeg':
        _turbojpeg()
    if decoder == NVJPEG:
        check_nvjpeg()


class HeldImage(NamedTuple):
    """Stands for pixels that nobody asks for, because the model holds the features of their frame.

    Attributes:
        shape: (height, width, 3).
    """

    shape: Tuple[int, int, int]

    def transformed(self, transform) -> 'HeldImage':
        """What an ``ImageTransform`` makes of it."""
        return HeldImage((*transform.size, 3))


class EncodedImage(NamedTuple):
    """Stands for the pixels of a JPEG file.

    Attributes:
        content: uint8 [bytes].
        shape: (height, width, 3) of its pixels, after the transform if there is one.
        transform: ``ImageTransform`` from the file's pixels.
    """

    content: np.ndarray
    shape: Tuple[int, int, int]
    transform: Any = None

    def transformed(self, transform) -> 'EncodedImage':
        """What an ``ImageTransform`` makes of it."""
        return EncodedImage(self.content, (*transform.size, 3), transform)


class DecodedImage(NamedTuple):
    """Pixels of an image file.

    Attributes:
        pixels: BGR uint8 [H, W, 3], or what stands for such.
        factor: pixels of this array per pixel of the file, 1.0 or 0.5.
    """

    pixels: Union[np.ndarray, HeldImage, EncodedImage]
    factor: float


def read_image(path, decoder: str = 'cv2', half_covers: Optional[Tuple[int, int]] = None) -> DecodedImage:
    """Decode an image file.

    Args:
        path: JPEG (any decoder) or another format (``cv2``, ``pillow``).
        decoder: ``cv2``, ``pillow`` or ``turbojpeg`` (see ``check_decoder``); ``nvjpeg`` keeps the file's content for
            a GPU (``EncodedImage``), and takes no ``half_covers``.
        half_covers: (height, width); a JPEG of even size whose half is at least that large is decoded at half
            the size, which skips most of the work (its pixels are about the means of 2x2 blocks).

    Raises:
        DataError: missing, truncated or otherwise unreadable file.
    """
    content = _read(path, lambda stream: stream.read())
    is_jpeg = _is_whole_jpeg(path, content[:2], content[-_TRAILER:], len(content))
    try:
        half = is_jpeg and half_covers is not None and _read_header(io.BytesIO(content), half_covers)[1]
        pixels = _DECODERS[decoder](content, half)
    except (OSError, ValueError, cv2.error, SyntaxError) as error:
        reason = ' '.join(str(error).split())
        raise DataError(f'image {path} cannot be decoded ({reason}); fetch it again') from error
    if pixels is None:
        raise DataError(f'image {path} cannot be decoded ({len(content)} bytes, no known format); fetch it again')
    return DecodedImage(pixels, 0.5 if half else 1.0)


def look_at_image(path, half_covers: Optional[Tuple[int, int]] = None) -> DecodedImage:
    """What ``read_image`` would give, with a ``HeldImage`` for the pixels; reads the file's header only.

    Raises:
        DataError: missing or unreadable file.
    """
    try:
        (width, height), half = _read(path, lambda stream: _read_header(stream, half_covers))
    except (ValueError, SyntaxError) as error:
        raise DataError(f'image {path} cannot be decoded ({error}); fetch it again') from error
    factor = 0.5 if half else 1.0
    return DecodedImage(HeldImage((int(height * factor), int(width * factor), 3)), factor)


def _read_header(stream, half_covers):
    """((width, height), whether half the size is enough) of an image file; ValueError where it is none."""
    try:
        image = Image.open(stream)
    except UnidentifiedImageError as error:
        raise ValueError('no known format') from error
    (width, height), even = image.size, image.width % 2 == 0 and image.height % 2 == 0
    covers = half_covers is not None and height >= 2 * half_covers[0] and width >= 2 * half_covers[1]
    return image.size, image.format == 'JPEG' and even and covers


def check_whole(path) -> None:
    """Look at both ends of an image file, which is quick and finds files that are missing, empty or cut off.

    Raises:
        DataError: it is missing, empty, or a truncated JPEG.
    """
    start, end, size = _read(path, _read_ends)
    if not size:
        raise DataError(f'image {path} is empty; fetch it again')
    _is_whole_jpeg(path, start, end, size)


def _read_ends(stream):
    start, size = stream.read(len(_JPEG_START)), os.fstat(stream.fileno()).st_size
    stream.seek(max(0, size - _TRAILER))
    return start, stream.read(), size


def _is_whole_jpeg(path, start, end, size) -> bool:
    """Whether it is a JPEG; raises DataError if one that was cut off."""
    is_jpeg = start == _JPEG_START
    if is_jpeg and _JPEG_END not in end:
        raise DataError(f'image {path} is truncated (no end mark after {size} bytes); fetch it again')
    return is_jpeg


def _read(path, action, what='image', remedy='check data_root, and that its samples/ and sweeps/ are complete'):
    """``action(stream)`` on the open file; what it is and what to do where it is not there."""
    try:
        with open(os.fspath(path), 'rb') as stream:
            return action(stream)
    except FileNotFoundError as error:
        raise DataError(f'{what} {path} does not exist; {remedy}') from error
    except OSError as error:
        raise DataError(f'{what} {path} cannot be read ({error.strerror})') from error


def _decode_cv2(content, half):
    flags = cv2.IMREAD_REDUCED_COLOR_2 if half else cv2.IMREAD_COLOR
    return cv2.imdecode(np.frombuffer(content, dtype=np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)


def _decode_pillow(content, half):
    image = Image.open(io.BytesIO(content))
    if half:
        image.draft('RGB', ((image.width + 1) // 2, (image.height + 1) // 2))
    return cv2.cvtColor(np.asarray(image.convert('RGB')), cv2.COLOR_RGB2BGR)


def _decode_turbojpeg(content, half):
    return _turbojpeg().decode(content, scaling_factor=(1, 2) if half else None)


def _keep_for_nvjpeg(content, half):
    width, height = Image.open(io.BytesIO(content)).size  # reads the header only
    if content[: len(_JPEG_START)] != _JPEG_START:
        raise ValueError("decoder='nvjpeg' reads JPEGs only")
    return EncodedImage(np.frombuffer(content, dtype=np.uint8), (height, width, 3))


_turbojpeg_decoder = []


def _turbojpeg():
    """The process's libjpeg-turbo handle, made on first use."""
    if not _turbojpeg_decoder:
        try:
            from turbojpeg import TurboJPEG

            _turbojpeg_decoder.append(TurboJPEG())
        except (ImportError, RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0].rstrip('.')
            raise ConfigError(
                f"decoder='turbojpeg' needs the package PyTurboJPEG and the library libturbojpeg ({reason}); install "
                "them, or use decoder='cv2'"
            ) from error
    return _turbojpeg_decoder[0]


_DECODERS: Dict[str, Callable] = {
    'cv2': _decode_cv2,
    'pillow': _decode_pillow,
    'turbojpeg': _decode_turbojpeg,
    NVJPEG: _keep_for_nvjpeg,
}


# -- on a GPU


@dataclass
class EncodedImages:
    """Images of a batch, which become pixels where they are sent.

    Attributes:
        shape: (B, n, 3, height, width) of the pixels.
        contents: uint8 [bytes], all files one after the other.
        lengths: bytes of each file; 0 for a black image.
        transforms: ``ImageTransform`` of each.
    """

    shape: Tuple[int, int, int, int, int]
    contents: Tensor
    lengths: List[int]
    transforms: List[Any]

    def to(self, device: torch.device, non_blocking: bool = True) -> Tensor:
        """The pixels, uint8 [B, n, 3, height, width] BGR, on a GPU.

        Raises:
            ConfigError: the device is none, or nvJPEG or Triton is missing.
            DataError: a file cannot be decoded.
        """
        return self.all_to([self], device)[0]

    @classmethod
    def all_to(cls, many: Sequence['EncodedImages'], device: torch.device) -> List[Tensor]:
        """:meth:`to` of several whose images have one size; it takes less time to decode them together."""
        files = [file for one in many for file in one.contents.split(one.lengths)]
        transforms = [transform for one in many for transform in one.transforms]
        places = [place for place, file in enumerate(files) if len(file)]
        images = dict(zip(places, decode_jpegs([files[place] for place in places], device)))
        groups: Dict[Any, List[int]] = {}
        for place in places:
            groups.setdefault((tuple(images[place].shape), transforms[place]), []).append(place)
        pixels = [torch.zeros(many[0].shape[2:], dtype=torch.uint8, device=device)] * len(files)
        for (_, transform), members in groups.items():
            transformed = transform_on_gpu(torch.stack([images[place] for place in members]), transform)
            for place, image in zip(members, transformed.unbind()):
                pixels[place] = image
        each = torch.stack(pixels).split([len(one.lengths) for one in many])
        return [pixels.view(one.shape) for pixels, one in zip(each, many)]

    @classmethod
    def of_sample(cls, images: Sequence[Any]) -> 'EncodedImages':
        """A batch of one sample: ``EncodedImage``, or arrays [height, width, 3] in the place of missing ones.

        Raises:
            ConfigError: they are not of one size, or not transformed.
        """
        files = [getattr(image, 'content', np.empty(0, np.uint8)) for image in images]
        transforms = [getattr(image, 'transform', None) for image in images]
        sizes = {tuple(image.shape) for image in images}
        if len(sizes) > 1 or any(len(file) and transform is None for file, transform in zip(files, transforms)):
            raise ConfigError("decoder='nvjpeg' needs RandomTransformImage in the pipeline; add it, or " + _REMEDY)
        height, width, channels = sizes.pop()
        contents = torch.from_numpy(np.concatenate(files))
        return cls((1, len(images), channels, height, width), contents, [len(file) for file in files], transforms)

    @classmethod
    def of_batch(cls, samples: Sequence['EncodedImages']) -> 'EncodedImages':
        """The images of B samples, which were made one by one."""
        shape = (len(samples), *samples[0].shape[1:])
        lengths = [length for sample in samples for length in sample.lengths]
        transforms = [transform for sample in samples for transform in sample.transforms]
        return cls(shape, torch.cat([sample.contents for sample in samples]), lengths, transforms)


def check_nvjpeg() -> None:
    """Raise ConfigError unless a JPEG can be decoded and resized on a GPU here."""
    if not torch.cuda.is_available():
        raise ConfigError(f"decoder='nvjpeg' decodes on a GPU, and PyTorch finds none; {_REMEDY}")
    encoded = cv2.imencode('.jpg', np.zeros((16, 16, 3), np.uint8))[1]
    images = decode_jpegs([torch.from_numpy(encoded.reshape(-1))], torch.device('cuda'))
    _import_resizing()(torch.stack(images), (8, 8), (0, 8), (0, 8))


def decode_jpegs(files: Sequence[Tensor], device: torch.device) -> List[Tensor]:
    """uint8 [3, H, W] RGB on a GPU, of files uint8 [bytes] on the CPU.

    Raises:
        ConfigError: not on a GPU, or torchvision has no nvJPEG.
        DataError: a file cannot be decoded.
    """
    if torch.device(device).type != 'cuda':
        raise ConfigError(f"decoder='nvjpeg' decodes on a GPU, not on {device}; {_REMEDY}")
    try:
        from torchvision.io import ImageReadMode, decode_jpeg

        return decode_jpeg(list(files), mode=ImageReadMode.RGB, device=device)
    except (ImportError, TypeError) as error:
        raise ConfigError(f"decoder='nvjpeg' needs torchvision 0.19 or later ({error}); {_REMEDY}") from error
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or ['no reason given'])[0]
        if 'support' in reason or 'compiled' in reason:
            raise ConfigError(f"decoder='nvjpeg': this torchvision has no nvJPEG ({reason}); {_REMEDY}") from error
        raise DataError(f'a JPEG cannot be decoded on the GPU ({reason}); {_REMEDY}, which names the file') from error


def transform_on_gpu(images: Tensor, transform) -> Tensor:
    """uint8 [n, 3, H, W] RGB -> uint8 [n, 3, height, width] BGR, as ``ImageTransform.apply`` computes it.

    Raises:
        ConfigError: Triton is missing.
    """
    rows, columns = transform.window()
    out = images.new_zeros((len(images), 3, *transform.size))
    y, x = rows[0] - transform.top, columns[0] - transform.left
    window = out[:, :, y : y + rows[1] - rows[0], x : x + columns[1] - columns[0]]
    window.copy_(_import_resizing()(images, transform.resized, rows, columns).flip(1))
    return out.flip(3) if transform.mirror else out


def _import_resizing():
    try:
        from .gpu_resize import resize_window
    except ImportError as error:
        raise ConfigError(f"decoder='nvjpeg' needs Triton ({error}); {_REMEDY}") from error
    return resize_window


# -- scans


def read_scan(info: Mapping, data_root) -> np.ndarray:
    """Points of a keyframe's own scan, float32 [n, 3], metres, LIDAR_TOP.

    Args:
        info: keyframe, see ``lib.infos``.
        data_root: nuScenes folder.

    Raises:
        DataError: the keyframe names no scan, or its file is missing or damaged.
    """
    if not info.get('lidar_path'):
        raise DataError(f'keyframe {info["token"]} names no LiDAR scan (lidar_path); train without lidar_points')
    path = relocate(info['lidar_path'], data_root)
    remedy = 'unpack samples/LIDAR_TOP into data_root, or train without lidar_points'
    content = _read(path, lambda stream: stream.read(), 'LiDAR scan', remedy)
    if not content or len(content) % (4 * _VALUES):
        raise DataError(f'LiDAR scan {path} is empty or cut off ({len(content)} bytes); fetch it again')
    points = np.frombuffer(content, dtype='<f4').reshape(-1, _VALUES)[:, :3]
    if not np.isfinite(points).all():
        raise DataError(f'LiDAR scan {path} holds values that are no numbers; fetch it again')
    return np.ascontiguousarray(points, dtype=np.float32)
