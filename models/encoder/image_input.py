"""From uint8 images to the network's input, on the device: colour jitter, normalisation, padding (SPEC: images)."""

from typing import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.dist import batch_rand
from lib.errors import ConfigError
from lib.registry import check_keys

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
        """images uint8 [n, 3, H, W] BGR of B samples -> float32 [n, 3, H', W'], channels-last in memory."""
        images = images.to(torch.float32)
        if self.training and self.color_aug:
            images = jitter_colours(images, samples)
        if self.to_rgb:
            images = images.flip(1)
        images = (images - self.mean) / self.std
        height, width = self.padded_size(images.shape[-2:])
        images = F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))
        return images.contiguous(memory_format=torch.channels_last)

    def padded_size(self, size: Sequence[int]):
        """(height, width) after padding."""
        divisor = self.size_divisor
        return tuple((int(n) + divisor - 1) // divisor * divisor for n in size)


def jitter_colours(images: Tensor, samples: int = 1) -> Tensor:
    """Brightness, contrast (before or after), saturation, hue and channel order, each with probability 0.5.

    Args:
        images: float32 [n, 3, H, W] BGR, 0..255, the images of one sample after those of the other.
        samples: B, how many samples the images are of. Draws are independent from image to image.

    Returns:
        a new tensor of the same shape; values may leave 0..255.
    """
    draws = _Draws(samples, images.shape[0], images.device)
    images = images + draws.maybe(draws.uniform(-_BRIGHTNESS, _BRIGHTNESS), 0.0)
    contrast = draws.maybe(draws.uniform(*_FACTORS), 1.0)
    before = draws.coin()
    images = images * torch.where(before, contrast, torch.ones_like(contrast))
    images = _jitter_hsv(
        images,
        saturation=draws.maybe(draws.uniform(*_FACTORS), 1.0),
        hue=draws.maybe(draws.uniform(-_HUE_DEGREES, _HUE_DEGREES), 0.0),
    )
    images = images * torch.where(before, torch.ones_like(contrast), contrast)
    return _shuffle_channels(images, draws)


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


def _shuffle_channels(images: Tensor, draws: _Draws) -> Tensor:
    """A random channel order for a random half of the images."""
    order = draws.rand(3).argsort(1)
    keep = torch.arange(3, device=images.device).view(1, 3, 1, 1).expand_as(order)
    order = torch.where(draws.coin(), order, keep)
    return images.gather(1, order.expand_as(images))
