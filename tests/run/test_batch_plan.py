"""The same samples in every optimizer step, whatever the number of processes and accumulation steps."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import ConfigError
from lib.run.batch_plan import EpochOrder, RankBatches, balancing_weights, plan_batch


def steps_of(plan, order, epoch=0, first=0):
    """Samples of each optimizer step as all processes together deal them, in the step's order."""
    samplers = [RankBatches(order, plan, rank) for rank in range(plan.world_size)]
    for sampler in samplers:
        sampler.select(epoch, first, order.steps)
    passes = [list(sampler) for sampler in samplers]
    assert all(len(p) == len(s) for p, s in zip(passes, samplers))
    steps = []
    for step in range(order.steps - first):
        rows = range(step * plan.accumulate, (step + 1) * plan.accumulate)
        steps.append([i for row in rows for rank in range(plan.world_size) for i in passes[rank][row]])
    return steps


@settings(deadline=None, max_examples=60)
@given(
    total=st.integers(1, 16),
    world=st.integers(1, 6),
    accumulate=st.integers(1, 4),
    count=st.integers(1, 50),
    epoch=st.integers(0, 3),
)
def test_steps_do_not_depend_on_the_division(total, world, accumulate, count, epoch):
    order = EpochOrder(count, total, seed=3)
    alone = steps_of(plan_batch(total, 1), order, epoch)
    assert sorted(set(sum(alone, []))) == list(range(count))  # each sample at least once
    assert all(len(step) == total for step in alone)
    if world * accumulate <= total:
        plan = plan_batch(total, world, accumulate)
        assert steps_of(plan, order, epoch) == alone
        assert steps_of(plan, order, epoch, first=order.steps // 2) == alone[order.steps // 2 :]
        factors = [plan.loss_factor(a, r) for a in range(accumulate) for r in range(world)]
        assert sum(factors) == pytest.approx(world)  # DDP divides by the number of processes
        assert all(sum(plan.share(a, r) for r in range(world)) == pytest.approx(1) for a in range(accumulate))


def test_epochs_differ_and_seeds_differ():
    orders = {tuple(EpochOrder(20, 4, seed).order(epoch)) for seed in (1, 2) for epoch in (0, 1)}
    assert len(orders) == 4


def test_balanced_epochs_meet_every_class_alike():
    """10 samples of cars, 4 of which have a bus too, one a bicycle; 5 samples of nothing are met for the other half."""
    classes = [('car', 'bus')] * 4 + [('car', 'bicycle')] + [('car',)] * 5 + [()] * 5
    weights = balancing_weights(classes, 1.0)
    share = {
        name: sum(w / sum(name in c for c in classes) for w, c in zip([5.0] * 15, classes) if name in c)
        for name in ('car', 'bus', 'bicycle')
    }
    assert share == pytest.approx(dict(car=5, bus=5, bicycle=5))
    assert weights.tolist() == pytest.approx([0.5 + 1.25] * 4 + [0.5 + 5] + [0.5] * 5 + [0] * 5)
    assert balancing_weights(classes, 0.5).tolist() == pytest.approx((0.5 + 0.5 * weights).tolist())
    order = EpochOrder(15, 4, seed=3, weights=weights)
    epochs = [order.order(epoch)[:15] for epoch in range(40)]
    counts = [[epoch.count(i) for i in range(15)] for epoch in epochs]
    assert all(abs(n - w) < 1 for row in counts for n, w in zip(row, weights.tolist()))  # rounded up or down
    assert [sum(column) / 40 for column in zip(*counts)] == pytest.approx(weights.tolist(), abs=0.25)
    assert epochs == [EpochOrder(15, 4, 3, weights).order(epoch)[:15] for epoch in range(40)]
    assert len(set(map(tuple, epochs))) == 40


def test_uneven_division():
    plan = plan_batch(8, 3)
    assert plan.sizes == ((3, 3, 2),) and plan.share(0, 2) == 0.25
    assert 'total batch 8 = 2 or 3 samples x 3 processes' in plan.describe()


@pytest.mark.parametrize(
    'total, world, most, accumulate',
    [(8, 1, 0, 1), (8, 1, 2, 4), (8, 2, 1, 4), (8, 8, 1, 1), (8, 3, 1, 2), (7, 2, 2, 2)],
)
def test_automatic_accumulation(total, world, most, accumulate):
    plan = plan_batch(total, world, 'auto', most)
    assert plan.accumulate == accumulate


@pytest.mark.parametrize('total, world, accumulate', [(8, 16, 'auto'), (8, 2, 5), (0, 1, 1)])
def test_impossible_plans(total, world, accumulate):
    with pytest.raises(ConfigError, match='total_batch_size'):
        plan_batch(total, world, accumulate)
