"""Features of earlier frames, kept from one test-time step to the next."""
from collections import OrderedDict
from typing import Callable, Dict, Hashable, List, Sequence

import torch
from torch import Tensor

Maps = List[Tensor]


class FeatureCache:
    """A bounded store of the feature maps of whole frames (N images), oldest use dropped first.

    Args:
        capacity: frames held; the T of one sample suffice for keyframes in order.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._frames: Dict[Hashable, Maps] = OrderedDict()

    def __len__(self) -> int:
        return len(self._frames)

    def clear(self):
        """Forget every frame."""
        self._frames.clear()

    def fetch(self, keys: Sequence[Hashable], encode: Callable[[List[int]], Maps]) -> Maps:
        """Feature maps of the frames of one sample.

        Args:
            keys: T frame keys; equal keys mean equal images.
            encode: given the positions (0..T-1) of the frames to encode, their maps: L tensors
                [frames, N, H_l, W_l, C].

        Returns:
            L tensors [T, N, H_l, W_l, C].
        """
        missing = [t for t, key in enumerate(keys) if key not in self._frames and key not in keys[:t]]
        if missing:
            encoded = encode(missing)
            for i, t in enumerate(missing):
                self._frames[keys[t]] = [level[i] for level in encoded]
        frames = [self._frames[key] for key in keys]
        for key in keys:
            self._frames.move_to_end(key)
        while len(self._frames) > self.capacity:
            self._frames.popitem(last=False)
        return [torch.stack(level) for level in zip(*frames)]
