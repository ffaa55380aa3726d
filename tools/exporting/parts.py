"""The two parts that are exported, as modules of tensors in and tensors out.

Shapes: T frames newest first, N cameras, L pyramid levels, C channels, Q mask queries, K kept voxels. Batch 1.
A runtime encodes each frame's images once, keeps the maps of the last T - 1 frames, and gives them to the decoders.
"""

from typing import Dict, List, Tuple

import torch
from torch import Tensor, nn

from models.encoder import ImageFeatures


class Encoder(nn.Module):
    """Images of one frame to feature maps: normalisation, padding, backbone, neck.

    Args:
        model: ``SparseOcc`` in evaluation mode.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.parts = nn.ModuleList([model.image_input, model.img_backbone, model.img_neck])
        self._encode, self._task = model.encoder.encode, model.task
        self._levels = model.img_neck.num_outs
        self.eval()

    def forward(self, img: Tensor) -> Tuple[Tensor, ...]:
        """img uint8 [1, N, 3, H, W] BGR -> L maps float32 [1, N, H_l, W_l, C]."""
        return tuple(self._encode(img))

    def example(self) -> Dict[str, Tensor]:
        """Inputs by name, of the right shapes and types."""
        shape = (1, self._task.num_cameras, 3) + tuple(self._task.image_size)
        generator = torch.Generator().manual_seed(0)
        return dict(img=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))

    def output_names(self) -> List[str]:
        return [f'map_{level}' for level in range(self._levels)]


class Decoders(nn.Module):
    """Feature maps of all frames to occupancy: both decoders and the merging of their predictions.

    Args:
        model: ``SparseOcc`` in evaluation mode.
        maps: what the encoder makes of one frame, for their number and shapes.
    """

    def __init__(self, model: nn.Module, maps: Tuple[Tensor, ...]):
        super().__init__()
        self.head, self._task = model.pts_bbox_head, model.task
        self._image_size = model.image_input.padded_size(model.task.image_size)
        self._maps = maps
        self.eval()

    def forward(self, ego2img: Tensor, *maps: Tensor) -> Tuple[Tensor, ...]:
        """ego2img float32 [1, T*N, 4, 4]; L maps of now [1, N, ...]; for T > 1, L of earlier frames [1, (T-1)*N, ...].

        Returns:
            voxels int32 [K, 3] indices; semantics uint8 [K] class ids; of panoptic models instances int16 [K] and
            pano_semantics uint8 [K]; class_logits float32 [1, Q, classes], mask_logits float32 [1, Q, K].
        """
        levels = len(self._maps)
        joined = [torch.cat(maps[level::levels], dim=1) for level in range(levels)]
        output = self.head(ImageFeatures(joined, ego2img, self._image_size))
        merged, last = self.head.merge(output)[0], output.layers[-1]
        labels = [label for label in merged[1:] if label is not None]
        return (merged.voxels.to(torch.int32), *labels, last.class_logits, last.mask_logits)

    def example(self) -> Dict[str, Tensor]:
        """Inputs by name: calibration and motion of ``tools.synthetic``, maps of now, noisy earlier ones."""
        from tools.synthetic import synthetic_calibration

        lidar2img, ego2lidar = synthetic_calibration(self._task)
        matrices = torch.as_tensor(lidar2img).double() @ torch.as_tensor(ego2lidar).double()
        inputs = dict(ego2img=matrices.float().reshape(1, -1, 4, 4))
        inputs.update({f'map_{level}': value for level, value in enumerate(self._maps)})
        generator, earlier = torch.Generator().manual_seed(0), self._task.num_frames - 1
        for level, value in enumerate(self._maps if earlier else ()):
            repeated = value.repeat(1, earlier, 1, 1, 1)
            noise = torch.randn(repeated.shape, generator=generator)
            inputs[f'history_{level}'] = repeated + 0.1 * value.std() * noise
        return inputs

    def output_names(self) -> List[str]:
        labels = ['instances', 'pano_semantics'] if self._task.panoptic else []
        return ['voxels', 'semantics', *labels, 'class_logits', 'mask_logits']
