"""Prediction frame by frame, as a vehicle drives: the stream remembers what the model looks back at."""

import threading
from typing import List, Mapping, Optional

from lib.errors import ConfigError
from models.encoder.feature_cache import FeatureCache

from .cameras import Calibration, Frame, Image, Moment, Pose, choose_history
from .occupancy import Occupancy

_APART = 0.75  # intervals between frames that are kept; about as far apart as those of training are at least
_HORIZON = 1.5  # times the seconds that the model looks back: what is older is forgotten
_ROOM = 4  # frames in the store of features besides the T of a sample: those that are predicted and not kept


class OccupancyStream:
    """Frames in, occupancy out; made by ``SparseOccPredictor.stream``.

    Every frame is predicted. The model looks back at earlier ones about ``interval`` apart, and what it computed for
    them is kept, so that each image passes through the encoder once.

    - *Rate*: any. Of frames that follow each other quickly some are kept to look back at, three quarters of an
      interval or more apart.
    - *Gaps*: the model looks back at the frames that there are; after a gap longer than it could look across (1.5
      times T-1 intervals, T the frames of a sample) it begins anew.
    - *Out of order*: a late frame is predicted from those before it, and takes its place in the history of those
      after it. A frame of a time that is there already replaces it. One that is later than the gap above is taken for
      the first of another drive.
    - *A dropped camera*: leave it out of ``images``, or give None; nothing is seen there at that moment.
    - *Ego motion*: every frame has the pose of the ego frame, in any frame that does not move.

    May be called from several threads; several streams of one predictor do not disturb each other.

    Args:
        predictor: ``SparseOccPredictor``.
        cameras: calibration by name.
        interval: seconds between the frames that the model learned from.
    """

    def __init__(self, predictor, cameras: Calibration, interval: float):
        if not interval > 0:
            raise ConfigError(f'interval must be above 0 seconds, got {interval!r}')
        self.cameras = dict(cameras)
        self.interval = interval
        self._predictor, self._count = predictor, predictor.task.num_frames - 1
        self._kept: List[Moment] = []  # in time order
        self._cache = self._new_cache()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """How many frames are kept to look back at."""
        return len(self._kept)

    def push(
        self, images: Mapping[str, Image], seconds: float, ego2global: Pose, name: Optional[str] = None
    ) -> Occupancy:
        """Occupancy of a frame, which later ones look back at.

        Args:
            images: by camera name, see ``Frame``.
            seconds: when they were taken, on any clock that the stream keeps to.
            ego2global: pose of the ego frame then, 4x4 or dict(rotation, translation); ``numpy.eye(4)`` throughout
                for cameras that stand still.
            name: of the result and its file; None takes the time in microseconds.

        Raises:
            DataError: an image or the pose cannot be used; the stream is as it was before.
        """
        return self.push_frame(Frame(images, seconds, ego2global), name)

    def push_frame(self, frame: Frame, name: Optional[str] = None) -> Occupancy:
        """The same with a ``Frame``."""
        with self._lock:
            now = self._predictor.read(frame, self.cameras)
            moments, names = [now, *self._history_of(now)], None if name is None else [name]
            (result,) = self._predictor.predict_moments([moments], tuple(self.cameras), names, self._cache)
            self._keep(now)
            return result

    def reset(self) -> None:
        """Forget every frame, e.g. before another drive."""
        with self._lock:
            self._kept, self._cache = [], self._new_cache()

    def _new_cache(self) -> FeatureCache:
        return FeatureCache(capacity=1 + self._count + _ROOM)

    @property
    def _horizon(self) -> float:
        """Seconds."""
        return _HORIZON * self._count * self.interval

    def _history_of(self, now: Moment) -> List[Moment]:
        """What the model looks back at, newest first."""
        past = [moment for moment in self._kept if 0 < now.seconds - moment.seconds <= self._horizon]
        return choose_history(past, now, self._count, self.interval)

    def _keep(self, now: Moment) -> None:
        """Put a frame where it belongs in time, unless it is closer to another than is needed; forget the oldest."""
        kept = [moment for moment in self._kept if moment.seconds != now.seconds]
        if kept and kept[-1].seconds - now.seconds > self._horizon:
            kept = []
        if self._count and all(abs(moment.seconds - now.seconds) >= _APART * self.interval for moment in kept):
            kept = sorted([*kept, now], key=lambda moment: moment.seconds)
        self._kept = [moment for moment in kept if kept[-1].seconds - moment.seconds <= self._horizon]
