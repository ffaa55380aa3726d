"""The image encoder: backbone and neck, fused where they can be, over all frames or only over those not seen before.

Shapes: B batch, T frames newest first, N cameras, image index t*N + n, L pyramid levels, C channels.
"""

import contextlib
import functools
from typing import Hashable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from lib.errors import DataError
from models.csrc import autocast_dtype, has_triton
from models.csrc.msmv_sampling import GradientSum, select_frames
from models.cuda_graph import GraphedFunction
from models.encoder.feature_cache import FeatureCache, StoredFrames
from models.encoder.fused import FusedResNet, can_fuse_backbone, can_fuse_neck, run_neck, run_neck_again, run_neck_into
from models.encoder.image_input import ImageInput


class ImageFeatures(NamedTuple):
    """What a decoder can look at.

    maps         L tensors [B, T*N, H_l, W_l, C], channels last, image index t*N + n; S*N images of stored frames
                 where there is a frame_index
    ego2img      [B, T*N, 4, 4] float32, ego (metres) to pixels of the padded image
    image_size   (height, width) of the padded image, pixels
    frame_index  int64 [T], where frame t is among the stored frames; None: S = T, in order
    gradient_sum  in training, where the gradients of the maps are added up
    """

    maps: Sequence[Tensor]
    ego2img: Tensor
    image_size: Tuple[int, int]
    frame_index: Optional[Tensor] = None
    gradient_sum: Optional[GradientSum] = None

    def in_order(self, num_cameras: int) -> 'ImageFeatures':
        """The same without a frame_index, so that later steps, which write into stored maps, leave it alone."""
        if self.frame_index is None:
            return self
        return self._replace(maps=select_frames(self.maps, self.frame_index, num_cameras), frame_index=None)


