"""From uint8 images to the network's input, on the device: colour jitter, normalisation, padding."""

from typing import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.errors import ConfigError
from models.colour_jitter import jitter_colours


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
        cfg = dict(cfg)
        norm, pad = dict(cfg.pop('img_norm_cfg')), dict(cfg.pop('img_pad_cfg', dict(size_divisor=32)))
        color_aug = cfg.pop('img_color_aug', False)
        if cfg:
            raise ConfigError(
                f'model.data_aug: unknown keys {sorted(cfg)}; the keys are img_color_aug, img_norm_cfg, img_pad_cfg'
            )
        return cls(norm['mean'], norm['std'], norm.get('to_rgb', True), pad['size_divisor'], color_aug)

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
