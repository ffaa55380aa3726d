"""The detector: images and calibration in, losses or sparse occupancy out.

Shapes: B batch, T frames newest first, N cameras, image index t*N + n; X, Y, Z the grid.
"""

from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Sequence, Union

import numpy as np
import torch
from mmcv.runner import BaseModule
from mmdet.models.builder import BACKBONES, DETECTORS, HEADS, NECKS
from torch import Tensor

from lib.errors import ConfigError, DataError
from lib.registry import check_keys
from lib.targets import OccupancyTargets
from lib.task import Task
from models.architecture import check_maps
from models.builder import PRETRAINED_NAMES, build_encoder_part, build_part, describe_weights, hand_down
from models.csrc import compiled_operators
from models.decoders import TransformerOutput
from models.encoder import ImageEncoder, ImageFeatures
from models.encoder.image_input import ImageInput
from models.losses import BEGINNING, TrainingPass, build_auxiliary_losses, check_targets
from models.merging import MergedPrediction

HISTORY = ('full', 'cached')
_HEAD = 'model.pts_bbox_head'
_HEAD_KEYS = ('draws', 'merge_stuff', 'overlap_threshold', 'score_threshold')  # of test_cfg, for the head


@dataclass
class RawPrediction:
    """Everything on the way from images to labels, for tests and analysis.

    Attributes:
        features: image features and projection matrices.
        output: stages of the voxel decoder, layers of the mask decoder.
        merged: labels per sample.
    """

    features: ImageFeatures
    output: TransformerOutput
    merged: List[MergedPrediction]


