"""The predictor: a trained model that takes images and calibration, from any thread.

from sparseocc import Frame, SparseOccPredictor

predictor = SparseOccPredictor('configs/r50_nuimg_704x256_8f_v1.1.py', 'weights.pth', amp='fp16')
occupancy = predictor.predict({'CAM_FRONT': 'front.jpg', 'CAM_BACK': array}, cameras)   # one moment
occupancy = predictor.predict([Frame(images, seconds, ego2global), ...], cameras)       # with those before it
several = predictor.predict_batch([images, images], cameras)                            # independent samples
for occupancy in predictor.predict_file('my_data.json'): ...                            # docs/own_data.md
stream = predictor.stream(cameras)                                                      # frame by frame
occupancy = stream.push(images, seconds, ego2global)
"""

import itertools
import os
import tempfile
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import torch

from lib.config import load_config
from lib.errors import DataError
from lib.io import save_pickle
from lib.run import read_task
from lib.run.evaluation import begin, finish_in_order, load_for_inference, predict
from lib.run.loading import read_in_order
from lib.run.numerics import convert_weights
from lib.run.processes import pick_device
from lib.task import Task
from loaders import build_dataset, collate
from loaders.own_data import read_own_data
from models import build_model
from models.encoder.feature_cache import FeatureCache

from .cameras import Calibration, Cameras, Frame, FrameReader, Image, Moment, choose_history, make_sample, read_cameras
from .occupancy import Occupancy
from .stream import OccupancyStream

KEYFRAME_SECONDS = 0.5  # between the frames that released models learned from
Sample = Union[Frame, Mapping[str, Image], Sequence[Frame]]


