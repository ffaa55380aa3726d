"""Counting loops on the CPU, compiled by Numba on first call.

M rays; N voxels; C classes without free, whose id is C; G regions of the ground plan; T thresholds. Labels uint8,
ids uint16.
"""

import numpy as np

from ..extension import jit
from .counts import (
    CLASS_BITS,
    EXACT,
    FALSE_ALARMS,
    HALF_BITS,
    ID_BITS,
    IOU_HIGH,
    IOU_LOW,
    LEVEL_BITS,
    MATCHED,
    MIN_SEGMENT_RAYS,
    MISSED,
    REGION_BITS,
)


@jit
def _level(error, thresholds):
    """Number of thresholds that the error is below."""
    level = 0
    for threshold in thresholds:
        if error < threshold:
            level += 1
    return level


@jit
def count_rays(truth, prediction, voxel, distance, regions, thresholds, counts):
    """Add rays whose true label is a class to ``counts``.

    Args:
        truth, prediction: labels [N].
        voxel: int32 [2, M], distance: float32 [2, M], metres: where rays end in truth and prediction.
        regions: uint8 [X * Y], region of each column of voxels.
        thresholds: float32 [T], metres.
        counts: int64 [G, C, C + 1, T + 1]: region, true class, predicted class, thresholds that the depth keeps.
    """
    free, height = counts.shape[1], len(truth) // len(regions)
    for ray in range(voxel.shape[1]):
        label = truth[voxel[0, ray]]
        if label < free:
            level = _level(abs(distance[0, ray] - distance[1, ray]), thresholds)
            counts[regions[voxel[0, ray] // height], label, prediction[voxel[1, ray]], level] += 1


@jit
def count_voxels(truth, prediction, mask, regions, counts):
    """Add voxels where ``mask`` [N] is not 0 (all if it is empty) to ``counts`` int64 [G, C + 1, C + 1].

    Voxels whose truth is beyond the classes (255) are ignored.
    """
    height, everything, run, last = len(truth) // len(regions), len(mask) == 0, 0, 0
    flat = counts.reshape(-1)
    for column in range(len(regions)):
        offset = regions[column] * counts.shape[1]
        for voxel in range(column * height, (column + 1) * height):
            if (everything or mask[voxel]) and truth[voxel] < counts.shape[1]:
                place = (offset + truth[voxel]) * counts.shape[2] + prediction[voxel]
                if place != last:  # neighbours are mostly equal
                    flat[last] += run
                    run, last = 0, place
                run += 1
    flat[last] += run


@jit
def group_rays(truth, prediction, true_id, predicted_id, voxel, distance, regions, thresholds, free):
    """Group rays with a true class by what they meet: keys int64 [n] as :func:`unpack` reads them, rays int64 [n]."""
    height, runs = len(truth) // len(regions), 0
    keys = np.empty(voxel.shape[1], dtype=np.int64)
    lengths = np.empty(voxel.shape[1], dtype=np.int64)
    for ray in range(voxel.shape[1]):
        mine, other = voxel[0, ray], voxel[1, ray]
        if truth[mine] >= free:
            continue
        key = (np.int64(truth[mine]) << ID_BITS) | true_id[mine]
        key = (((key << CLASS_BITS) | prediction[other]) << ID_BITS) | predicted_id[other]
        key = (key << REGION_BITS) | regions[mine // height]
        key = (key << LEVEL_BITS) | _level(abs(distance[0, ray] - distance[1, ray]), thresholds)
        if runs > 0 and keys[runs - 1] == key:
            lengths[runs - 1] += 1
        else:
            keys[runs], lengths[runs] = key, 1
            runs += 1
    number, first = number_keys(keys[:runs])
    rays = np.zeros(len(first), dtype=np.int64)
    for run in range(runs):
        rays[number[run]] += lengths[run]
    return keys[first], rays


@jit
def number_keys(keys):
    """Number equal keys alike, in order of appearance, by hashing.

    Args:
        keys: int64 [n], not negative.

    Returns:
        number int64 [n] of each key, and first int64 [m], where each number appears first.
    """
    bits = 4
    while (1 << bits) < 2 * len(keys):
        bits += 1
    table = np.full(1 << bits, -1, dtype=np.int64)
    number, first, found = np.empty(len(keys), dtype=np.int64), np.empty(len(keys), dtype=np.int64), 0
    for position in range(len(keys)):
        # Fibonacci hashing: the high bits of a product with 2**64 / golden ratio
        place = np.int64((np.uint64(keys[position]) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - bits))
        while table[place] >= 0 and keys[first[table[place]]] != keys[position]:
            place = (place + 1) & ((1 << bits) - 1)
        if table[place] < 0:
            table[place], first[found] = found, position
            found += 1
        number[position] = table[place]
    return number, first[:found].copy()


@jit
def unpack(keys):
    """true class, true id, predicted class, predicted id, region and level of groups, int64 [6, n]."""
    fields = np.empty((6, len(keys)), dtype=np.int64)
    for group in range(len(keys)):
        key = keys[group]
        fields[5, group], key = key & ((1 << LEVEL_BITS) - 1), key >> LEVEL_BITS
        fields[4, group], key = key & ((1 << REGION_BITS) - 1), key >> REGION_BITS
        fields[3, group], key = key & ((1 << ID_BITS) - 1), key >> ID_BITS
        fields[2, group], key = key & ((1 << CLASS_BITS) - 1), key >> CLASS_BITS
        fields[1, group], key = key & ((1 << ID_BITS) - 1), key >> ID_BITS
        fields[0, group] = key & ((1 << CLASS_BITS) - 1)
    return fields


@jit
def count_segments(keys, rays, is_thing, members, counts):
    """Match the segments of one sample in several parts of it and add what comes out to ``counts``.

    True segments: a stuff class is one; of a thing class, every id > 0 whose rays all have one class, and one more
    for its other rays (id 0, or an id that spans classes). Predicted ones: by class and id, id 0 too.

    Args:
        keys, rays: groups of rays, int64 [n] each, from :func:`group_rays`.
        is_thing: bool [C].
        members: bool [P, G], regions that each part is made of; segments are cut at its borders.
        counts: int64 [P, T, C, 5], columns MATCHED, IOU_HIGH, IOU_LOW, MISSED, FALSE_ALARMS.
    """
    thresholds = counts.shape[1]
    fields = unpack(keys)
    true_class, predicted_class = fields[0], fields[2]
    true_key = (true_class << ID_BITS) | _own_ids(true_class, fields[1], is_thing)
    true, true_first = number_keys(true_key)
    predicted, predicted_first = number_keys((predicted_class << ID_BITS) | fields[3])
    pair, pair_first = number_keys((true << 32) | predicted)
    true_rays = np.zeros(len(true_first), dtype=np.int64)
    predicted_rays = np.zeros(len(predicted_first), dtype=np.int64)
    common = np.zeros((thresholds, len(pair_first)), dtype=np.int64)
    for part in range(len(counts)):
        _sum_rays(members[part], fields, rays, (true, predicted, pair), true_rays, predicted_rays, common)
        for threshold in range(thresholds):
            missed, false_alarms = true_rays >= MIN_SEGMENT_RAYS, predicted_rays >= MIN_SEGMENT_RAYS
            for number in range(len(pair_first)):
                group, both = pair_first[number], common[threshold, number]
                union = true_rays[true[group]] + predicted_rays[predicted[group]] - both
                if true_class[group] == predicted_class[group] and 2 * both > union:
                    _add_match(counts[part, threshold, true_class[group]], both / union)
                    missed[true[group]] = false_alarms[predicted[group]] = False
            _add_where(missed, true_class[true_first], counts[part, threshold], MISSED)
            _add_where(false_alarms, predicted_class[predicted_first], counts[part, threshold], FALSE_ALARMS)


@jit
def _sum_rays(in_part, fields, rays, numbers, true_rays, predicted_rays, common):
    """Rays of true segments, of predicted ones and, by threshold, of pairs; ``numbers`` are those of each group."""
    true, predicted, pair = numbers
    true_rays[:], predicted_rays[:], common[:] = 0, 0, 0
    for group in range(len(rays)):
        if in_part[fields[4, group]]:
            true_rays[true[group]] += rays[group]
            predicted_rays[predicted[group]] += rays[group]
            # Below k of the ascending thresholds means below the last k of them.
            for threshold in range(len(common) - fields[5, group], len(common)):
                common[threshold, pair[group]] += rays[group]


@jit
def _add_match(counts, iou):
    """Add a match to the counts [5] of its class."""
    exact = np.int64(iou * EXACT)
    counts[MATCHED] += 1
    counts[IOU_HIGH] += exact >> HALF_BITS
    counts[IOU_LOW] += exact & ((1 << HALF_BITS) - 1)


@jit
def _add_where(chosen, classes, counts, column):
    """Add the segments that are chosen to one column of the counts [C, 5] of their classes; free is no class."""
    for segment in range(len(chosen)):
        if chosen[segment] and classes[segment] < len(counts):
            counts[classes[segment], column] += 1


@jit
def _own_ids(classes, ids, is_thing):
    """Ids of true segments within their class; 0 for stuff and for the rest of a thing class."""
    class_of_id = np.full(1 << ID_BITS, -1, dtype=np.int16)
    for group in range(len(ids)):
        known = class_of_id[ids[group]]
        class_of_id[ids[group]] = classes[group] if known in (-1, classes[group]) else -2
    own = np.zeros(len(ids), dtype=np.int64)
    for group in range(len(ids)):
        if is_thing[classes[group]] and class_of_id[ids[group]] != -2:
            own[group] = ids[group]
    return own