@DETECTORS.register_module()
class SparseOcc(BaseModule):
    """Fully sparse 3-D occupancy from multi-view video (arXiv 2312.17118).

    Args:
        task: ``Task``, or the dict that makes one.
        img_backbone, img_neck, pts_bbox_head: configs of the parts.
        data_aug: what happens to the images on the device, see ``ImageInput.from_config``.
        use_mask_camera: train on camera-visible voxels only.
        auxiliary_losses: configs of losses that only training has, by name, see ``build_auxiliary_losses``.
        test_cfg: history ('cached' keeps the features of earlier frames between calls with batch 1, 'full'
            encodes all frames of every sample), draws ('even' or 'random'), merge_stuff ('published' or
            'labelled'), overlap_threshold, score_threshold, cuda_graph (replay the encoder of one frame
            and the head as CUDA graphs at batch 1: the same numbers sooner, for more memory; off by default).
        fuse_backbone: on a GPU, compute a ResNet with fixed norm statistics by ``FusedResNet``: the same but for
            rounding, sooner and in less memory; at inference a plain FPN by ``run_neck`` as well. False runs mmdet's
            modules as they are.
        train_cfg, pretrained: accepted for mmdet's builders; must be None.
    """

    # what lib.checkpoint asks of a model
    describe_weights = staticmethod(describe_weights)
    pretrained_names = PRETRAINED_NAMES
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
            raise ConfigError(
                'model.train_cfg and model.pretrained are not used; remove them (weights to '
                'start from are given by load_from)'
            )
        self.task = task if isinstance(task, Task) else Task.from_config(task)
        test_cfg = dict(test_cfg or {})
        check_keys(test_cfg, ('history', 'cuda_graph', *_HEAD_KEYS), 'model.test_cfg')
        self.history, self.cuda_graph = test_cfg.get('history', 'full'), bool(test_cfg.get('cuda_graph', False))
        if self.history not in HISTORY:
            raise ConfigError(f'model.test_cfg.history must be one of {list(HISTORY)}, got {self.history!r}')
        self.use_mask_camera = use_mask_camera
        self.image_input = ImageInput.from_config(data_aug)
        self.img_backbone = build_encoder_part(img_backbone, BACKBONES, 'model.img_backbone')
        self.img_neck = build_encoder_part(img_neck, NECKS, 'model.img_neck')
        head = {key: test_cfg[key] for key in _HEAD_KEYS if key in test_cfg}
        head_cfg = hand_down(pts_bbox_head, _HEAD, head, 'model.test_cfg')
        self.pts_bbox_head = build_part(head_cfg, HEADS, _HEAD, self.task)
        auxiliary = build_auxiliary_losses(auxiliary_losses, self.pts_bbox_head.transformer.sizes)
        for name, loss in auxiliary.items():
            self.add_module(name, loss)
        self.auxiliary_losses = tuple(auxiliary.values())
        parts = self.image_input, self.img_backbone, self.img_neck
        self.encoder = ImageEncoder(*parts, self.task.num_frames, self.task.num_cameras, fuse=fuse_backbone)
        self._neck_cfg = dict(img_neck)
        self._register_load_state_dict_pre_hook(self._forget_weights)

    def check_parts(self):
        """Raise ConfigError unless backbone, neck and head fit together; leaves the former in evaluation mode."""
        sizes = self.pts_bbox_head.transformer.sizes
        if self.cuda_graph and self.pts_bbox_head.transformer.voxel_decoder.keep_threshold is not None:
            raise ConfigError(
                'model.test_cfg.cuda_graph replays work of one size, which transformer.keep_threshold makes vary; '
                'use one of them'
            )
        check_maps(self.img_backbone, self.img_neck, sizes.num_levels, sizes.embed_dims, self._neck_cfg)

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
            img: uint8 [B, T*N, 3, H, W] BGR.
            lidar2img: [B, T*N, 4, 4], LIDAR_TOP (metres) to pixels of that image.
            ego2lidar: [B, T*N, 4, 4], ego to LIDAR_TOP, both of the current keyframe, metres.
            img_metas: per sample a dict; ``frame_keys`` (T*N image names) is what the cache goes by.
            targets: labels of the batch on the device of ``img``; not needed for predictions. ``mask_camera`` is
                needed with ``use_mask_camera`` and otherwise not looked at.
            return_loss: losses if True, predictions if False.

        Returns:
            dict of scalar losses, to be summed; or per sample a dict of numpy arrays: sem_pred uint8 [1, K],
            occ_loc [1, K, 3] voxel indices and, for panoptic tasks, pano_inst int16 [1, K] and pano_sem
            uint8 [1, K].
        """
        self._check_images(img)
        if return_loss:
            return self.loss(img, lidar2img, ego2lidar, check_targets(targets, self.task, self.use_mask_camera))
        with torch.no_grad():
            return self.predict(img, lidar2img, ego2lidar, img_metas)

    def loss(self, img: Tensor, lidar2img: Tensor, ego2lidar: Tensor, targets: OccupancyTargets) -> Dict[str, Tensor]:
        """Every loss term by name; arguments as in :meth:`forward`."""
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
        features = self._features(img, lidar2img, ego2lidar, img_metas)
        merged = self.pts_bbox_head.predict(features, graphed=self.cuda_graph and not self.training)
        index_type = torch.uint8 if max(self.task.grid_shape) <= 256 else torch.int16
        return [sample.to_numpy(index_type) for sample in merged]

    def predict_raw(
        self, img: Tensor, lidar2img: Tensor, ego2lidar: Tensor, img_metas: Optional[Sequence[Mapping]] = None
    ) -> RawPrediction:
        """Intermediate results and labels; arguments as in :meth:`forward`.

        Call it under ``torch.no_grad()`` unless gradients are wanted; with gradients nothing comes from the cache.
        """
        features = self._features(img, lidar2img, ego2lidar, img_metas).in_order(self.task.num_cameras)
        output = self.pts_bbox_head(features)
        return RawPrediction(features, output, self.pts_bbox_head.merge(output))

    def _features(self, img, lidar2img, ego2lidar, img_metas) -> ImageFeatures:
        """What to predict from, with the history that the config asks for."""
        known_by = img_metas if self.history == 'cached' else None
        return self.encoder(img, lidar2img, ego2lidar, known_by, graphed=self.cuda_graph)

    def describe_speed(self) -> str:
        """One sentence on what, besides the precision, decides how fast inference at batch 1 is."""
        device = next(self.parameters()).device
        if device.type != 'cuda':
            return 'PyTorch operators'
        operators = ', '.join(compiled_operators(device)) or 'none (make build-ops)'
        return f'compiled operators: {operators}; CUDA graphs {"on" if self.cuda_graph else "off"}'

    def reset_history(self):
        """Forget the features of earlier frames."""
        self.encoder.cache.clear()

    def train(self, mode: bool = True):
        """Switch mode; leaving or entering training forgets the features of earlier frames."""
        self.reset_history()
        if mode != self.training:
            self._forget_weights()
        return super().train(mode)

    def _forget_weights(self, *_):
        """Drop everything that was made from the weights as they were."""
        self.encoder.forget_weights()
        self.pts_bbox_head.forget_weights()

    def _apply(self, fn, *args, **kwargs):
        """Move or convert the parameters; graphs and features hold the old ones."""
        self._forget_weights()
        return super()._apply(fn, *args, **kwargs)

    def _check_images(self, img: Tensor):
        frames, cameras = self.task.num_frames, self.task.num_cameras
        if img.dim() != 5 or img.shape[1] != frames * cameras:
            raise DataError(
                f'a batch of shape {tuple(img.shape)} does not hold the {frames * cameras} images per sample '
                f'({frames} frames x {cameras} cameras) of the task'
            )
