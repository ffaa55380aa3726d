"""The image encoder: backbone and neck, fused where they can be, over all frames or only over those not seen before.

Shapes: B batch, T frames newest first, N cameras, image index t*N + n, L pyramid levels, C channels.
"""

import contextlib
import functools
from typing import Callable, Hashable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from lib.errors import DataError
from models.csrc import autocast_dtype, has_triton
from models.csrc.msmv_sampling import GradientSum, select_frames
from models.cuda_graph import GraphedFunction, GraphMemory
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


class Arrival(NamedTuple):
    """One sample whose last frames are still to be encoded into the stored maps.

    maps        L tensors [S, N, H_l, W_l, C], always the same memory
    frames      uint8 [F, N, 3, H, W] BGR, or None where nothing is missing
    places      int64 [F + T], slots 0..S-1 where these go, then those of the sample's frames
    image_size  (height, width) of the padded image, pixels
    """

    maps: Sequence[Tensor]
    frames: Optional[Tensor]
    places: Tensor
    image_size: Tuple[int, int]


class ImageEncoder:
    """Feature maps of the images of a batch; not a module, so that the parts are registered once, in the detector.

    Args:
        image_input: from uint8 images to the backbone's input.
        backbone, neck: as mmdet builds them.
        num_frames: T.
        num_cameras: N.
        fuse: compute what can be by ``FusedResNet`` and ``run_neck``; False runs the modules as they are.
        memory: of its graphs.

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
        memory: Optional[GraphMemory] = None,
    ):
        self.image_input, self.backbone, self.neck = image_input, backbone, neck
        self.num_frames, self.num_cameras, self.fuse = num_frames, num_cameras, fuse
        self.cache = FeatureCache(capacity=num_frames)
        self._fused_backbone = FusedResNet(backbone) if fuse and can_fuse_backbone(backbone) else None
        self._graphed = GraphedFunction(self._encode, 4, self.version, self.last_version, memory)
        self._graphed_writing = GraphedFunction(self._write_maps, 4, self.version, self.last_version, memory)
        self._writes: Optional[bool] = None  # see _can_write
        for part in (backbone, neck):  # the layout that the sampling reads
            part.to(memory_format=torch.channels_last)
        backbone.convert_for_inference = self._convert_backbone  # for lib.run.numerics.convert_weights

    def __call__(
        self, img: Tensor, lidar2img: Tensor, ego2lidar: Tensor, img_metas: Optional[Sequence[Mapping]] = None
    ) -> ImageFeatures:
        """Features of every image of a batch; tensors as ``SparseOcc.forward`` takes them.

        Args:
            img_metas: with the ``frame_keys`` (T*N image names) of one sample at test time, the maps of frames seen
                before are found again and those of new ones kept. Otherwise every image is encoded. With ``given``
                (positions 0..T-1, ascending) ``img`` holds the images of these frames only; the rest was seen before.

        Raises:
            DataError: these are not the images of so many frames and cameras, or of a frame that is not given nothing
                is known.
        """
        keys, given = self._keys_of(img, img_metas)
        if keys is None:
            return self.with_gradient_sum(self._locate(self.encode(img), img, lidar2img, ego2lidar))
        self._writes = self._can_write(img)
        maps, slots = self._fetch(img, keys, given, self._write_now, False)
        features = self._locate(_as_sample(maps), img, lidar2img, ego2lidar)
        return features._replace(frame_index=_index_on(img.device, tuple(slots)))

    def can_replay(self, img: Tensor) -> bool:
        """Whether :meth:`arriving` serves: one sample, on a GPU, at test time."""
        return img.is_cuda and len(img) == 1 and self._is_testing()

    @contextlib.contextmanager
    def arriving(self, img: Tensor, img_metas: Optional[Sequence[Mapping]] = None):
        """Gives the ``Arrival`` of a sample; inside, :meth:`receive` is to follow, perhaps as part of a CUDA graph.

        The features' bits are those that a call of the encoder gives.

        Args:
            img, img_metas: as in a call.

        Raises:
            DataError: as there. All frames are forgotten where anything fails.
        """
        succeeds = False
        try:
            yield self._arrive(img, img_metas)
            succeeds = True
        finally:
            if not succeeds:
                self.cache.clear()

    def _arrive(self, img: Tensor, img_metas: Optional[Sequence[Mapping]]) -> Arrival:
        keys, given = self._keys_of(img, img_metas)
        if self._writes is None:  # a graph repeats what was captured, whatever hooks there are by now
            self._writes = self._can_write(img)
        late: List[Tuple[Tensor, List[int]]] = []  # frames to be encoded, and their slots

        def write(frames: Tensor, maps: Sequence[Tensor], slots: List[int]) -> None:
            if late:
                earlier, places = late.pop()
                self._graphed_writing(earlier, _index_on(img.device, tuple(places)), in_place=maps)
            late.append((frames, slots))

        maps, own = self._fill(img, write) if keys is None else self._fetch(img, keys, given, write, True)
        frames, slots = late[0] if late else (None, [])
        size = self.image_input.padded_size(img.shape[-2:])
        return Arrival(maps, frames, _index_on(img.device, (*slots, *own)), size)

    def receive(self, arrival: Arrival, lidar2img: Tensor, ego2lidar: Tensor) -> ImageFeatures:
        """Features of the sample, after its last frames have been encoded."""
        maps, frames, places, image_size = arrival
        late = len(places) - self.num_frames
        if frames is not None:
            self._write_maps(frames, places[:late], *maps)
        return ImageFeatures(_as_sample(maps), _multiply(lidar2img, ego2lidar), image_size, places[late:])

    def _fetch(
        self, img: Tensor, keys: Sequence[Tuple], given: Optional[Sequence[int]], write: Callable, graphed: bool
    ):
        """``StoredFrames`` of one sample, those not seen before being encoded one at a time.

        Args:
            given: which of its frames the images are of; None: of all.
            write: is to encode frames [F, N, 3, H, W] into the slots of maps, its arguments, if that is possible.
        """
        places = {t: i * self.num_cameras for i, t in enumerate(range(len(keys)) if given is None else given)}

        def frame(t: int) -> Tensor:
            if t not in places:
                raise DataError(f'features of the frame of {keys[t][0][0]} are not held any more; load whole samples')
            return img[:, places[t] : places[t] + self.num_cameras]

        def write_one(t: int, maps: Sequence[Tensor], slot: int) -> bool:
            if not self._can_write_into_stored():
                return False
            write(frame(t), maps, [slot])
            return True

        with self._storing(img):
            return self.cache.fetch(
                keys, lambda t: [level[0] for level in self.encode(frame(t), graphed and not self._writes)], write_one
            )

    def _fill(self, img: Tensor, write: Callable) -> StoredFrames:
        """All frames of one sample in memory that stays, where a graph reads them; write: as in :meth:`_fetch`."""
        frames = img.view((self.num_frames, self.num_cameras) + img.shape[2:])
        slots = list(range(self.num_frames))

        def write_all(maps: Sequence[Tensor]) -> bool:
            if not self._can_write_into_stored():
                return False
            write(frames, maps, slots)
            return True

        with self._storing(img):
            maps = self.cache.overwrite(
                lambda: [level.view((len(slots), -1) + level.shape[2:]) for level in self._encode(img)], write_all
            )
        return StoredFrames(maps, slots)

    def _keys_of(self, img: Tensor, img_metas: Optional[Sequence[Mapping]]):
        """``_frame_keys``, and positions of the frames that are given, None: of all; after checks."""
        given = img_metas[0].get('given') if img_metas and len(img) == 1 else None
        self._check_images(img, self.num_frames if given is None else len(given))
        keys = self._frame_keys(img, img_metas)
        if given is not None and keys is None:
            raise DataError(
                'a sample without all of its frames needs model.test_cfg.history="cached"; load whole samples'
            )
        return keys, given

    @contextlib.contextmanager
    def _storing(self, img: Tensor):
        """Frames of such images are stored inside."""
        setting = _setting(img)
        if self.cache.stored_as != setting:
            self.cache.stored_as = None
        yield
        self.cache.stored_as = setting

    def _write_now(self, frames: Tensor, maps: Sequence[Tensor], slots: Sequence[int]) -> None:
        self._write_maps(frames, _index_on(frames.device, tuple(slots)), *maps)

    def _can_write(self, img: Tensor) -> bool:
        return self.fuse and img.is_cuda and can_fuse_neck(self.neck) and has_triton(img.device)

    def _can_write_into_stored(self) -> bool:
        """Whether :meth:`_write_maps` does, and the stored maps are of such images."""
        return bool(self._writes) and self.cache.stored_as is not None

    def _write_maps(self, frames: Tensor, slots: Tensor, *maps: Tensor) -> Tuple[()]:
        """Encode frames [F, N, 3, H, W] into their slots, int64 [F], of the stored maps, where :meth:`_can_write`
        holds. The bits are those of :meth:`encode`, without the copies from its results."""
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
        """Features, in training, of images that are prepared; matrices as ``SparseOcc.forward`` takes them.

        For :meth:`with_gradient_sum`.
        """
        ego2img = _multiply(lidar2img, ego2lidar)
        return ImageFeatures(self._maps_of(images, lidar2img.shape[0]), ego2img, tuple(images.shape[-2:]))

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

    def _maps_of(self, images: Tensor, batch: int) -> List[Tensor]:
        """images [B*n, 3, H', W'], prepared -> L feature maps [B, n, H_l, W_l, C]."""
        pieces = [images] if self._fused_backbone is None else self._fused_backbone.pieces_of(images)
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

    def _convert_backbone(self, dtype: torch.dtype) -> None:
        """Norms are folded into float32, so that without ``FusedResNet`` nothing is converted."""
        if self._fused_backbone is not None:
            self._fused_backbone.fold_in_place(dtype)

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

    def version(self) -> int:
        """Another number whenever a weight has changed that something was made of, which is forgotten then."""
        return 0 if self._fused_backbone is None else self._fused_backbone.version()

    def last_version(self) -> int:
        """What :meth:`version` told last, without looking; another number when something was dropped since."""
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


def _as_sample(maps: Sequence[Tensor]) -> List[Tensor]:
    """Stored maps [S, N, H, W, C] -> [1, S*N, H, W, C], as ``ImageFeatures`` has them."""
    return [level.flatten(0, 1).unsqueeze(0) for level in maps]


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
