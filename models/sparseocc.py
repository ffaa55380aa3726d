"""The detector: images and calibration in, losses or sparse occupancy out.

Shapes: B batch, T frames newest first, N cameras, image index t*N + n; X, Y, Z the grid.
"""

import functools
from dataclasses import dataclass, replace
from typing import Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from mmcv.runner import BaseModule
from mmdet.models.builder import DETECTORS, build_backbone, build_head, build_neck
from torch import Tensor

from lib.errors import ConfigError, DataError
from lib.targets import OccupancyTargets
from lib.task import Task
from models.autocast_state import autocast_dtype
from models.csrc.extension import compiled_operators
from models.csrc.msmv_sampling import select_frames
from models.cuda_graph import GraphedFunction
from models.feature_cache import FeatureCache
from models.heads.sparseocc_head import MergedPrediction
from models.image_input import ImageInput
from models.layers.fused_fpn import can_fuse_neck, run_neck
from models.layers.fused_resnet import FusedResNet, can_fuse
from models.sampling import ImageFeatures
from models.transformer import TransformerOutput

HISTORY = ('full', 'cached')
_TEST_KEYS = ('history', 'draws', 'merge_stuff', 'overlap_threshold', 'score_threshold', 'cuda_graph')


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
        test_cfg: history ('cached' keeps the features of earlier frames between calls with batch 1, 'full'
            encodes all frames of every sample), draws ('even' or 'random'), merge_stuff ('published' or
            'labelled'), overlap_threshold, score_threshold, cuda_graph (replay the encoder of one frame
            and the head as CUDA graphs at batch 1: the same numbers sooner, for more memory; off by default).
        fuse_backbone: on a GPU, compute a ResNet with fixed norm statistics by ``FusedResNet``: the same but for
            rounding, sooner and in less memory; at inference a plain FPN by ``run_neck`` as well. False runs mmdet's
            modules as they are.
        train_cfg, pretrained: accepted for mmdet's builders; must be None.
    """

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
    ):
        super().__init__()
        if train_cfg is not None or pretrained is not None:
            raise ConfigError(
                'model.train_cfg and model.pretrained are not used; remove them (weights to '
                'start from are given by load_from)'
            )
        self.task = task if isinstance(task, Task) else Task.from_config(task)
        test_cfg = _checked_test_cfg(test_cfg or {})
        self.history = test_cfg.pop('history', 'full')
        self.cuda_graph = bool(test_cfg.pop('cuda_graph', False))
        self.use_mask_camera = use_mask_camera
        self.image_input = ImageInput.from_config(data_aug)
        self.img_backbone = build_backbone(dict(img_backbone))
        self.img_neck = build_neck(dict(img_neck))
        self.pts_bbox_head = build_head(dict(pts_bbox_head, task=self.task, **test_cfg))
        for part in (self.img_backbone, self.img_neck):  # the layout that the sampling reads
            part.to(memory_format=torch.channels_last)
        self._cache = FeatureCache(capacity=self.task.num_frames)
        fuses = fuse_backbone and can_fuse(self.img_backbone)
        self._fused_backbone = FusedResNet(self.img_backbone) if fuses else None
        self.img_backbone.keeps_float32 = True  # folded in float32, see lib.run.numerics.convert_weights
        self._fuses_neck = fuse_backbone
        self._graphed_encoder = GraphedFunction(self._encode, state=self._backbone_version)
        self._graphed_head = GraphedFunction(self._predict_from_tensors, max_graphs=2)
        self._register_load_state_dict_pre_hook(self._forget_weights)

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
            return self.loss(img, lidar2img, ego2lidar, self._checked_targets(targets))
        with torch.no_grad():
            return self.predict(img, lidar2img, ego2lidar, img_metas)

    def loss(self, img: Tensor, lidar2img: Tensor, ego2lidar: Tensor, targets: OccupancyTargets):
        """Every loss term by name; arguments as in :meth:`forward`."""
        features = self._features(self.extract_features(img), img, lidar2img, ego2lidar)
        return self.pts_bbox_head.loss(self.pts_bbox_head(features), targets)

    def predict(
        self, img: Tensor, lidar2img: Tensor, ego2lidar: Tensor, img_metas: Optional[Sequence[Mapping]] = None
    ) -> List[Dict[str, np.ndarray]]:
        """Predictions per sample; arguments and result as in :meth:`forward`."""
        if self.cuda_graph and img.shape[0] == 1 and img.is_cuda and not self.training:
            merged = [self._predict_by_graph(self._test_features(img, lidar2img, ego2lidar, img_metas))]
        else:
            features = self._test_features(img, lidar2img, ego2lidar, img_metas)
            merged = self.pts_bbox_head.merge(self.pts_bbox_head(features))
        return [self._to_numpy(sample) for sample in merged]

    def predict_raw(
        self, img: Tensor, lidar2img: Tensor, ego2lidar: Tensor, img_metas: Optional[Sequence[Mapping]] = None
    ) -> RawPrediction:
        """Intermediate results and labels; arguments as in :meth:`forward`.

        Call it under ``torch.no_grad()`` unless gradients are wanted; with gradients nothing comes from the cache.
        """
        features = self._test_features(img, lidar2img, ego2lidar, img_metas)
        if features.frame_index is not None:  # later steps write into the maps of the cache
            maps = select_frames(features.maps, features.frame_index, self.task.num_cameras)
            features = features._replace(maps=maps, frame_index=None)
        output = self.pts_bbox_head(features)
        return RawPrediction(features, output, self.pts_bbox_head.merge(output))

    def extract_features(self, img: Tensor) -> List[Tensor]:
        """img uint8 [B, n, 3, H, W] BGR -> L feature maps [B, n, H_l, W_l, C], channels last."""
        one_frame = img.shape[:2] == (1, self.task.num_cameras)
        if self.cuda_graph and one_frame and not self.training and not torch.is_grad_enabled():
            return self._graphed_encoder(img)
        return self._encode(img)

    def _encode(self, img: Tensor) -> List[Tensor]:
        batch, count = img.shape[:2]
        images = self.image_input(img.flatten(0, 1), samples=batch)
        fused = self._fused_backbone
        stages = fused(images) if fused is not None and fused.serves(images) else self.img_backbone(images)
        fuses_neck = (
            self._fuses_neck and images.is_cuda and not torch.is_grad_enabled() and can_fuse_neck(self.img_neck)
        )
        maps = run_neck(self.img_neck, stages) if fuses_neck else self.img_neck(stages)
        maps = [level.permute(0, 2, 3, 1).contiguous() for level in maps]
        return [level.view((batch, count) + level.shape[1:]) for level in maps]

    def _backbone_version(self) -> int:
        return 0 if self._fused_backbone is None else self._fused_backbone.version()

    def _predict_by_graph(self, features: ImageFeatures) -> MergedPrediction:
        """Labels of one sample. The cache's maps stay where they are, so the graph reads them there."""
        self._graphed_image_size = features.image_size
        if features.frame_index is None:
            return MergedPrediction(*self._graphed_head(features.ego2img, *features.maps))
        return MergedPrediction(*self._graphed_head(features.ego2img, features.frame_index, in_place=features.maps))

    def _predict_from_tensors(self, ego2img: Tensor, *others: Tensor) -> List[Tensor]:
        """Labels of one sample, as the fields of ``MergedPrediction`` that the task has.

        Args:
            ego2img: [1, T*N, 4, 4].
            others: frame_index if there is one, then the L maps.
        """
        frame_index = others[0] if others[0].dim() == 1 else None
        maps = others if frame_index is None else others[1:]
        features = ImageFeatures(list(maps), ego2img, self._graphed_image_size, frame_index)
        merged = self.pts_bbox_head.merge(self.pts_bbox_head(features))[0]
        return [
            part for part in (merged.voxels, merged.semantics, merged.pano_inst, merged.pano_sem) if part is not None
        ]

    def describe_speed(self) -> str:
        """One sentence on what, besides the precision, decides how fast inference at batch 1 is."""
        device = next(self.parameters()).device
        if device.type != 'cuda':
            return 'PyTorch operators'
        operators = compiled_operators(device)
        return 'compiled operators: {}; CUDA graphs {}'.format(
            ', '.join(operators) if operators else 'none (make build-ops)', 'on' if self.cuda_graph else 'off'
        )

    def reset_history(self):
        """Forget the features of earlier frames."""
        self._cache.clear()

    def train(self, mode: bool = True):
        """Switch mode; leaving or entering training forgets the features of earlier frames."""
        self.reset_history()
        if mode != self.training:
            self._forget_weights()
        return super().train(mode)

    def _forget_weights(self, *_):
        """Drop everything that was made from the weights as they were."""
        self._graphed_encoder.clear()
        self._graphed_head.clear()
        if self._fused_backbone is not None:
            self._fused_backbone.clear()
        self._cache.release()

    def _apply(self, fn, *args, **kwargs):
        """Move or convert the parameters; graphs and features hold the old ones."""
        self._forget_weights()
        return super()._apply(fn, *args, **kwargs)

    def _test_features(
        self, img: Tensor, lidar2img: Tensor, ego2lidar: Tensor, img_metas: Optional[Sequence[Mapping]]
    ) -> ImageFeatures:
        """Features of all frames; those of frames seen before come from the cache if it may be used."""
        keys = self._frame_keys(img, img_metas)
        if keys is None:
            return self._features(self.extract_features(img), img, lidar2img, ego2lidar)
        features = self._features([], img, lidar2img, ego2lidar)  # first, so that the GPU need not wait for it later
        frames = img.view((len(keys), -1) + img.shape[2:])
        stored = self._cache.fetch(keys, lambda t: [level[0] for level in self.extract_features(frames[t : t + 1])])
        return features._replace(
            maps=[level.flatten(0, 1).unsqueeze(0) for level in stored.maps],
            frame_index=_index_on(img.device, tuple(stored.slots)),
        )

    def _frame_keys(self, img: Tensor, img_metas) -> Optional[List]:
        """A key per frame, or None where the cache cannot be used: batch above 1, no keys, training, gradients."""
        if self.history != 'cached' or self.training or img.shape[0] != 1 or not img_metas:
            return None
        if torch.is_grad_enabled():
            return None
        names = img_metas[0].get('frame_keys')
        if not names:
            return None
        cameras = self.task.num_cameras
        setting = (str(img.device), autocast_dtype(img.device.type), tuple(img.shape[-2:]))
        return [(tuple(names[i : i + cameras]), setting) for i in range(0, len(names), cameras)]

    def _features(self, maps: List[Tensor], img: Tensor, lidar2img: Tensor, ego2lidar: Tensor) -> ImageFeatures:
        ego2img = torch.matmul(lidar2img.double(), ego2lidar.double()).float()
        return ImageFeatures(maps, ego2img, self.image_input.padded_size(img.shape[-2:]))

    def _check_images(self, img: Tensor):
        expected = self.task.num_frames * self.task.num_cameras
        if img.dim() != 5 or img.shape[1] != expected:
            raise DataError(
                'a batch of shape %s does not hold the %d images per sample (%d frames x %d '
                'cameras) of the task' % (tuple(img.shape), expected, self.task.num_frames, self.task.num_cameras)
            )

    def _checked_targets(self, targets: Optional[OccupancyTargets]) -> OccupancyTargets:
        """The labels as the losses want them: complete, of the task's grid, with a mask only if it is to be used."""
        if targets is None or any(
            value is None for value in (targets.voxel_semantics, targets.voxel_instances, targets.instance_class_ids)
        ):
            raise DataError(
                'the batch has no labels, which training needs; put LoadOccGTFromFile into the pipeline of data.train'
            )
        shape = tuple(targets.voxel_semantics.shape[1:])
        if shape != self.task.grid_shape:
            raise DataError(
                f'the labels have {shape} voxels, the task has {self.task.grid_shape}; give labels made for '
                'task.point_cloud_range and task.voxel_size'
            )
        if not self.use_mask_camera:
            return replace(targets, mask_camera=None)
        if targets.mask_camera is None:
            raise DataError(
                'model.use_mask_camera is set, but the label files have no mask_camera; use '
                'labels that have it or set model.use_mask_camera=False'
            )
        return targets

    def _to_numpy(self, merged: MergedPrediction) -> Dict[str, np.ndarray]:
        index_type = torch.uint8 if max(self.task.grid_shape) <= 256 else torch.int16
        arrays = dict(
            sem_pred=merged.semantics,
            occ_loc=merged.voxels.to(index_type),
            pano_inst=merged.pano_inst,
            pano_sem=merged.pano_sem,
        )
        return {name: value.unsqueeze(0).cpu().numpy() for name, value in arrays.items() if value is not None}


@functools.lru_cache(maxsize=64)
def _index_on(device: torch.device, numbers: Tuple[int, ...]) -> Tensor:
    """int64 tensor, kept: copying it to a GPU anew would wait for all work there. Not to be written to."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


def _checked_test_cfg(test_cfg: Mapping) -> Dict:
    test_cfg = dict(test_cfg)
    unknown = set(test_cfg) - set(_TEST_KEYS)
    if unknown:
        raise ConfigError(f'model.test_cfg: unknown keys {sorted(unknown)}; the keys are {list(_TEST_KEYS)}')
    if test_cfg.get('history', 'full') not in HISTORY:
        raise ConfigError(
            'model.test_cfg.history must be one of {}, got {!r}'.format(list(HISTORY), test_cfg['history'])
        )
    return test_cfg
