"""Features of earlier frames, kept from one test-time step to the next."""

from collections import OrderedDict
from typing import Callable, Hashable, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

Maps = List[Tensor]


class StoredFrames(NamedTuple):
    """The frames of one sample among those that the cache holds.

    maps   L tensors [S, N, H_l, W_l, C], S the cache's capacity; always the same memory while sizes stay the same
    slots  T numbers 0..S-1: where each frame of the sample is
    """

    maps: Maps
    slots: List[int]


class FeatureCache:
    """A bounded store of the feature maps of whole frames (N images); the one not used for longest is replaced.

    Frames stay where they were written: a step writes what is new and says where the rest is.

    Args:
        capacity: frames held; the T of one sample suffice for keyframes in order.

    Attributes:
        stored_as: what the user of the cache knows its maps by, None if that is not sure; not looked at here.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._slots: OrderedDict[Hashable, int] = OrderedDict()
        self._maps: Maps = []
        self.stored_as: Optional[Hashable] = None

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def held(self) -> List[Hashable]:
        """Keys of the frames that are here."""
        return list(self._slots)

    def clear(self):
        """Forget every frame; the memory is kept for the next ones."""
        self._slots.clear()

    def release(self):
        """Forget every frame and give the memory back."""
        self.clear()
        self._maps, self.stored_as = [], None

    def __getstate__(self):
        return dict(self.__dict__, _slots=OrderedDict(), _maps=[], stored_as=None)

    def fetch(
        self,
        keys: Sequence[Hashable],
        encode: Callable[[int], Maps],
        write: Optional[Callable[[int, Maps, int], bool]] = None,
    ) -> StoredFrames:
        """Where the frames of one sample are.

        Args:
            keys: T frame keys, at most ``capacity`` different ones; equal keys mean equal images, and keys of maps
                of different sizes, types or devices differ.
            encode: given the position (0..T-1) of a frame to encode, its maps: L tensors [N, H_l, W_l, C].
                One frame at a time, so that its features have the same bits whatever is in the store: on a
                GPU, rounding depends on how many images are encoded together.
            write: given that position, the stored maps [S, N, H_l, W_l, C] and a slot 0..S-1, write the frame's maps
                there and say True; False, and nothing written, where these maps are not like the stored ones.

        Raises:
            ValueError: more different keys than the store has room for, or maps that differ among these keys.
        """
        if len(keys) > self.capacity and len(set(keys)) > self.capacity:
            raise ValueError(f'{len(set(keys))} different frames do not fit into a cache of {self.capacity}')
        for key in keys:
            if key in self._slots:
                self._slots.move_to_end(key)
        for t, key in enumerate(keys):
            if key not in self._slots:
                self._store(key, t, encode, write)
        try:
            return StoredFrames(self._maps, [self._slots[key] for key in keys])
        except KeyError:
            self.clear()
            raise ValueError('the frames of one sample have maps of different sizes, types or devices') from None

    def overwrite(self, encode: Callable[[], Maps], write: Callable[[Maps], bool]) -> Maps:
        """The stored maps, filled with those of one sample, frame t in slot t; what was stored before is forgotten.

        Args:
            encode: gives the maps of all frames, L tensors [T, N, H_l, W_l, C], T at most S.
            write: given the stored maps, as in :meth:`fetch`, of all frames.
        """
        self.clear()
        if not (self._maps and write(self._maps)):
            maps = encode()
            self._make_room([level[0] for level in maps])
            for stored, level in zip(self._maps, maps):
                stored[: len(level)].copy_(level)
        return self._maps

    def _store(self, key: Hashable, t: int, encode, write):
        slot = self._free_slot()
        if not (self._maps and write is not None and write(t, self._maps, slot)):
            maps = encode(t)
            if self._make_room(maps):
                slot = 0
            with torch.no_grad():
                for stored, level in zip(self._maps, maps):
                    stored[slot].copy_(level)
        self._slots[key] = slot

    def _make_room(self, maps: Maps) -> bool:
        """Whether there was none for frames of such maps, L tensors [N, H_l, W_l, C], and all was forgotten."""
        if [_layout(level) for level in maps] == [_layout(level[0]) for level in self._maps]:
            return False
        self.release()  # before there is memory for the new ones
        with torch.inference_mode(False):  # later steps may write to it outside that mode
            self._maps = [level.new_empty((self.capacity,) + level.shape) for level in maps]
        return True

    def _free_slot(self) -> int:
        """A slot that holds nothing, or what was not used for longest."""
        if len(self._slots) < self.capacity:
            return min(set(range(self.capacity)) - set(self._slots.values()))
        return self._slots.popitem(last=False)[1]


def _layout(level: Tensor):
    return level.shape, level.dtype, level.device
