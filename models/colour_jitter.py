"""Photometric distortion of each image of a batch, on the device (SPEC: images)."""

import torch
from torch import Tensor

from lib.dist import batch_rand

_BRIGHTNESS = 32.0
_FACTORS = (0.5, 1.5)
_HUE_DEGREES = 18.0


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
