"""From a pipeline's arrays to the tensors of a batch. B samples, T frames, N cameras, index = t*N + n."""
from typing import Dict, List, Sequence

import numpy as np
import torch

_STACKED = ('img', 'lidar2img', 'ego2lidar', 'voxel_semantics', 'voxel_instances', 'mask_camera')


def format_sample(sample: Dict) -> Dict:
    """Tensors and metadata of one sample.

    Returns:
        img uint8 [T*N, 3, H, W] (BGR), lidar2img float32 [T*N, 4, 4], ego2lidar float64 [T*N, 4, 4],
        img_metas (dict), and where labels were loaded voxel_semantics and voxel_instances uint8 [X, Y, Z],
        instance_class_ids int64 [n], mask_camera bool [X, Y, Z].
    """
    info = sample['info']
    images = np.stack(sample['img']).transpose(0, 3, 1, 2)
    formatted = dict(
        img=torch.from_numpy(np.ascontiguousarray(images)),
        lidar2img=torch.from_numpy(np.ascontiguousarray(sample['lidar2img'], dtype=np.float32)),
        ego2lidar=torch.from_numpy(np.ascontiguousarray(sample['ego2lidar'], dtype=np.float64)),
        img_metas=dict(sample_token=info['token'], scene_token=info.get('scene_token'),
                       scene_name=info.get('scene_name'), index=sample['index'],
                       frame_keys=sample['frame_keys']))
    for key in ('voxel_semantics', 'voxel_instances', 'mask_camera', 'instance_class_ids'):
        if key in sample:
            formatted[key] = torch.from_numpy(np.ascontiguousarray(sample[key]))
    return formatted


def collate(samples: Sequence[Dict]) -> Dict:
    """Batch of B samples.

    Returns:
        The samples' tensors stacked to [B, ...]; ``img_metas`` and ``instance_class_ids`` as lists of B. A
        key that only some of the samples have (``mask_camera``) is left out.
    """
    batch = {key: torch.stack([sample[key] for sample in samples])
             for key in _STACKED if all(key in sample for sample in samples)}
    batch['img_metas'] = [sample['img_metas'] for sample in samples]
    if all('instance_class_ids' in sample for sample in samples):
        class_ids: List[torch.Tensor] = [sample['instance_class_ids'] for sample in samples]
        batch['instance_class_ids'] = class_ids
    return batch
