"""Which earlier images belong to a keyframe, and which of them a sample uses.

The history of a keyframe, newest first: its five camera sweeps, the keyframe before it, that one's five
sweeps, and so on back to the start of the scene. Every sixth entry (5, 11, 17, ...) is a keyframe.
"""

from typing import Dict, List, Optional, Sequence

import numpy as np

from lib.infos import camera_sweeps, split_scenes

SWEEPS_PER_KEYFRAME = 5
STEPS_PER_KEYFRAME = SWEEPS_PER_KEYFRAME + 1
MAX_TRAIN_INTERVAL = 8
MIN_TRAIN_INTERVAL = 4


class History:
    """Histories of all keyframes of an info file, told apart by scene.

    Args:
        infos: every keyframe known, in time order; also those that are not samples themselves.
        cameras: cameras that a complete entry has.
    """

    def __init__(self, infos: Sequence[Dict], cameras: Sequence[str]):
        self._infos = infos
        self._cameras = tuple(cameras)
        self._previous = _previous_in_scene(infos)

    def previous(self, index: int) -> Optional[int]:
        """Index of the keyframe before ``index`` in the same scene; None at the start of the scene."""
        before = self._previous[index]
        return None if before < 0 else int(before)

    def entries(self, index: int, limit: int) -> List[Dict]:
        """Up to ``limit`` entries ``{CAM: camera entry}``, newest first; empty at the start of a scene.

        A sweep that lacks a camera (or all: files without camera sweeps) is replaced by the entry before it,
        so every sixth entry is a keyframe in any case.
        """
        entries = []
        while len(entries) < limit:
            info, before = self._infos[index], self.previous(index)
            if before is not None or camera_sweeps(info):
                entries.extend(self._complete_sweeps(info))
            if before is None:
                break
            entries.append(self._infos[before]['cams'])
            index = before
        return entries[:limit]

    def _complete_sweeps(self, info):
        complete, last, sweeps = [], info['cams'], camera_sweeps(info)
        for position in range(SWEEPS_PER_KEYFRAME):
            sweep = sweeps[position] if position < len(sweeps) else None
            if sweep is not None and all(name in sweep for name in self._cameras):
                last = sweep
            complete.append(last)
        return complete


def _previous_in_scene(infos):
    """Index of the keyframe before each one in its scene, -1 at the start. int64 [n]."""
    previous = np.full(len(infos), -1, dtype=np.int64)
    for scene in split_scenes(infos):
        scene = np.asarray(scene, dtype=np.int64)
        previous[scene[1:]] = scene[:-1]
    return previous


def history_limit(count: int) -> int:
    """Entries that can matter when ``count`` earlier frames are chosen."""
    return max(MAX_TRAIN_INTERVAL, STEPS_PER_KEYFRAME) * count


def choose_test_frames(available: int, count: int) -> List[int]:
    """Entries used in evaluation: the earlier keyframes at 2 Hz; past the end the last entry again.

    Args:
        available: entries in the history, at least 1.
        count: frames wanted besides the current one (T - 1).
    """
    return [min(STEPS_PER_KEYFRAME * (step + 1), available) - 1 for step in range(count)]


def choose_train_frames(available: int, count: int, rng: np.random.Generator) -> List[int]:
    """Entries used in training: one random interval per sample; with few entries all, then the last repeated.

    Args:
        available: entries in the history, at least 1.
        count: frames wanted besides the current one (T - 1).
        rng: the sample's generator.
    """
    if available <= count:
        return [min(step, available - 1) for step in range(count)]
    longest = min(available // max(count, 1), MAX_TRAIN_INTERVAL)
    interval = int(rng.integers(min(longest, MIN_TRAIN_INTERVAL), longest + 1))
    return [interval * (step + 1) - 1 for step in range(count)]