class ImageEncoder:
    """Feature maps of the images of a batch; not a module, so that the parts are registered once, in the detector.

    Args:
        image_input: from uint8 images to the backbone's input.
        backbone, neck: as mmdet builds them.
        num_frames: T.
        num_cameras: N.
        fuse: compute what can be by ``FusedResNet`` and ``run_neck``; False runs the modules as they are.

    Attributes:
        cache: feature maps of frames seen before.
    """

    def __init__(
        self,
        image_input: ImageInput,
        backbone: nn.Module,
        neck: nn.Module,
        num_frames: int,
        num_cameras: int,
        fuse: bool = True,
    ):
        self.image_input, self.backbone, self.neck = image_input, backbone, neck
        self.num_frames, self.num_cameras, self.fuse = num_frames, num_cameras, fuse
        self.cache = FeatureCache(capacity=num_frames)
        self._fused_backbone = FusedResNet(backbone) if fuse and can_fuse_backbone(backbone) else None
        versions = self._backbone_version, self._last_version
        self._graphed = GraphedFunction(self._encode, 4, *versions)
        self._graphed_writing = GraphedFunction(self._write_maps, 4, *versions)
        self._writes: Optional[bool] = None  # see _can_write
        for part in (backbone, neck):  # the layout that the sampling reads
            part.to(memory_format=torch.channels_last)
        backbone.keeps_float32 = True  # folded in float32, see lib.run.numerics.convert_weights

    def __call__(
        self,
        img: Tensor,
        lidar2img: Tensor,
        ego2lidar: Tensor,
        img_metas: Optional[Sequence[Mapping]] = None,
        graphed: bool = False,
    ) -> ImageFeatures:
        """Features of every image of a batch; tensors as ``SparseOcc.forward`` takes them.

        Args:
            img_metas: with the ``frame_keys`` (T*N image names) of one sample at test time, the maps of frames seen
                before are found again and those of new ones kept. Otherwise every image is encoded. With ``given``
                (positions 0..T-1, ascending) ``img`` holds the images of these frames only; the rest was seen before.
            graphed: at test time, replay the encoder of one frame, or of all where all are encoded, as a CUDA graph.

        Raises:
            DataError: these are not the images of so many frames and cameras, or of a frame that is not given nothing
                is known.
        """
        given = img_metas[0].get('given') if img_metas and len(img) == 1 else None
        self._check_images(img, self.num_frames if given is None else len(given))
        keys = self._frame_keys(img, img_metas)
        if given is not None and keys is None:
            raise DataError(
                'a sample without all of its frames needs model.test_cfg.history="cached"; load whole samples'
            )
        stays = graphed and img.is_cuda and len(img) == 1 and self._is_testing()
        if keys is None and not stays:
            return self.with_gradient_sum(self._locate(self.encode(img), img, lidar2img, ego2lidar))
        maps, slots = self._fill(img) if keys is None else self._fetch(img, keys, given, graphed)
        # when the encoder is at work, so that the GPU does not wait for it
        features = self._locate([level.flatten(0, 1).unsqueeze(0) for level in maps], img, lidar2img, ego2lidar)
        return features._replace(frame_index=_index_on(img.device, tuple(slots)))

    def _fetch(self, img: Tensor, keys: Sequence[Tuple], given: Optional[Sequence[int]], graphed: bool):
        """``StoredFrames`` of one sample, those not seen before being encoded one at a time.

        Args:
            given: which of its frames the images are of; None: of all.
        """
        places = {t: i * self.num_cameras for i, t in enumerate(range(len(keys)) if given is None else given)}
        if self._writes is None or not graphed:  # a graph repeats what was captured, whatever hooks there are by now
            self._writes = self._can_write(img)
        writes = self._writes

        def frame(t: int) -> Tensor:
            if t not in places:
                raise DataError(f'features of the frame of {keys[t][0][0]} are not held any more; load whole samples')
            return img[:, places[t] : places[t] + self.num_cameras]

        with self._storing(img):
            return self.cache.fetch(
                keys,
                lambda t: [level[0] for level in self.encode(frame(t), graphed and not writes)],
                (lambda t, maps, slot: self._write(frame(t), maps, [slot], graphed)) if writes else None,
            )

    def _fill(self, img: Tensor) -> StoredFrames:
        """All frames of one sample, encoded together into memory that stays, where a graph of the head reads them."""
        frames = img.view((self.num_frames, self.num_cameras) + img.shape[2:])
        slots = list(range(self.num_frames))
        with self._storing(img):
            maps = self.cache.overwrite(
                lambda: [level.view((len(slots), -1) + level.shape[2:]) for level in self._encode(img)],
                lambda maps: self._can_write(img) and self._write(frames, maps, slots, graphed=True),
            )
        return StoredFrames(maps, slots)

    @contextlib.contextmanager
    def _storing(self, img: Tensor):
        """Frames of such images are stored inside."""
        setting = _setting(img)
        if self.cache.stored_as != setting:
            self.cache.stored_as = None
        yield
        self.cache.stored_as = setting

    def _write(self, frames: Tensor, maps: Sequence[Tensor], slots: Sequence[int], graphed: bool = False) -> bool:
        """Encode frames [F, N, 3, H, W] into their slots of the stored maps; False, and nothing done, if these are of
        other images. For images that :meth:`_can_write` holds for.

        The bits are those of :meth:`encode`, without the copies from its results.
        """
        if self.cache.stored_as is None:
            return False
        index = _index_on(frames.device, tuple(slots))
        if graphed:
            self._graphed_writing(frames, index, in_place=maps)
        else:
            self._write_maps(frames, index, *maps)
        return True

    def _can_write(self, img: Tensor) -> bool:
        return self.fuse and img.is_cuda and can_fuse_neck(self.neck) and has_triton(img.device)

    def _write_maps(self, frames: Tensor, slots: Tensor, *maps: Tensor) -> Tuple[()]:
        run_neck_into(self.neck, self._stages_of_given(frames.flatten(0, 1)), maps, slots)
        return ()

    def encode(self, img: Tensor, graphed: bool = False) -> List[Tensor]:
        """img uint8 [B, n, 3, H, W] BGR -> L feature maps [B, n, H_l, W_l, C], channels last."""
        one_frame = img.shape[:2] == (1, self.num_cameras)
        return self._graphed(img) if graphed and one_frame and self._is_testing() else self._encode(img)

    def forget_weights(self):
        """Drop everything that was made from the weights as they were."""
        self._graphed.clear()
        self._graphed_writing.clear()
        self._writes = None
        if self._fused_backbone is not None:
            self._fused_backbone.clear()
        self.cache.release()

    def prepare(self, img: Tensor) -> Tensor:
        """The backbone's input [B*T*N, 3, H', W'], for :meth:`features_of`; img as ``SparseOcc.forward`` takes it."""
        self._check_images(img, self.num_frames)
        return self.image_input(img.flatten(0, 1), samples=img.shape[0])

    def features_of(self, images: Tensor, lidar2img: Tensor, ego2lidar: Tensor) -> ImageFeatures:
        """Features, in a graph of training, of images that are prepared; matrices as ``SparseOcc.forward`` takes them.

        For :meth:`with_gradient_sum`. Where memory is saved, few images are encoded at a time, since in a graph more
        kernels cost nothing to launch, and the graph holds what the pass takes at its peak.
        """
        maps = self._maps_of(images, lidar2img.shape[0], few=self._saves_memory)
        return ImageFeatures(maps, _multiply(lidar2img, ego2lidar), tuple(images.shape[-2:]))

    def with_gradient_sum(self, features: ImageFeatures) -> ImageFeatures:
        """The same, with a sum of gradients where they have any."""
        if not features.maps[0].requires_grad:
            return features
        gradient_sum = GradientSum(features.maps, at_the_end=self._saves_memory)
        return features._replace(maps=gradient_sum.features, gradient_sum=gradient_sum)

    def constants(self) -> object:
        """What the encoder computes with beside its weights, for a graph that goes on reading it."""
        return None if self._fused_backbone is None else self._fused_backbone.constants()

    def _encode(self, img: Tensor) -> List[Tensor]:
        return self._maps_of(self.image_input(img.flatten(0, 1), samples=img.shape[0]), img.shape[0])

    def _maps_of(self, images: Tensor, batch: int, few: bool = False) -> List[Tensor]:
        """images [B*n, 3, H', W'], prepared -> L feature maps [B, n, H_l, W_l, C]; few: see ``pieces_of``."""
        pieces = [images] if self._fused_backbone is None else self._fused_backbone.pieces_of(images, few)
        del images
        of_pieces = [self._levels_of(pieces.pop(0)) for _ in range(len(pieces))]
        maps = of_pieces[0] if len(of_pieces) == 1 else [torch.cat(levels) for levels in zip(*of_pieces)]
        return [level.view((batch, -1) + level.shape[1:]) for level in maps]

    def _levels_of(self, images: Tensor) -> List[Tensor]:
        """images [m, 3, H', W'], prepared -> L feature maps [m, H_l, W_l, C]."""
        stages = self._stages_of(images)
        fuses = self.fuse and images.is_cuda and can_fuse_neck(self.neck)
        del images
        if fuses:
            saves = torch.is_grad_enabled() and self._saves_memory
            maps = run_neck_again(self.neck, stages) if saves else run_neck(self.neck, stages)
        else:
            maps = self.neck(stages)
        return [level.permute(0, 2, 3, 1).contiguous() for level in maps]

    def _stages_of(self, images: Tensor) -> List[Tensor]:
        """Of the backbone, from prepared images [n, 3, H', W']."""
        fused = self._fused_backbone
        if fused is not None and fused.serves(images):
            return list(fused(images))
        if fused is not None and torch.is_grad_enabled() and fused.serves_learning(images):
            return list(fused.learn(images))
        return list(self.backbone(images))

    def _stages_of_given(self, images: Tensor) -> List[Tensor]:
        """Of the backbone, at test time, from images uint8 [n, 3, H, W] BGR."""
        fused = self._fused_backbone
        if fused is not None and fused.takes_squares(self.image_input.padded_size(images.shape[-2:])):
            squares = self.image_input.as_squares(images)
            if squares is not None and fused.serves(squares):
                return list(fused(squares, in_squares=True))
        return self._stages_of(self.image_input(images))

    def _check_images(self, img: Tensor, num_frames: int):
        count = num_frames * self.num_cameras
        if img.dim() != 5 or img.shape[1] != count:
            raise DataError(
                f'a batch of shape {tuple(img.shape)} does not hold the {count} images per sample '
                f'({num_frames} frames x {self.num_cameras} cameras) of the task'
            )

    @property
    def _saves_memory(self) -> bool:
        """In training, at the cost of some time: the config checkpoints the backbone."""
        return bool(getattr(self.backbone, 'with_cp', False))

    def _is_testing(self) -> bool:
        return not (self.image_input.training or torch.is_grad_enabled())

    def _backbone_version(self) -> int:
        return 0 if self._fused_backbone is None else self._fused_backbone.version()

    def _last_version(self) -> int:
        return 0 if self._fused_backbone is None else self._fused_backbone.last_version

    def _frame_keys(self, img: Tensor, img_metas) -> Optional[List[Tuple[Tuple[str, ...], Hashable]]]:
        """A key per frame, or None where the cache cannot be used."""
        if img.shape[0] != 1 or not img_metas or not self._is_testing():
            return None
        names = img_metas[0].get('frame_keys')
        if not names:
            return None
        setting = _setting(img)
        return [(tuple(names[i : i + self.num_cameras]), setting) for i in range(0, len(names), self.num_cameras)]

    def _locate(self, maps: Sequence[Tensor], img: Tensor, lidar2img: Tensor, ego2lidar: Tensor) -> ImageFeatures:
        """Maps, and where their images look."""
        ego2img = _multiply(lidar2img, ego2lidar)
        return ImageFeatures(maps, ego2img, self.image_input.padded_size(img.shape[-2:]))


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Products float32 [..., 4, 4] of matrices, computed in float64."""
    if has_triton(left.device) and left.shape == right.shape and not torch.is_grad_enabled():
        from models.encoder.kernels import multiply_matrices  # needs Triton

        return multiply_matrices(left, right)
    return torch.matmul(left.double(), right.double()).float()


def _setting(img: Tensor) -> Hashable:
    """What, beside the images, the maps depend on."""
    return str(img.device), autocast_dtype(img.device.type), tuple(img.shape[-2:])


@functools.lru_cache(maxsize=64)
def _index_on(device: torch.device, numbers: Tuple[int, ...]) -> Tensor:
    """int64 tensor, kept: copying it to a GPU anew would wait for all work there. Not to be written to."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)
