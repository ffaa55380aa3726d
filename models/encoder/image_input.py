"""From uint8 images to the network's input, on the device: colour jitter, normalisation, padding (SPEC: images)."""

from typing import Mapping, NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.dist import batch_rand
from lib.errors import ConfigError
from lib.registry import check_keys
from models.csrc import autocast_dtype, has_triton

_BRIGHTNESS = 32.0
_FACTORS = (0.5, 1.5)
_HUE_DEGREES = 18.0


class ImageInput(nn.Module):
    """Jitter (training only), BGR to RGB, normalisation, zero padding.

    Args:
        mean, std: per channel, in the order after ``to_rgb``, for values 0..255.
        to_rgb: reverse the channels of the BGR input.
        size_divisor: pad height and width (below and right) to a multiple of this.
        color_aug: jitter colours in training.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], to_rgb: bool, size_divisor: int, color_aug: bool):
        super().__init__()
        self.to_rgb, self.size_divisor, self.color_aug = to_rgb, size_divisor, color_aug
        for name, value in (('mean', mean), ('std', std)):
            self.register_buffer(name, torch.tensor(value).float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer('settings', torch.tensor([*mean, *std]).float(), persistent=False)  # for kernels

    @classmethod
    def from_config(cls, cfg: Mapping) -> 'ImageInput':
        """From ``model.data_aug``: img_color_aug, img_norm_cfg, img_pad_cfg."""
        check_keys(cfg, ('img_color_aug', 'img_norm_cfg', 'img_pad_cfg'), 'model.data_aug')
        norm, pad = cfg.get('img_norm_cfg', {}), cfg.get('img_pad_cfg', {})
        check_keys(norm, ('mean', 'std', 'to_rgb'), 'model.data_aug.img_norm_cfg')
        check_keys(pad, ('size_divisor',), 'model.data_aug.img_pad_cfg')
        if 'mean' not in norm or 'std' not in norm:
            raise ConfigError('model.data_aug.img_norm_cfg needs mean and std, three numbers each')
        to_rgb, divisor = norm.get('to_rgb', True), pad.get('size_divisor', 32)
        return cls(norm['mean'], norm['std'], to_rgb, divisor, cfg.get('img_color_aug', False))

    def forward(self, images: Tensor, samples: int = 1) -> Tensor:
        """images uint8 [n, 3, H, W] BGR of B samples -> [n, 3, H', W'], channels-last in memory.

        float32, or, where one kernel does all of this, the type that autocast goes on in.
        """
        jitter = draw_jitter(samples, images.shape[0], images.device) if self.training and self.color_aug else None
        if images.dtype == torch.uint8 and has_triton(images.device):
            return self._prepare_fused(images, jitter)
        images = images.to(torch.float32)
        if jitter is not None:
            images = jitter_colours(images, jitter)
        if self.to_rgb:
            images = images.flip(1)
        images = (images - self.mean) / self.std
        height, width = self.padded_size(images.shape[-2:])
        images = F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))
        return images.contiguous(memory_format=torch.channels_last)

    def as_squares(self, images: Tensor) -> Optional[Tensor]:
        """``squares_of`` what :meth:`forward` gives in evaluation, in one pass; None where no kernel does it."""
        if self.training or images.dtype != torch.uint8 or not has_triton(images.device):
            return None
        from models.encoder.kernels import InputSizes, can_prepare_squares, prepare_squares  # needs Triton

        if not can_prepare_squares():
            return None
        sizes = InputSizes(*images.shape[-2:], *self.padded_size(images.shape[-2:]))
        dtype = autocast_dtype(images.device.type) or torch.float32
        return prepare_squares(images.contiguous(), self.settings, sizes, self.to_rgb, dtype)

    def _prepare_fused(self, images: Tensor, jitter: Optional['Jitter']) -> Tensor:
        from models.encoder.kernels import InputSizes, prepare_images  # needs Triton

        sizes = InputSizes(*images.shape[-2:], *self.padded_size(images.shape[-2:]))
        numbers = None if jitter is None else jitter.as_numbers()
        dtype = autocast_dtype(images.device.type) or torch.float32
        return prepare_images(images.contiguous(), self.settings, numbers, sizes, self.to_rgb, dtype)

    def padded_size(self, size: Sequence[int]):
        """(height, width) after padding."""
        divisor = self.size_divisor
        return tuple((int(n) + divisor - 1) // divisor * divisor for n in size)


class Jitter(NamedTuple):
    """How the colours of each image change; float32 [n, 1, 1, 1] but for the order.

    brightness  to add, of 0..255
    before      factor of contrast, applied before saturation and hue
    saturation  factor
    hue         degrees
    after       factor of contrast, applied after them
    order       int64 [n, 3, 1, 1], the channel that each takes
    """

    brightness: Tensor
    before: Tensor
    saturation: Tensor
    hue: Tensor
    after: Tensor
    order: Tensor

    def as_numbers(self) -> Tensor:
        """float32 [n, 8], as ``prepare_images`` takes them."""
        values = (self.brightness, self.before, self.saturation, self.hue / 60, self.after, self.order.float())
        return torch.cat([value.flatten(1) for value in values], dim=1)


def draw_jitter(samples: int, images: int, device: torch.device) -> Jitter:
    """Brightness, contrast (before or after), saturation, hue and channel order, each with probability 0.5.

    Args:
        samples: B, how many samples the images are of. Draws are independent from image to image.
        images: n, those of one sample after those of the other.
    """
    draws = _Draws(samples, images, device)
    brightness = draws.maybe(draws.uniform(-_BRIGHTNESS, _BRIGHTNESS), 0.0)
    contrast = draws.maybe(draws.uniform(*_FACTORS), 1.0)
    first, none = draws.coin(), torch.ones_like(contrast)
    saturation = draws.maybe(draws.uniform(*_FACTORS), 1.0)
    hue = draws.maybe(draws.uniform(-_HUE_DEGREES, _HUE_DEGREES), 0.0)
    before, after = torch.where(first, contrast, none), torch.where(first, none, contrast)
    return Jitter(brightness, before, saturation, hue, after, _draw_order(draws))


def jitter_colours(images: Tensor, jitter: Jitter) -> Tensor:
    """images float32 [n, 3, H, W] BGR, 0..255 -> a new tensor of the same shape; values may leave 0..255."""
    images = (images + jitter.brightness) * jitter.before
    images = _jitter_hsv(images, jitter.saturation, jitter.hue) * jitter.after
    return images.gather(1, jitter.order.expand_as(images))


class _Draws:
    """Random numbers per image, [n, 1, 1, 1]."""

    def __init__(self, samples: int, images: int, device: torch.device):
        self.samples, self.per_sample, self.device = samples, images // samples, device

    def rand(self, count: int = 1) -> Tensor:
        return batch_rand(self.samples, self.per_sample, count, device=self.device).view(-1, count, 1, 1)

    def uniform(self, low: float, high: float) -> Tensor:
        return low + (high - low) * self.rand()

    def coin(self) -> Tensor:
        return self.rand() < 0.5

    def maybe(self, value: Tensor, neutral: float) -> Tensor:
        """Each entry with probability 0.5, otherwise the neutral value."""
        return torch.where(self.coin(), value, torch.full_like(value, neutral))


def _jitter_hsv(images: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Scale the saturation and turn the hue (degrees) of BGR images."""
    blue, green, red = images.unbind(1)
    value = images.max(1).values
    chroma = value - images.min(1).values
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sector = (sector + hue.squeeze(1) / 60) % 6
    chroma = chroma * saturation.squeeze(1)
    return torch.stack([_from_hue(value, chroma, sector, n) for n in (1, 3, 5)], dim=1)


def _from_hue(value: Tensor, chroma: Tensor, sector: Tensor, offset: int) -> Tensor:
    """One channel: offset 5 gives red, 3 green, 1 blue. ``sector`` is the hue / 60 degrees."""
    k = (offset + sector) % 6
    return value - chroma * torch.min(k, 4 - k).clamp(0, 1)


def _draw_order(draws: _Draws) -> Tensor:
    """int64 [n, 3, 1, 1], a random channel order for a random half of the images."""
    order = draws.rand(3).argsort(1)
    keep = torch.arange(3, device=order.device).view(1, 3, 1, 1).expand_as(order)
    return torch.where(draws.coin(), order, keep)
