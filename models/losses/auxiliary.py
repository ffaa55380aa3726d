"""Losses that only training has, beside the head's: one door for all of them, ``model.auxiliary_losses``.

Shapes: B batch, T frames newest first, N cameras.
"""

from typing import TYPE_CHECKING, Dict, Mapping, NamedTuple, Optional, Tuple

from mmdet.models.builder import LOSSES
from torch import Tensor, nn

from lib.errors import ConfigError
from lib.targets import OccupancyTargets
from models.builder import build_part
from models.decoders import TransformerOutput
from models.decoders.layers import DecoderSizes
from models.encoder import ImageFeatures

if TYPE_CHECKING:
    from models.head import SparseOccHead

BEGINNING = 'loss_'  # of their names; in checkpoints it marks what only training uses


class TrainingPass(NamedTuple):
    """What an auxiliary loss can look at.

    features    of all frames
    output      of the decoders
    targets     labels of the batch
    lidar2img   [B, T*N, 4, 4], LIDAR_TOP (metres) to pixels of the augmented images
    image_size  (height, width) of the images before padding, pixels
    head        the layers and losses that there are
    """

    features: ImageFeatures
    output: TransformerOutput
    targets: OccupancyTargets
    lidar2img: Tensor
    image_size: Tuple[int, int]
    head: 'SparseOccHead'


def build_auxiliary_losses(cfgs: Optional[Mapping], sizes: DecoderSizes) -> Dict[str, nn.Module]:
    """Modules by name, each of which makes terms by name of a ``TrainingPass``.

    Args:
        cfgs: config of each; None takes one out. ``task`` and ``sizes`` are handed over to constructors that ask.
        sizes: of the decoders, and so of the feature maps.

    Raises:
        ConfigError: a name that would not count, or a config that is wrong.
    """
    losses = {}
    for name, cfg in (cfgs or {}).items():
        where = f'model.auxiliary_losses.{name}'
        if not name.startswith(BEGINNING):
            raise ConfigError(f'{where}: names of losses begin with {BEGINNING!r}; rename it')
        if cfg is not None:
            losses[name] = build_part(cfg, LOSSES, where, sizes.task, sizes)
    return losses
