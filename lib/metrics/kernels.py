"""Counting loops on the CPU, compiled by Numba on first call. M rays; N voxels; C classes, free last."""

from ..jit import jit


@jit
def _level(error, thresholds):
    level = 0
    for threshold in thresholds:
        if error < threshold:
            level += 1
    return level


@jit
def count_labels(true_label, predicted_label, true_m, predicted_m, thresholds, counts):
    """Add rays to ``counts`` int64 [C - 1, C, T + 1]: true class, predicted class, thresholds kept."""
    free = counts.shape[0]
    for ray in range(true_label.shape[0]):
        if true_label[ray] < free:
            level = _level(abs(true_m[ray] - predicted_m[ray]), thresholds)
            counts[true_label[ray], predicted_label[ray], level] += 1


@jit
def key_runs(true_label, true_id, predicted_label, predicted_id, true_m, predicted_m, thresholds, free, keys, lengths):
    """Runs of equal keys (class 8 bits, id 20, class 8, id 20, level 6) among rays with a true class.

    Writes int64 ``keys`` and ``lengths``; returns the number of runs.
    """
    runs = 0
    for ray in range(true_label.shape[0]):
        if true_label[ray] >= free:
            continue
        key = (int(true_label[ray]) << 20) | int(true_id[ray])
        key = (((key << 8) | int(predicted_label[ray])) << 20) | int(predicted_id[ray])
        key = (key << 6) | _level(abs(true_m[ray] - predicted_m[ray]), thresholds)
        if runs > 0 and keys[runs - 1] == key:
            lengths[runs - 1] += 1
        else:
            keys[runs] = key
            lengths[runs] = 1
            runs += 1
    return runs


@jit
def count_voxels(truth, prediction, mask, true_counts, predicted_counts, matched):
    """Add voxels [N] where ``mask`` [N] is not 0 (all if it is empty) to int64 [C] counts.

    Voxels whose truth is not below C are ignored.
    """
    classes = true_counts.shape[0]
    everything = mask.shape[0] == 0
    for voxel in range(truth.shape[0]):
        if (everything or mask[voxel]) and truth[voxel] < classes:
            true_counts[truth[voxel]] += 1
            predicted_counts[prediction[voxel]] += 1
            if truth[voxel] == prediction[voxel]:
                matched[truth[voxel]] += 1
