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

    def fetch(self, keys: Sequence[Hashable], encode: Callable[[int], Maps]) -> Maps:
        """Feature maps of the frames of one sample.

        Args:
            keys: T frame keys; equal keys mean equal images.
            encode: given the position (0..T-1) of a frame to encode, its maps: L tensors [N, H_l, W_l, C].
                One frame at a time, so that its features have the same bits whatever is in the store: on a
                GPU, rounding depends on how many images are encoded together.

        Returns:
            L tensors [T, N, H_l, W_l, C].
        """
        for t, key in enumerate(keys):
            if key not in self._frames:
                self._frames[key] = encode(t)
        frames = [self._frames[key] for key in keys]
        for key in keys:
            self._frames.move_to_end(key)
        while len(self._frames) > self.capacity:
            self._frames.popitem(last=False)
        return [torch.stack(level) for level in zip(*frames)]
