"""The detector: images and calibration in, losses or sparse occupancy out.

Shapes: B batch, T frames newest first, N cameras, image index t*N + n; X, Y, Z the grid.
"""

from typing import Callable, Dict, List, Mapping, Optional, Sequence, Union

import numpy as np
import torch
from mmdet.models.builder import BACKBONES, DETECTORS, HEADS, NECKS
from torch import Tensor

from lib.errors import ConfigError
from lib.targets import OccupancyTargets
from lib.task import Task
from models import builder
from models.csrc import describe_operators
from models.cuda_graph import GraphMemory, MadeOfWeights
from models.encoder import ImageEncoder, ImageFeatures
from models.encoder.image_input import ImageInput
from models.graphed_steps import GraphedPrediction, GraphedTraining
from models.head import RawPrediction, begin_reading
from models.losses import BEGINNING, TrainingPass, build_auxiliary_losses, check_targets

_HEAD = 'model.pts_bbox_head'


@DETECTORS.register_module()
class SparseOcc(MadeOfWeights):
    """Fully sparse 3-D occupancy from multi-view video (arXiv 2312.17118).

    Args:
        task: ``Task``, or the dict that makes one.
        img_backbone, img_neck, pts_bbox_head: configs of the parts.
        data_aug: what happens to the images on the device, see ``ImageInput.from_config``.
        use_mask_camera: train on camera-visible voxels only.
        auxiliary_losses: configs of losses that only training has, by name, see ``build_auxiliary_losses``.
        test_cfg: what inference does, see ``InferenceSettings``.
        fuse_backbone: on a GPU, compute a ResNet with fixed norm statistics by ``FusedResNet``: the same but for
            rounding, sooner and in less memory; at inference a plain FPN by ``run_neck`` as well. False runs mmdet's
            modules as they are.
        train_cfg, pretrained: accepted for mmdet's builders; must be None.
    """

    # replay training's forward and backward pass up to the losses as CUDA graphs, where they can be captured
    graphs_training = False

    # what lib.checkpoint asks of a model
    describe_weights = staticmethod(builder.describe_weights)
    pretrained_names = builder.PRETRAINED_NAMES
    training_only = (BEGINNING,)

    def __init__(
        self,
        task: Union[Task, Mapping],
        img_backbone: Mapping,
        img_neck: Mapping,
        pts_bbox_head: Mapping,
        data_aug: Mapping,
        use_mask_camera: bool = False,
        test_cfg: Optional[Mapping] = None,
        fuse_backbone: bool = True,
        train_cfg: Optional[Mapping] = None,
        pretrained: Optional[str] = None,
        auxiliary_losses: Optional[Mapping] = None,
    ):
        super().__init__()
        if train_cfg is not None or pretrained is not None:
            raise ConfigError('model.train_cfg and model.pretrained are not used; remove them (use load_from)')
        self.task = task if isinstance(task, Task) else Task.from_config(task)
        settings = builder.InferenceSettings.from_config(test_cfg)
        self.history, self.cuda_graph, self.use_mask_camera = settings.history, settings.cuda_graph, use_mask_camera
        self.image_input = ImageInput.from_config(data_aug)
        self.img_backbone = builder.build_encoder_part(img_backbone, BACKBONES, 'model.img_backbone')
        self.img_neck = builder.build_encoder_part(img_neck, NECKS, 'model.img_neck')
        head = builder.hand_down(pts_bbox_head, _HEAD, settings.head, 'model.test_cfg')
        self.pts_bbox_head = builder.build_part(head, HEADS, _HEAD, self.task)
        auxiliary = build_auxiliary_losses(auxiliary_losses, self.pts_bbox_head.transformer.sizes)
        for name, loss in auxiliary.items():
            self.add_module(name, loss)
        self.auxiliary_losses = tuple(auxiliary.values())
        parts, memory = (self.image_input, self.img_backbone, self.img_neck), GraphMemory()
        self.encoder = ImageEncoder(*parts, self.task.num_frames, self.task.num_cameras, fuse_backbone, memory)
        self._neck_cfg = dict(img_neck)
        self._graphed = GraphedTraining(self.encoder, self.pts_bbox_head, self.img_backbone, self.img_neck)
        self._replayed = GraphedPrediction(self.encoder, self.pts_bbox_head, memory)

    def check_parts(self):
        """Raise ConfigError unless backbone, neck and head fit together; leaves the former in evaluation mode."""
        transformer = self.pts_bbox_head.transformer
        builder.check_graph(self.cuda_graph, transformer.voxel_decoder.keep_threshold)
        builder.check_maps(self.img_backbone, self.img_neck, transformer.sizes, self._neck_cfg)

    def forward(
        self,
        img: Tensor,
        lidar2img: Tensor,
        ego2lidar: Tensor,
        img_metas: Optional[Sequence[Mapping]] = None,
        targets: Optional[OccupancyTargets] = None,
        return_loss: bool = True,
    ):
        """Losses, or predictions.

        Args:
            img: uint8 [B, T*N, 3, H, W] BGR; fewer at batch 1 where ``img_metas`` says which frames are given.
            lidar2img: [B, T*N, 4, 4], LIDAR_TOP (metres) to pixels of that image.
            ego2lidar: [B, T*N, 4, 4], ego to LIDAR_TOP, both of the current keyframe, metres.
            img_metas: per sample a dict; ``frame_keys`` (T*N image names) is what the cache goes by, ``given`` see
                ``ImageEncoder``.
            targets: labels of the batch on the device of ``img``; not needed for predictions. ``mask_camera`` is
                needed with ``use_mask_camera`` and otherwise not looked at.
            return_loss: losses if True, predictions if False.

        Returns:
            dict of scalar losses, to be summed; or per sample a dict of numpy arrays: sem_pred uint8 [1, K],
            occ_loc [1, K, 3] voxel indices and, for panoptic tasks, pano_inst int16 [1, K] and pano_sem
            uint8 [1, K].
        """
        if return_loss:
            return self.loss(img, lidar2img, ego2lidar, targets)
        with torch.no_grad():
            return self.predict(img, lidar2img, ego2lidar, img_metas)

    def loss(
        self, img: Tensor, lidar2img: Tensor, ego2lidar: Tensor, targets: Optional[OccupancyTargets]
    ) -> Dict[str, Tensor]:
        """Every loss term by name; arguments as in :meth:`forward`."""
        targets = check_targets(targets, self.task, self.use_mask_camera)
        if self.graphs_training and self.training and not self.auxiliary_losses and self._graphed.suits(img):
            output, known = self._graphed(img, lidar2img, ego2lidar, targets)
            return self.pts_bbox_head.loss(output, targets, known)
        features = self.encoder(img, lidar2img, ego2lidar)
        output = self.pts_bbox_head(features)
        losses = self.pts_bbox_head.loss(output, targets)
        step = TrainingPass(features, output, targets, lidar2img, tuple(img.shape[-2:]), self.pts_bbox_head)
        for loss in self.auxiliary_losses:
            losses.update(loss(step))
        return losses

    def predict(
        self, img: Tensor, lidar2img: Tensor, ego2lidar: Tensor, img_metas: Optional[Sequence[Mapping]] = None
    ) -> List[Dict[str, np.ndarray]]:
        """Predictions per sample; arguments and result as in :meth:`forward`."""
        return self._begin(img, lidar2img, ego2lidar, img_metas)()

    def begin_prediction(
        self, img: Tensor, lidar2img: Tensor, ego2lidar: Tensor, img_metas: Optional[Sequence[Mapping]] = None
    ) -> Callable[[], List[Dict[str, np.ndarray]]]:
        """As :meth:`predict`, which what is given back does when it is called. On a GPU the work has begun by then, and
        the next prediction can begin before this one is asked for, so that the GPU need not wait in between."""
        with torch.no_grad():
            return self._begin(img, lidar2img, ego2lidar, img_metas)

    def _begin(self, img, lidar2img, ego2lidar, img_metas) -> Callable[[], List[Dict[str, np.ndarray]]]:
        if self.cuda_graph and self.encoder.can_replay(img):
            begun = [self._replayed(img, lidar2img, ego2lidar, img_metas, self.keeps_frames)]
        else:
            merged = self.pts_bbox_head.predict(self._features(img, lidar2img, ego2lidar, img_metas))
            begun = [begin_reading(sample.arrays(self.pts_bbox_head.index_type)) for sample in merged]
        return lambda: [finish() for finish in begun]

    def predict_raw(
        self, img: Tensor, lidar2img: Tensor, ego2lidar: Tensor, img_metas: Optional[Sequence[Mapping]] = None
    ) -> RawPrediction:
        """Intermediate results and labels; arguments as in :meth:`forward`.

        Call it under ``torch.no_grad()`` unless gradients are wanted; with gradients nothing comes from the cache.
        """
        features = self._features(img, lidar2img, ego2lidar, img_metas).in_order(self.task.num_cameras)
        return self.pts_bbox_head.predict_raw(features)

    def _features(self, img, lidar2img, ego2lidar, img_metas) -> ImageFeatures:
        """What to predict from, with the history that the config asks for."""
        return self.encoder(img, lidar2img, ego2lidar, img_metas if self.keeps_frames else None)

    @property
    def keeps_frames(self) -> bool:
        """Features of frames are kept from one sample to the next, so that samples in order need new frames only."""
        return self.history == 'cached'

    def describe_speed(self) -> str:
        """One sentence on what, besides the precision, decides how fast inference at batch 1 is."""
        return describe_operators(next(self.parameters()).device, self.cuda_graph)

    def reset_history(self):
        """Forget the features of earlier frames."""
        self.encoder.cache.clear()

    def train(self, mode: bool = True):
        """Switch mode, which forgets the features of earlier frames."""
        self.reset_history()
        return super().train(mode)

    def forget_weights(self):
        """Drop everything that was made from the weights as they were."""
        self._graphed.clear()
        self._replayed.clear()
        self.encoder.forget_weights()
        self.pts_bbox_head.forget_weights()
