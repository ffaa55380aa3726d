"""Images that stay JPEG files until they are on the GPU: decoded there by nvJPEG, and resized as Pillow would.

``decoder='nvjpeg'`` of ``LoadMultiViewImageFromMultiSweeps``, for inference. The decoder need not round as
libjpeg-turbo does, nor blend half-size colours likewise; docs/performance.md says what is known of that. Resizing its
pixels is exact.
"""

from dataclasses import dataclass
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import cv2
import numpy as np
import torch
from torch import Tensor

from lib.errors import ConfigError, DataError

_REMEDY = "use decoder='cv2'"


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
