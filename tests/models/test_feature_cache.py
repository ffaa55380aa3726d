"""Frames stay where they were written; the one not used for longest makes room."""

import copy

import pytest
import torch

from models.encoder.feature_cache import FeatureCache


class Drive:
    """A cache, and an encoder whose maps tell which frame they are of."""

    def __init__(self, capacity=3, dtype=torch.float32):
        self.cache, self.dtype, self.encoded = FeatureCache(capacity), dtype, []

    def fetch(self, *keys):
        def encode(t):
            self.encoded.append(keys[t])
            return [
                torch.full((2, 4, 6, 3), float(keys[t]), dtype=self.dtype),
                torch.full((2, 2, 3, 3), float(keys[t]), dtype=self.dtype),
            ]

        stored = self.cache.fetch(keys, encode)
        for level in stored.maps:
            for slot, key in zip(stored.slots, keys):
                assert torch.equal(level[slot], torch.full_like(level[slot], float(key)))
        return stored


def test_a_step_encodes_what_is_new_and_moves_nothing():
    drive = Drive()
    first = drive.fetch(3, 2, 1)
    address = [level.data_ptr() for level in first.maps]
    second = drive.fetch(4, 3, 2)
    assert drive.encoded == [3, 2, 1, 4] and len(drive.cache) == 3
    assert second.slots[1:] == first.slots[:2] and second.slots[0] == first.slots[2]  # 4 took the place of 1
    assert [level.data_ptr() for level in second.maps] == address
    drive.fetch(4, 4, 3)
    assert drive.encoded == [3, 2, 1, 4]
    drive.fetch(9, 8, 4)
    assert drive.encoded == [3, 2, 1, 4, 9, 8]


def test_frames_of_the_sample_are_never_the_ones_replaced():
    drive = Drive()
    drive.fetch(3, 2, 1)
    drive.fetch(5, 4, 1)  # 1 was used before 2 and 3, and is needed
    assert drive.encoded == [3, 2, 1, 5, 4]


def test_forgetting_keeps_the_memory_and_releasing_does_not():
    drive = Drive()
    address = drive.fetch(1).maps[0].data_ptr()
    drive.cache.clear()
    assert len(drive.cache) == 0 and drive.fetch(1).maps[0].data_ptr() == address and drive.encoded == [1, 1]
    assert not copy.deepcopy(drive.cache)._maps
    drive.cache.release()
    assert len(drive.cache) == 0 and not drive.cache._maps


def test_maps_of_another_type_start_anew():
    drive = Drive()
    drive.fetch(1, 2)
    drive.dtype = torch.float64
    assert drive.fetch(7).maps[0].dtype == torch.float64 and len(drive.cache) == 1


def test_written_in_inference_mode_and_later_without():
    drive = Drive()
    with torch.inference_mode():
        drive.fetch(1)
    drive.fetch(2, 1)
    assert drive.encoded == [1, 2]


def test_more_frames_than_room():
    with pytest.raises(ValueError, match='4 different frames do not fit into a cache of 3'):
        Drive().fetch(1, 2, 3, 4)


def test_maps_that_differ_within_a_sample():
    drive = Drive()
    drive.fetch(1)
    drive.dtype = torch.float64
    with pytest.raises(ValueError, match='maps of different sizes, types or devices'):
        drive.fetch(1, 2)
    assert drive.fetch(1, 2).maps[0].dtype == torch.float64


def test_frames_can_be_written_in_place():
    drive = Drive()
    written = []

    def write(maps, slots, numbers):
        written.append((tuple(slots), tuple(numbers)))
        for level in maps:
            for slot, number in zip(slots, numbers):
                level[slot] = number
        return True

    def fetch(keys, accepts=True):
        encode = lambda t: [torch.full((2, 4, 6, 3), float(keys[t]))]  # noqa: E731
        return drive.cache.fetch(keys, encode, lambda t, maps, slot: accepts and write(maps, [slot], [float(keys[t])]))

    fetch([3, 2, 1])  # the first makes room
    assert written == [((1,), (2.0,)), ((2,), (1.0,))]
    stored = fetch([4, 3, 2])
    assert written[2:] == [((2,), (4.0,))]
    assert [float(stored.maps[0][slot].mean()) for slot in stored.slots] == [4, 3, 2]
    stored = fetch([5, 4, 3], accepts=False)
    assert [float(stored.maps[0][slot].mean()) for slot in stored.slots] == [5, 4, 3] and len(written) == 3
    maps = drive.cache.overwrite(list, lambda maps: write(maps, [0, 1, 2], [7.0, 8.0, 9.0]))
    assert len(drive.cache) == 0 and maps[0].mean((1, 2, 3, 4)).tolist() == [7, 8, 9]
    drive.cache.release()
    maps = drive.cache.overwrite(lambda: [torch.ones(3, 2, 4, 6, 3)], lambda maps: False)
    assert maps[0].mean() == 1 and drive.cache.stored_as is None
