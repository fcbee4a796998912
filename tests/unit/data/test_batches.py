from __future__ import annotations

import random
from collections import Counter
from itertools import islice

import pytest

from framework.data.batches import BatchPlan, MicroStepBatchSampler, ordered_batches
from framework.data.seeds import derive_order, derive_seed, derive_uniform
from framework.errors import DataError

SIZES = [(64, 64), (80, 48), (48, 80)]


def cases(count: int = 40) -> list[tuple[list[tuple[int, int]], int, int, int, int]]:
    """Random (bucket of each sample, batch size, world size, repeats, seed)."""
    draw = random.Random(7)
    return [
        (
            draw.choices(SIZES, weights=[8, 3, 1], k=draw.randint(1, 30)),
            draw.randint(1, 6),
            draw.randint(1, 3),
            draw.randint(1, 3),
            draw.randint(0, 2**32 - 1),
        )
        for _ in range(count)
    ]


def plan_of(case: tuple[list[tuple[int, int]], int, int, int, int]) -> BatchPlan:
    buckets, batch_size, world_size, repeats, seed = case
    return BatchPlan(
        buckets, batch_size=batch_size, world_size=world_size, repeats=repeats, seed=seed
    )


@pytest.mark.parametrize("case", cases())
def test_every_epoch_sees_every_sample(case: tuple) -> None:
    buckets, _, _, repeats, _ = case
    plan = plan_of(case)
    seen: Counter[int] = Counter()
    in_bucket = Counter(buckets)
    for epoch in range(5):
        steps = range(plan.num_steps_before(epoch), plan.num_steps_before(epoch + 1))
        for step in steps:
            assert plan.epoch_of(step) == epoch
            batch = plan.global_batch(step)
            assert len(batch) == plan.global_batch_size
            assert len({buckets[index] for index in batch}) == 1
            seen.update(batch)
        for index, bucket in enumerate(buckets):
            assert seen[index] >= (epoch + 1) * repeats
            # Ahead of its turn by no more than the fill of one batch.
            ahead = -(-plan.global_batch_size // in_bucket[bucket])
            assert seen[index] <= (epoch + 1) * repeats + ahead


def test_buckets_that_divide_into_batches_are_seen_exactly_once_an_epoch() -> None:
    buckets = [SIZES[0]] * 8 + [SIZES[1]] * 4
    plan = BatchPlan(buckets, batch_size=2, world_size=2, seed=1)
    orders = []
    for epoch in range(4):
        steps = range(3 * epoch, 3 * epoch + 3)
        order = [index for step in steps for index in plan.global_batch(step)]
        assert sorted(order) == list(range(12))
        orders.append(tuple(order))
    assert len(set(orders)) == 4


def test_a_small_bucket_is_not_favoured_over_a_long_run() -> None:
    plan = BatchPlan([SIZES[0]] * 31 + [SIZES[1]], batch_size=8, seed=3)
    seen = Counter(index for step in range(4000) for index in plan.global_batch(step))
    assert max(seen.values()) - min(seen.values()) <= 8


@pytest.mark.parametrize("case", cases(15))
def test_the_batch_is_a_pure_function_of_the_step(case: tuple) -> None:
    forwards, jumping = plan_of(case), plan_of(case)
    steps = list(range(60))
    expected = {step: forwards.batch(step, rank=0) for step in steps}
    random.Random(1).shuffle(steps)
    for step in steps:
        assert jumping.batch(step, rank=0) == expected[step]
    assert plan_of(case).batch(1_000_003) == jumping.batch(1_000_003)


@pytest.mark.parametrize("case", cases(15))
def test_ranks_share_out_the_global_batch(case: tuple) -> None:
    plan = plan_of(case)
    for step in range(20):
        parts = [plan.batch(step, rank=rank) for rank in range(plan.world_size)]
        together = [request for part in parts for request in part]
        assert all(len(part) == plan.batch_size for part in parts)
        assert [request.position for request in together] == list(range(plan.global_batch_size))
        assert [request.sample_index for request in together] == plan.global_batch(step)
        assert {request.micro_step for request in together} == {step}


def test_ranks_of_a_divisible_epoch_are_disjoint() -> None:
    plan = BatchPlan([SIZES[0]] * 24, batch_size=2, world_size=3, seed=5)
    parts = [
        {request.sample_index for step in range(4) for request in plan.batch(step, rank=rank)}
        for rank in range(3)
    ]
    assert [len(part) for part in parts] == [8, 8, 8]
    assert len(set.union(*parts)) == 24


def test_the_global_batch_does_not_depend_on_how_it_is_shared_out() -> None:
    buckets = random.Random(2).choices(SIZES, k=20)
    plans = [
        BatchPlan(buckets, batch_size=size, world_size=world, seed=9)
        for size, world in ((4, 1), (2, 2), (1, 4))
    ]
    for step in range(30):
        assert len({tuple(plan.global_batch(step)) for plan in plans}) == 1


def test_the_seed_changes_the_order() -> None:
    orders = {
        tuple(BatchPlan([SIZES[0]] * 20, batch_size=20, seed=s).global_batch(0)) for s in range(20)
    }
    assert len(orders) == 20


def test_the_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    plan = BatchPlan([SIZES[0]] * 5 + [SIZES[1]] * 3, batch_size=2, repeats=2, seed=42)
    assert [plan.global_batch(step) for step in range(9)] == PINNED
    assert derive_seed(42, 1, 2) == 0x449D3D0F91391787
    assert derive_order(6, 42, 1).tolist() == [1, 2, 5, 3, 0, 4]


def test_sampler_resumes_exactly() -> None:
    plan = BatchPlan([SIZES[0]] * 7 + [SIZES[1]] * 3, batch_size=2, world_size=2, seed=4)
    whole = list(islice(MicroStepBatchSampler(plan, rank=1), 40))
    for start in (0, 1, 7, 39):
        resumed = MicroStepBatchSampler(plan, start=start, rank=1)
        assert list(islice(resumed, 40 - start)) == whole[start:]
        assert list(islice(resumed, 40 - start)) == whole[start:]


class TestUnevenRepeats:
    BUCKETS = [SIZES[0]] * 7 + [SIZES[1]] * 3
    REPEATS = (1.0, 10.0, 2.5, 0.25, 0.25, 1 / 3, 1.0, 2.0, 2.0, 2.0)

    def plan(self, **options: int) -> BatchPlan:
        options = {"batch_size": 3, "seed": 5, **options}
        return BatchPlan(self.BUCKETS, repeats=self.REPEATS, **options)

    def test_samples_are_never_far_from_their_share(self) -> None:
        plan = self.plan()
        seen: Counter[int] = Counter()
        for epoch in range(60):
            for step in range(plan.num_steps_before(epoch), plan.num_steps_before(epoch + 1)):
                assert plan.epoch_of(step) == epoch
                batch = plan.global_batch(step)
                assert len({self.BUCKETS[index] for index in batch}) == 1
                seen.update(batch)
            for index, repeats in enumerate(self.REPEATS):
                # Less than one by rounding, and what fills the bucket's last batch.
                assert -1 < seen[index] - (epoch + 1) * repeats < 1 + plan.global_batch_size

    def test_the_batch_is_a_pure_function_of_the_step(self) -> None:
        steps = list(range(80))
        forwards = self.plan()
        expected = {step: forwards.global_batch(step) for step in steps}
        random.Random(1).shuffle(steps)
        jumping = self.plan()
        assert {step: jumping.global_batch(step) for step in steps} == expected
        shared = self.plan(batch_size=1, world_size=3)
        assert all(shared.global_batch(step) == expected[step] for step in steps)
        assert any(self.plan(seed=6).global_batch(step) != expected[step] for step in steps)

    def test_rare_samples_take_turns(self) -> None:
        plan = BatchPlan([SIZES[0]] * 8, batch_size=1, seed=0, repeats=[0.25] * 8)
        for epoch in range(8):
            steps = range(plan.num_steps_before(epoch), plan.num_steps_before(epoch + 1))
            assert len(steps) == 2
        first = [plan.global_batch(step)[0] for step in range(8)]
        assert sorted(first) == list(range(8))

    def test_equal_whole_repeats_are_those_of_one_number(self) -> None:
        one = BatchPlan(self.BUCKETS, batch_size=2, seed=3, repeats=2)
        each = BatchPlan(self.BUCKETS, batch_size=2, seed=3, repeats=[2.0] * 10)
        assert [one.global_batch(s) for s in range(30)] == [each.global_batch(s) for s in range(30)]

    def test_a_sample_that_is_never_taken(self) -> None:
        plan = BatchPlan(SIZES[:2], batch_size=1, seed=3, repeats=[0.0, 1.0])
        assert {plan.global_batch(step)[0] for step in range(9)} == {1}

    def test_large_sets_are_planned_quickly(self) -> None:
        repeats = [1.0 + n % 3 for n in range(100_000)]
        plan = BatchPlan(
            [SIZES[n % 2] for n in range(100_000)], batch_size=4, seed=0, repeats=repeats
        )
        for step in range(0, 100_000, 20_000):
            plan.batch(step)


def test_no_samples() -> None:
    with pytest.raises(DataError, match="no pictures to train on"):
        BatchPlan([], batch_size=1, seed=0)


def test_large_sets_are_planned_quickly() -> None:
    plan = BatchPlan([SIZES[n % 3] for n in range(300_000)], batch_size=4, seed=0)
    for step in range(0, 200_000, 20_000):
        plan.batch(step)


@pytest.mark.parametrize("case", cases(15))
def test_ordered_batches_hold_every_sample_once(case: tuple) -> None:
    buckets, batch_size, world_size, _, _ = case
    parts = [
        ordered_batches(buckets, batch_size=batch_size, world_size=world_size, rank=rank)
        for rank in range(world_size)
    ]
    batches = [batch for part in parts for batch in part]
    indices = [request.sample_index for batch in batches for request in batch]
    assert sorted(indices) == list(range(len(buckets)))
    assert all(len(batch) <= batch_size for batch in batches)
    assert all(len({buckets[request.sample_index] for request in batch}) == 1 for batch in batches)
    assert all(request.position == request.sample_index for batch in batches for request in batch)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_derived_numbers_are_even_and_independent() -> None:
    draws = [derive_uniform(1, 3, step, position) for step in range(100) for position in range(50)]
    assert all(0 <= draw < 1 for draw in draws)
    assert sum(draws) / len(draws) == pytest.approx(0.5, abs=0.02)
    assert len(set(draws)) == len(draws)
    assert derive_uniform(1, 3, 5, 7) == draws[5 * 50 + 7] != derive_uniform(2, 3, 5, 7)
    assert sorted(derive_order(50, 1, 2).tolist()) == list(range(50))


PINNED = [[1, 4], [6, 6], [0, 4], [1, 3], [2, 0], [5, 7], [7, 5], [2, 3], [7, 7]]
