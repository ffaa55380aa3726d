"""Training with CUDA graphs: what leads from the images to what the losses read, and back, is replayed.

Shapes: B batch, T frames newest first, N cameras, image index t*N + n.
"""

from typing import List, Optional

import torch
from torch import Tensor, nn

from models.cuda_graph import GraphedPass, can_capture
from models.decoders import SparseOccTransformer, TransformerOutput
from models.decoders.draws import GivenDraws
from models.encoder import ImageEncoder


class GraphedTraining:
    """Forward and backward pass of a detector up to its losses, as CUDA graphs.

    Args:
        encoder: images to features.
        transformer: features to what the losses read.
        parts: the modules that learn in them.
    """

    def __init__(self, encoder: ImageEncoder, transformer: SparseOccTransformer, *parts: nn.Module):
        self._encoder, self._transformer, self._parts = encoder, transformer, parts
        self.replayed = GraphedPass(self._run, self._learning, self._buffers, keeps=encoder.constants)

    def suits(self, img: Tensor) -> bool:
        """Whether a pass over these images can be replayed: gradients are wanted, and the device can capture."""
        return torch.is_grad_enabled() and can_capture(img.device)

    def __call__(self, img: Tensor, lidar2img: Tensor, ego2lidar: Tensor) -> TransformerOutput:
        """What the losses read. Numbers are drawn first, in the order of a pass step by step.

        Args:
            img: uint8 [B, T*N, 3, H, W] BGR.
            lidar2img, ego2lidar: [B, T*N, 4, 4].
        """
        images = self._encoder.prepare(img)
        numbers = self._transformer.draw_ahead(img.shape[0], img.device)
        tensors = self.replayed(images, lidar2img, ego2lidar, *numbers)
        return TransformerOutput.of_tensors(tensors, self._transformer.voxel_decoder.scales)

    def clear(self) -> None:
        """Drop the graphs and their memory."""
        self.replayed.clear()

    def _run(self, images: Tensor, lidar2img: Tensor, ego2lidar: Tensor, *numbers: Tensor) -> List[Optional[Tensor]]:
        features = self._encoder.features_of(images, lidar2img, ego2lidar)
        return self._transformer(features, GivenDraws(numbers)).for_losses()

    def _learning(self) -> List[Tensor]:
        return [p for part in self._parts for p in part.parameters() if p.requires_grad]

    def _buffers(self) -> List[Tensor]:
        return [b for part in self._parts for b in part.buffers()]
