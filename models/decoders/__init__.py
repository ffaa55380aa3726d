"""Both decoders, one after the other.

Shapes: B batch, T frames newest first, N cameras, image index t*N + n.
"""

from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from mmcv.runner import BaseModule
from mmdet.models.utils.builder import TRANSFORMER
from torch import Tensor

from lib.task import Task
from models.decoders.draws import RandomDraws, build_draws
from models.decoders.fused import MadeOnce
from models.decoders.layers import DecoderSizes
from models.decoders.mask_decoder import MaskDecoder, MaskPrediction
from models.decoders.sparse_voxel_decoder import SparseVoxelDecoder, VoxelStage
from models.encoder import ImageFeatures


class TransformerOutput(NamedTuple):
    """Everything the decoders predict.

    stages  kept voxels of each stage of the voxel decoder, from coarse to fine
    layers  predictions of the mask decoder over the last stage's voxels, the final one last
    """

    stages: List[VoxelStage]
    layers: List[MaskPrediction]

    def for_losses(self) -> List[Optional[Tensor]]:
        """What the losses read: coords, seg_logits, occ_logits of every stage, then both logits of every layer."""
        of_stages = [t for stage in self.stages for t in (stage.coords, stage.seg_logits, stage.occ_logits)]
        return of_stages + [t for layer in self.layers for t in (layer.class_logits, layer.mask_logits)]

    @classmethod
    def of_tensors(cls, tensors: Sequence[Optional[Tensor]], scales: Sequence[int]) -> 'TransformerOutput':
        """The inverse of ``for_losses``, without features of voxels; scales of the stages in turn."""
        of_stages, of_layers = tensors[: 3 * len(scales)], tensors[3 * len(scales) :]
        stages = [
            VoxelStage(coords, seg_logits, None, scale, occ_logits)
            for coords, seg_logits, occ_logits, scale in zip(of_stages[::3], of_stages[1::3], of_stages[2::3], scales)
        ]
        return cls(stages, [MaskPrediction(*both) for both in zip(of_layers[::2], of_layers[1::2])])


@TRANSFORMER.register_module()
class SparseOccTransformer(BaseModule):
    """Sparse voxel decoder, then mask decoder.

    Args:
        task: classes, range, grid, cameras, frames.
        embed_dims: C.
        num_layers: applications of the mask decoder's layer (4 in release 1.0, 2 in 1.1).
        num_groups: G.
        num_points: P, per group.
        num_queries: Q, mask queries.
        num_levels: L, pyramid levels.
        topk_training, topk_testing: voxels kept by each stage.
        scoring: 'semantic' (release 1.1) or 'occupancy' (release 1.0).
        dropout: of the voxel decoder's attention and of the FFNs.
        draws: test-time draws of the mask-guided sampling, 'even' or 'random'.
        mixing_chunk: blocks per piece of the mixing whose intermediates (and those of the attention) are made
            again in the backward pass; 0 keeps all intermediates, which is faster where memory is ample.
        published_weight_order: keep the level-weight order that released weights were trained with.
        num_heads: of the attention between blocks; its cost grows with the square of topk_training[0], and 0
            leaves it out.
        mask_guided: the mask decoder looks at voxels of each query's mask; False: anywhere in the volume.
        keep_threshold: at test time a stage keeps only what it gives at least this probability of being occupied,
            topk_testing at most. One sample at a time, and no CUDA graphs: how many that are is known when they
            are counted. None keeps the best ones whatever their probability.
    """

    def __init__(
        self,
        task: Task,
        embed_dims: int = 256,
        num_layers: int = 2,
        num_groups: int = 4,
        num_points: int = 4,
        num_queries: int = 100,
        num_levels: int = 4,
        topk_training: Sequence[int] = (4000, 16000, 64000),
        topk_testing: Sequence[int] = (2000, 8000, 32000),
        scoring: str = 'semantic',
        dropout: float = 0.1,
        draws: str = 'even',
        mixing_chunk: int = 4096,
        published_weight_order: bool = True,
        num_heads: int = 8,
        mask_guided: bool = True,
        keep_threshold: Optional[float] = None,
    ):
        super().__init__()
        sizes = DecoderSizes(task, embed_dims, num_groups, num_points, num_levels, dropout, published_weight_order)
        self.sizes = sizes
        self.voxel_decoder = SparseVoxelDecoder(
            sizes, topk_training, topk_testing, scoring, num_heads, mixing_chunk, keep_threshold
        )
        self.decoder = MaskDecoder(sizes, num_layers, num_queries, guided=mask_guided)
        self.training_draws, self.testing_draws = RandomDraws(), build_draws(draws)
        self._made_once: List[MadeOnce] = self.voxel_decoder.made_once() + self.decoder.made_once()

    def draw_ahead(self, batch: int, device: torch.device) -> List[Tensor]:
        """All that a pass over so many samples draws in training but for dropout, for ``GivenDraws``."""
        decoder = self.decoder
        queries, sampling = decoder.query_feat.num_embeddings, decoder.decoder_layer.sampling
        layers = range(decoder.num_layers)
        return [t for _ in layers for t in sampling.draw_ahead(batch, queries, self.training_draws, device)]

    def version(self) -> Tuple:
        """Another value whenever a weight has changed that something was made of, which is forgotten then."""
        return tuple([made.version() for made in self._made_once])

    def last_version(self) -> Tuple:
        """What :meth:`version` told last, without looking; another value when something was dropped since."""
        return tuple([made.last_version() for made in self._made_once])

    def forget_weights(self):
        """Drop what was made from the weights as they were."""
        for made in self._made_once:
            made.clear()

    def forward(self, features: ImageFeatures, draws=None) -> TransformerOutput:
        """Voxels and masks of every sample of the batch; draws: in place of its own strategy of drawing."""
        stages = self.voxel_decoder(features)
        if draws is None:
            draws = self.training_draws if self.training else self.testing_draws
        return TransformerOutput(stages, self.decoder(stages[-1], draws, features))
