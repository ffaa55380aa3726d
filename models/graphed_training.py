"""A training step of the detector as CUDA graphs, up to its losses on voxels.

Shapes: B batch, T frames newest first, N cameras, image index t*N + n.
"""

from typing import Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from lib.dist import counting_shares, world_size
from lib.targets import OccupancyTargets
from models.cuda_graph import GraphedPass, Stage, can_capture
from models.decoders import TransformerOutput
from models.decoders.draws import GivenDraws
from models.encoder import ImageEncoder, ImageFeatures
from models.head import SparseOccHead


class GraphedTraining:
    """Forward and backward pass of a detector from the images to the losses on voxels, and to what the other losses
    read, as CUDA graphs. Gradients of the head arrive before the encoder is gone back through.

    Args:
        encoder: images to features.
        head: features to predictions, and losses of these.
        encoder_parts: the modules of the encoder that learn.
    """

    def __init__(self, encoder: ImageEncoder, head: SparseOccHead, *encoder_parts: nn.Module):
        self._encoder, self._head = encoder, head
        self._image_size = (0, 0)
        self._names: List[str] = []  # of the losses
        stages = Stage(self._encode, encoder_parts), Stage(self._decode, (head,))
        self.replayed = GraphedPass(*stages, keeps=encoder.constants)
        parts = [module for part in (*encoder_parts, head) for module in part.modules()]
        self._exchanges = any(isinstance(module, nn.SyncBatchNorm) for module in parts)

    def suits(self, img: Tensor) -> bool:
        """Whether a pass over these images can be replayed: gradients are wanted, the device can capture, and no norm
        exchanges statistics with other processes."""
        return torch.is_grad_enabled() and can_capture(img.device) and not (self._exchanges and world_size() > 1)

    def __call__(
        self, img: Tensor, lidar2img: Tensor, ego2lidar: Tensor, targets: OccupancyTargets
    ) -> Tuple[TransformerOutput, Dict[str, Tensor]]:
        """What other losses read, and losses by name. Numbers are drawn first, in the order of a pass step by step.

        Args:
            img: uint8 [B, T*N, 3, H, W] BGR.
            lidar2img, ego2lidar: [B, T*N, 4, 4].
            targets: of the batch, checked.
        """
        transformer = self._head.transformer
        images = self._encoder.prepare(img)
        numbers = transformer.draw_ahead(img.shape[0], img.device)
        labels = targets.voxel_semantics, targets.mask_camera
        results = self.replayed(images, lidar2img, ego2lidar, *labels, *numbers)
        losses, tensors = results[: len(self._names)], results[len(self._names) :]
        output = TransformerOutput.of_tensors(tensors, transformer.voxel_decoder.scales)
        return output, dict(zip(self._names, losses))

    def clear(self) -> None:
        """Drop the graphs and their memory."""
        self.replayed.clear()

    def _encode(
        self, images: Tensor, lidar2img: Tensor, ego2lidar: Tensor, *others: Optional[Tensor]
    ) -> List[Optional[Tensor]]:
        """What :meth:`_decode` takes."""
        features = self._encoder.features_of(images, lidar2img, ego2lidar)
        self._image_size = features.image_size
        return [features.ego2img, *others, *features.maps]

    def _decode(
        self, ego2img: Tensor, semantics: Tensor, mask: Optional[Tensor], *tensors: Tensor
    ) -> List[Optional[Tensor]]:
        """Losses, then what other losses read; tensors: numbers drawn, then the maps."""
        count = len(tensors) - self._head.transformer.sizes.num_levels
        numbers, maps = tensors[:count], tensors[count:]
        features = self._encoder.with_gradient_sum(ImageFeatures(maps, ego2img, self._image_size))
        output = self._head.transformer(features, GivenDraws(numbers))
        targets = OccupancyTargets(voxel_semantics=semantics, mask_camera=mask)
        with counting_shares(False):  # a graph counts for nobody
            losses = self._head.terms_on_voxels(output.stages, targets, of_graphs=True)
        self._names = list(losses)
        return [*losses.values(), *output.for_losses()]