class SparseOccPredictor:
    """A model with its weights on a device.

    Every method may be called from several threads; the model works for one of them at a time.

    Args:
        config: config file of the model, or a config as ``load_config`` gives it.
        weights: checkpoint of that model.
        device: 'cuda' or 'cpu'; None takes a GPU if there is one.
        amp: 'fp16' or 'bf16' to compute in half precision; None computes in float32.
        override: changes of the config, ``['key=value', ...]``.
        tf32: 'on' or 'off'; None leaves PyTorch's settings.
        trust_weights: let the checkpoint run code when it is opened; for known sources only.
        rgb: image arrays are RGB; by default BGR, as OpenCV reads them. Files need no such word.

    Attributes:
        config: the whole config.
        task: classes, range, grid, frames and the cameras that the config names (one's own may be others).
        device: ``torch.device``.

    Raises:
        UserError: the config, the weights or the device cannot be used; the text says what to do.
    """

    def __init__(
        self,
        config,
        weights: Optional[str],
        device: Optional[str] = None,
        amp: Optional[str] = None,
        override: Sequence[str] = (),
        tf32: Optional[str] = None,
        trust_weights: bool = False,
        rgb: bool = False,
    ):
        is_file = isinstance(config, (str, os.PathLike))
        self.config = load_config(os.fspath(config), list(override)) if is_file else config
        self.task, self.device, self.amp = read_task(self.config), pick_device(device), amp
        wanted = SimpleNamespace(weights=weights, trust_weights=trust_weights, amp=amp, tf32=tf32)
        model, _ = load_for_inference(build_model, self.config, self.task, wanted, self.device)
        self._models = {self.task.num_cameras: model}
        self._reader = FrameReader(self.config.data.test.pipeline, self.task, rgb)
        name = os.fspath(config) if is_file else getattr(config, 'filename', None)
        self._source = dict(config=name, weights=weights, override=list(override))
        self._lock = threading.RLock()
        self._numbers = itertools.count()  # identities of images

    def predict(self, sample: Sample, cameras: Cameras, name: Optional[str] = None) -> Occupancy:
        """Occupancy of one moment.

        Args:
            sample: the images of the moment by camera name, or a ``Frame``; or frames, of which the latest is
                predicted and the model looks back at the others as far as it needs (about half a second apart).
            cameras: calibration of every camera, see ``read_cameras``.
            name: of the result and its file; None takes the frame's time.

        Raises:
            DataError: an image, a pose or a calibration cannot be used.
        """
        return self.predict_batch([sample], cameras, None if name is None else [name])[0]

    def predict_batch(
        self, samples: Sequence[Sample], cameras: Cameras, names: Optional[Sequence[str]] = None
    ) -> List[Occupancy]:
        """Occupancy of several moments that have nothing to do with one another, computed together.

        Args:
            samples: each as :meth:`predict` takes one.
            cameras: calibration, the same for all.
            names: of the results.

        Raises:
            DataError: an image, a pose or a calibration cannot be used, or there are not as many names as samples.
        """
        if names is not None and len(names) != len(samples):
            raise DataError(f'{len(samples)} samples cannot be given {len(names)} names; give one each')
        if not samples:
            return []
        calibration = read_cameras(cameras)
        moments = [self._moments(sample, calibration) for sample in samples]
        return self.predict_moments(moments, tuple(calibration), names)

    def predict_moments(
        self,
        samples: Sequence[Sequence[Moment]],
        cameras: Tuple[str, ...],
        names: Optional[Sequence[str]] = None,
        cache: Any = None,
    ) -> List[Occupancy]:
        """Occupancy of samples that were read before: per sample T moments, newest first.

        Args:
            cameras: names, in the order of the moments' images.
            names: of the results; None takes the times.
            cache: where the features of earlier moments are kept (``FeatureCache``); None: in the model's own.
        """
        with self._lock:
            keeps_frames = len(samples) == 1 and cache is not None and self._model_for(len(cameras)).keeps_frames
        held = [names for names, _ in cache.held] if keeps_frames else None
        batch = collate([make_sample(moments, cameras, held) for moments in samples])
        arrays = self._run(batch, len(cameras), cache, predict)
        task = replace(self.task, cameras=cameras)
        source = dict(self._source, override=[*self._source['override'], f'task.cameras={list(cameras)!r}'])
        names = names or [f'{round(moments[0].seconds * 1e6):d}' for moments in samples]
        return [
            Occupancy(prediction, task, name, moments[0].seconds, source)
            for prediction, name, moments in zip(arrays, names, samples)
        ]

    def predict_file(self, path: str, workers: int = 0) -> Iterator[Occupancy]:
        """Occupancy of every frame of a JSON file of one's own data, in order (docs/own_data.md).

        Args:
            workers: processes that read images ahead; 0 reads between predictions.

        Raises:
            DataError: the file, or an image in it, cannot be used; names where.
        """
        with tempfile.TemporaryDirectory() as folder:
            dataset = own_dataset(path, self.config.data.test, self.task, folder)
            for _, occupancy in self.predict_dataset(dataset, workers):
                yield occupancy

    def predict_dataset(self, dataset, workers: int = 0) -> Iterator[Tuple[int, Occupancy]]:
        """(index, occupancy) of every sample of a data set, in order; labels are not looked at."""
        keeps_frames = self._models[self.task.num_cameras].keeps_frames
        cache = FeatureCache(capacity=self.task.num_frames)  # no other thread's frames replace those of the data set
        batches = read_in_order(dataset, range(len(dataset)), collate, workers, self.device, keeps_frames)
        begun = (self._run(batch, dataset.task.num_cameras, cache, begin) for batch in batches)
        for index, (arrays,) in enumerate(finish_in_order(begun, self.device)):
            seconds = dataset.info(index)['timestamp'] / 1e6
            yield index, Occupancy(arrays, dataset.task, dataset.sample_token(index), seconds, self._source)

    def stream(self, cameras: Cameras, interval: float = KEYFRAME_SECONDS) -> OccupancyStream:
        """Frame by frame, with a history that the stream keeps; see :class:`OccupancyStream`."""
        return OccupancyStream(self, read_cameras(cameras), interval)

    def read(self, frame: Frame, cameras: Calibration) -> Moment:
        """The network's images of a frame; ``cameras`` as :func:`read_cameras` gives them."""
        return self._reader.read(frame, cameras, str(next(self._numbers)))

    def _moments(self, sample: Sample, cameras) -> List[Moment]:
        """The T moments of a sample, newest first."""
        frames = [Frame(sample)] if isinstance(sample, Mapping) else [sample] if isinstance(sample, Frame) else sample
        frames = sorted(frames, key=lambda frame: frame.seconds)
        if not frames:
            raise DataError('a sample needs at least one frame')
        now, earlier = frames[-1], [frame for frame in frames if frame.seconds < frames[-1].seconds]
        if len(earlier) < len(frames) - 1:
            raise DataError(f'several frames of a sample are of {now.seconds} s; give every moment once')
        chosen = choose_history(earlier, now, self.task.num_frames - 1, KEYFRAME_SECONDS)
        read = {id(frame): self.read(frame, cameras) for frame in [now, *chosen]}
        return [read[id(frame)] for frame in [now, *chosen]]

    def _run(self, batch: Dict, num_cameras: int, cache: Any, action: Callable):
        """``action`` with the model for so many cameras, whose features are kept in ``cache`` meanwhile."""
        with self._lock:
            model = self._model_for(num_cameras)
            own = model.encoder.cache
            model.encoder.cache = own if cache is None else cache
            try:
                return action(model, batch, self.device, self.amp)
            finally:
                model.encoder.cache = own

    def _model_for(self, num_cameras: int) -> torch.nn.Module:
        """The model for so many cameras; its weights do not depend on their number."""
        if num_cameras not in self._models:
            first = self._models[self.task.num_cameras]
            names = tuple(f'camera {n}' for n in range(num_cameras))
            model = build_model(self.config.model, replace(self.task, cameras=names))
            model.load_state_dict(first.state_dict())
            self._models[num_cameras] = convert_weights(model.to(self.device).eval(), self.amp)
        return self._models[num_cameras]


def own_dataset(path: str, section: Mapping, task: Task, folder: str):
    """Data set of a JSON file of one's own data (loaders/own_data.py), of its cameras; without labels.

    Args:
        section: ``data.test`` of the config.
        folder: where its infos are kept, as ``own_infos.pkl``.
    """
    own = read_own_data(path)
    infos_path = os.path.abspath(os.path.join(folder, 'own_infos.pkl'))
    save_pickle(infos_path, dict(infos=own.infos, metadata=dict(version='own')))
    files = dict(section, data_root=own.data_root, ann_file=infos_path, occ_gt_root=None)
    return build_dataset(dict(files, test_mode=True, allow_missing_cameras=True), replace(task, cameras=own.cameras))
