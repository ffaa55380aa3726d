"""Whether the parts of a model fit together: told in one sentence when it is built, not as a shape ten layers down."""

import os
from typing import List, Mapping, Sequence

import torch
from mmcv.cnn.bricks.registry import ACTIVATION_LAYERS, CONV_LAYERS, NORM_LAYERS
from mmcv.cnn.utils.weight_init import INITIALIZERS
from torch import Tensor, nn

from lib.errors import ConfigError, reason
from lib.registry import check_component

_LAYERS = dict(norm_cfg=NORM_LAYERS, act_cfg=ACTIVATION_LAYERS, conv_cfg=CONV_LAYERS, init_cfg=INITIALIZERS)
_ADDED_BY_MMCV = ('requires_grad', 'layer', 'override')  # beside what the layer itself takes
_TRIAL_SIZE = 64  # pixels; small, and a multiple of every usual stride


def check_layers(cfg: Mapping, where: str) -> None:
    """Check the layers that a part's config names: their types and keys, and the files that they start from.

    Args:
        cfg: of a backbone or neck.
        where: its key in the config.

    Raises:
        ConfigError: an unknown layer or key, or a file of ``init_cfg`` that is not there.
    """
    for name, registry in _LAYERS.items():
        layers = cfg.get(name)
        for layer in layers if isinstance(layers, (list, tuple)) else [layers]:
            if isinstance(layer, Mapping):
                check_component(layer, registry, f'{where}.{name}', _ADDED_BY_MMCV)
                _check_start(layer.get('checkpoint'), f'{where}.{name}.checkpoint')


def _check_start(path, key):
    """``init_cfg=dict(type='Pretrained', checkpoint=...)``: a path without a scheme must be a file."""
    if isinstance(path, str) and '://' not in path and not os.path.isfile(os.path.expanduser(path)):
        raise ConfigError(f'{key}: the file {path} does not exist; correct it, or set init_cfg=None and use load_from')


def check_maps(backbone: nn.Module, neck: nn.Module, num_levels: int, channels: int, neck_cfg: Mapping) -> None:
    """Run backbone and neck on one tiny image and compare what comes out with what comes next.

    Args:
        backbone, neck: as built, on the CPU; left in evaluation mode.
        num_levels: maps that the head looks at.
        channels: of these maps.
        neck_cfg: config of the neck.

    Raises:
        ConfigError: they do not fit; it names the keys and what to set them to.
    """
    given = _describe(backbone)
    maps = _try(backbone, torch.zeros(1, 3, _TRIAL_SIZE, _TRIAL_SIZE), 'model.img_backbone')
    if not maps:
        return
    wanted = neck_cfg.get('in_channels')
    widths = [int(level.shape[1]) for level in maps]
    if isinstance(wanted, (list, tuple)) and list(wanted) != widths:
        raise ConfigError(
            f'model.img_backbone ({given}) gives {len(widths)} maps of {widths} channels, but '
            f'model.img_neck.in_channels is {list(wanted)}; set model.img_neck.in_channels={widths}'
        )
    outs = _try(neck, tuple(maps), 'model.img_neck')
    if len(outs) != num_levels:
        raise ConfigError(
            f'model.img_neck gives {len(outs)} maps, but model.pts_bbox_head.transformer.num_levels is {num_levels}; '
            f'set num_levels={len(outs)}, or model.img_neck.num_outs={num_levels}'
        )
    if any(level.shape[1] != channels for level in outs):
        raise ConfigError(
            f'model.img_neck gives maps of {outs[0].shape[1]} channels, but model.pts_bbox_head.embed_dims is '
            f'{channels}; set model.img_neck.out_channels={channels}'
        )


def _describe(backbone: nn.Module) -> str:
    depth = getattr(backbone, 'depth', None)
    return type(backbone).__name__ + (f', depth {depth}' if depth else '')


def _try(part: nn.Module, inputs, where: str) -> Sequence[Tensor]:
    """Maps of a part; none where it cannot be tried on a CPU.

    Raises:
        ConfigError: it cannot work on such input, or gives no maps.
    """
    try:
        part.eval()
        with torch.no_grad():
            maps = part(inputs)
    except (AssertionError, RuntimeError, ValueError, IndexError, TypeError, NotImplementedError) as error:
        if 'on GPU' in str(error) or 'CUDA' in str(error):  # e.g. SyncBN of old PyTorch releases
            return []
        raise ConfigError(f'{where} ({type(part).__name__}) cannot work as configured: {reason(error)}') from error
    levels: List[Tensor] = list(maps) if isinstance(maps, (list, tuple)) else []
    if not levels or any(not isinstance(level, Tensor) or level.dim() != 4 for level in levels):
        raise ConfigError(f'{where} ({type(part).__name__}) must give a list of maps [n, C, H, W]; choose another type')
    return levels
