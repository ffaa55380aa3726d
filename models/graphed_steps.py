"""Steps of the detector as CUDA graphs: of training, up to the losses on voxels, and of inference, at batch 1.

Shapes: B batch, T frames newest first, N cameras, image index t*N + n.
"""

from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from lib.dist import counting_shares, world_size
from lib.targets import OccupancyTargets
from models.cuda_graph import GraphedFunction, GraphedPass, GraphMemory, Stage, can_capture
from models.decoders import TransformerOutput
from models.decoders.draws import GivenDraws
from models.encoder import Arrival, ImageEncoder, ImageFeatures
from models.head import SparseOccHead, begin_splitting, join_arrays


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


class GraphedPrediction:
    """The prediction of one sample, the encoder of its new frames and the head being one CUDA graph.

    Args:
        encoder: images to features; it can replay the images that are given.
        head: features to predictions.
        memory: of graphs that are never replayed at the same time.
    """

    def __init__(self, encoder: ImageEncoder, head: SparseOccHead, memory: GraphMemory):
        self._encoder, self._head = encoder, head
        self._names: List[str] = []  # of the prediction's arrays
        self.replayed = GraphedFunction(self._arrays, 4, self._version, self._last_version, memory, clones=False)

    def __call__(
        self,
        img: Tensor,
        lidar2img: Tensor,
        ego2lidar: Tensor,
        img_metas: Optional[Sequence[Mapping]],
        keeps_frames: bool,
    ) -> Callable[[], Dict[str, np.ndarray]]:
        """Begin; what is given back waits for the arrays, and gives them by name.

        Args:
            img, lidar2img, ego2lidar, img_metas: of one sample, see ``SparseOcc.forward``.
            keeps_frames: earlier frames are known by ``img_metas``; otherwise all are encoded.
        """
        with self._encoder.arriving(img, img_metas if keeps_frames else None) as (maps, frames, places, image_size):
            inputs, fixed = (places, lidar2img, ego2lidar, frames), (image_size, not keeps_frames)
            results = self.replayed(*inputs, fixed=fixed, in_place=maps)
        names = self._names
        finish = begin_splitting(results[: -len(names)], results[-len(names) :])
        return lambda: dict(zip(names, finish()))

    def clear(self) -> None:
        """Drop the graphs."""
        self.replayed.clear()

    def _arrays(
        self,
        image_size: Tuple[int, int],
        keeps_matrices: bool,
        places: Tensor,
        lidar2img: Tensor,
        ego2lidar: Tensor,
        frames: Optional[Tensor],
        *maps: Tensor,
    ) -> List[Tensor]:
        """``join_arrays`` of the sample's arrays, then these, by tensors alone, for graphs; their names are noted.

        Args:
            image_size, places, frames, maps: an ``Arrival``.
            keeps_matrices: see ``SparseVoxelDecoder``; where all frames are encoded time is short, not memory.
        """
        self._head.transformer.voxel_decoder.keeps_matrices = keeps_matrices
        features = self._encoder.receive(Arrival(maps, frames, places, image_size), lidar2img, ego2lidar)
        arrays = self._head.predict(features)[0].arrays(self._head.index_type)
        self._names = list(arrays)
        return [*join_arrays(list(arrays.values())), *arrays.values()]

    def _version(self) -> Tuple:
        return self._encoder.version(), self._head.transformer.version()

    def _last_version(self) -> Tuple:
        return self._encoder.last_version(), self._head.transformer.last_version()
