"""Output merging: loops against the vectorised form, thresholds, the stuff quirk, no query at all."""

import numpy as np
import pytest
import torch

from models.head import begin_splitting, join_arrays, merge_panoptic, merge_semantic

CLASSES = 5
THINGS = (0, 1)
IS_THING = torch.tensor([c in THINGS for c in range(CLASSES)])


def naive_semantic(class_logits, mask_logits):
    scores, masks = torch.sigmoid(class_logits), torch.sigmoid(mask_logits)
    result = []
    for k in range(masks.shape[1]):
        totals = [
            sum(float(scores[q, c] * masks[q, k]) for q in range(len(scores)) if scores[q].max() > 0.3)
            for c in range(CLASSES)
        ]
        result.append(int(np.argmax(totals)) if max(totals) >= 0.01 else CLASSES)
    return result


def naive_panoptic(class_logits, mask_logits, label_merged_stuff):
    scores, classes = torch.sigmoid(class_logits).max(1)
    masks, voxels = torch.sigmoid(mask_logits), range(mask_logits.shape[1])
    queries = [q for q in range(len(scores)) if scores[q] > 0.3]
    instances, semantics = [0] * len(voxels), [CLASSES] * len(voxels)
    if not queries:
        return instances, semantics
    winner = [max(queries, key=lambda q: float(scores[q] * masks[q, k])) for k in voxels]
    segment, stuff = 0, {}
    for q in queries:
        won = [k for k in voxels if winner[k] == q]
        solid = [k for k in won if masks[q, k] >= 0.5]
        area = int((masks[q] >= 0.5).sum())
        if not solid or len(won) / area < 0.8:
            continue
        c = int(classes[q])
        first = c in THINGS or c not in stuff
        if first:
            segment += 1
            stuff[c] = segment
        for k in solid:
            instances[k] = stuff[c]
            if first or label_merged_stuff:
                semantics[k] = c
    return instances, semantics


def random_case(seed):
    generator = torch.Generator().manual_seed(seed)
    class_logits = torch.randn(12, CLASSES, generator=generator) * 2 - 1
    mask_logits = torch.randn(12, 60, generator=generator) - 4
    for q in range(12):  # most masks own a stretch of voxels, some share one
        start = (q // 2 if q < 4 else q) * 5
        mask_logits[q, start : start + 5] += 6
    return class_logits, mask_logits


@pytest.mark.parametrize('seed', range(6))
def test_semantic_equals_loops(seed):
    case = random_case(seed)
    assert merge_semantic(*case, score_threshold=0.3).tolist() == naive_semantic(*case)


@pytest.mark.parametrize('label_merged_stuff', [False, True])
@pytest.mark.parametrize('seed', range(6))
def test_panoptic_equals_loops(seed, label_merged_stuff):
    class_logits, mask_logits = random_case(seed)
    ours = merge_panoptic(class_logits, mask_logits, IS_THING, 0.3, 0.8, label_merged_stuff)
    instances, semantics = naive_panoptic(class_logits, mask_logits, label_merged_stuff)
    assert ours.instances.tolist() == instances and ours.semantics.tolist() == semantics
    assert ours.instances.dtype == torch.int16 and ours.semantics.dtype == torch.uint8


def two_stuff_queries_of_one_class():
    class_logits = torch.full((3, CLASSES), -8.0)
    class_logits[0, 3] = class_logits[1, 3] = class_logits[2, 0] = 4.0
    mask_logits = torch.full((3, 6), -8.0)
    for q in range(3):
        mask_logits[q, 2 * q : 2 * q + 2] = 8.0
    return class_logits, mask_logits


def test_merged_stuff_keeps_class_free_as_published_or_is_labelled():
    case = two_stuff_queries_of_one_class()
    published = merge_panoptic(*case, IS_THING, 0.3, 0.8, label_merged_stuff=False)
    labelled = merge_panoptic(*case, IS_THING, 0.3, 0.8, label_merged_stuff=True)
    assert published.instances.tolist() == labelled.instances.tolist() == [1, 1, 1, 1, 2, 2]
    assert published.semantics.tolist() == [3, 3, CLASSES, CLASSES, 0, 0]
    assert labelled.semantics.tolist() == [3, 3, 3, 3, 0, 0]


def test_no_query_above_the_threshold_leaves_everything_free():
    class_logits, mask_logits = torch.full((3, CLASSES), -8.0), torch.full((3, 7), 8.0)
    assert merge_semantic(class_logits, mask_logits, 0.3).tolist() == [CLASSES] * 7
    panoptic = merge_panoptic(class_logits, mask_logits, IS_THING, 0.3, 0.8, False)
    assert panoptic.semantics.tolist() == [CLASSES] * 7 and not panoptic.instances.any()


def test_more_than_255_segments():
    class_logits, mask_logits = torch.full((300, CLASSES), -8.0), torch.full((300, 300), -8.0)
    class_logits[:, 0] = 4.0
    mask_logits.fill_diagonal_(8.0)
    panoptic = merge_panoptic(class_logits, mask_logits, IS_THING, 0.3, 0.8, False)
    assert panoptic.instances.tolist() == list(range(1, 301))


def test_arrays_leave_in_a_row_for_each_type():
    """In their order, in memory that is not the rows'."""
    arrays = [
        torch.arange(21, dtype=torch.uint8).view(1, 7, 3),
        torch.arange(-2, 5, dtype=torch.int16)[None],
        torch.arange(50, 57, dtype=torch.uint8)[None],
    ]
    rows = join_arrays(arrays)
    assert [row.dtype for row in rows] == [torch.uint8, torch.int16]
    results = begin_splitting(rows, arrays)()
    for row in rows:
        row.zero_()
    for result, array in zip(results, arrays):
        np.testing.assert_array_equal(result, array.numpy())
        assert result.dtype == array.numpy().dtype
