"""Photometric distortion of each image of a batch, on the device (SPEC: images)."""
import torch
from torch import Tensor

_BRIGHTNESS = 32.0
_FACTORS = (0.5, 1.5)
_HUE_DEGREES = 18.0


def jitter_colours(images: Tensor) -> Tensor:
    """Brightness, contrast (before or after), saturation, hue and channel order, each with probability 0.5.

    Args:
        images: float32 [n, 3, H, W] BGR, 0..255. Draws are independent from image to image.

    Returns:
        a new tensor of the same shape; values may leave 0..255.
    """
    count, device = images.shape[0], images.device
    images = images + _maybe(_uniform(count, device, -_BRIGHTNESS, _BRIGHTNESS), 0.0)
    contrast = _maybe(_uniform(count, device, *_FACTORS), 1.0)
    before = _coin(count, device)
    images = images * torch.where(before, contrast, torch.ones_like(contrast))
    images = _jitter_hsv(images, saturation=_maybe(_uniform(count, device, *_FACTORS), 1.0),
                         hue=_maybe(_uniform(count, device, -_HUE_DEGREES, _HUE_DEGREES), 0.0))
    images = images * torch.where(before, torch.ones_like(contrast), contrast)
    return _shuffle_channels(images)


def _uniform(count: int, device, low: float, high: float) -> Tensor:
    return torch.empty(count, 1, 1, 1, device=device).uniform_(low, high)


def _coin(count: int, device) -> Tensor:
    return torch.rand(count, 1, 1, 1, device=device) < 0.5


def _maybe(value: Tensor, neutral: float) -> Tensor:
    """Each entry with probability 0.5, otherwise the neutral value."""
    return torch.where(_coin(value.shape[0], value.device), value, torch.full_like(value, neutral))


def _jitter_hsv(images: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Scale the saturation and turn the hue (degrees) of BGR images."""
    blue, green, red = images.unbind(1)
    value = images.max(1).values
    chroma = value - images.min(1).values
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    sector = torch.where(value == red, (green - blue) / safe,
                         torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe))
    sector = (sector + hue.squeeze(1) / 60) % 6
    chroma = chroma * saturation.squeeze(1)
    return torch.stack([_from_hue(value, chroma, sector, n) for n in (1, 3, 5)], dim=1)


def _from_hue(value: Tensor, chroma: Tensor, sector: Tensor, offset: int) -> Tensor:
    """One channel: offset 5 gives red, 3 green, 1 blue. ``sector`` is the hue / 60 degrees."""
    k = (offset + sector) % 6
    return value - chroma * torch.min(k, 4 - k).clamp(0, 1)


def _shuffle_channels(images: Tensor) -> Tensor:
    """A random channel order for a random half of the images."""
    count, device = images.shape[0], images.device
    order = torch.rand(count, 3, device=device).argsort(1)
    keep = torch.arange(3, device=device).expand(count, 3)
    order = torch.where(_coin(count, device).view(count, 1), order, keep)
    return images.gather(1, order.view(count, 3, 1, 1).expand_as(images))
