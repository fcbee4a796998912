"""Which samples stand in which batch: a pure function of the micro-step, so that resume is exact without saved state.

Every bucket is an endless stream: its samples shuffled, then shuffled anew, and so on. The stream is cut
into global batches. Epoch e takes of each bucket as many whole batches as it needs to have gone through its
samples (e + 1) x repeats times since the start, and shuffles the batches of all buckets. So:

- after every epoch each sample has been seen `repeats` times per epoch or more; none is left out;
- where a bucket doesn't divide into batches, its last batch is filled from its next shuffle, and later
  epochs are that much shorter: over a long run every sample is seen equally often.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from framework.data.images import Size
from framework.data.seeds import derive_order
from framework.errors import DataError

_SAMPLE_ORDER = 1  # what a derived seed is for, so that no two uses share one
_BATCH_ORDER = 2


class ItemRequest(NamedTuple):
    """What the data set is asked for.

    sample_index: which sample.   micro_step: when.   position: where in the global batch (all ranks together).
    """

    sample_index: int
    micro_step: int
    position: int


class BatchPlan:
    """The batches of a training run.

    bucket_of: bucket of each sample.   batch_size: pictures per process and micro-step; all share a bucket.
    world_size: processes; each takes its own part of the global batch, so the global batch depends only on
    batch_size x world_size.   Raises DataError when there is no sample.
    """

    def __init__(
        self,
        bucket_of: Sequence[Size],
        *,
        batch_size: int,
        seed: int,
        repeats: int = 1,
        world_size: int = 1,
    ) -> None:
        if not bucket_of:
            raise DataError(
                "no pictures to train on", hint="add pictures, or hold fewer of them out"
            )
        members: dict[Size, list[int]] = defaultdict(list)
        for index, bucket in enumerate(bucket_of):
            members[bucket].append(index)
        self.buckets = sorted(members)
        self.batch_size = batch_size
        self.world_size = world_size
        self.global_batch_size = batch_size * world_size
        self._seed = seed
        self._repeats = repeats
        self._epoch_items = len(bucket_of) * repeats
        self._members = {bucket: np.array(members[bucket]) for bucket in self.buckets}
        self._epoch: tuple[int, list[tuple[Size, int]]] = (-1, [])  # the last one used
        self._shuffles: dict[tuple[Size, int], np.ndarray] = {}  # those of that epoch

    def batch(self, micro_step: int, *, rank: int = 0) -> list[ItemRequest]:
        """The samples of one process in one micro-step; a pure function of the arguments and the plan's own."""
        first = rank * self.batch_size
        samples = self.global_batch(micro_step)[first : first + self.batch_size]
        return [
            ItemRequest(index, micro_step, position)
            for position, index in enumerate(samples, start=first)
        ]

    def global_batch(self, micro_step: int) -> list[int]:
        """The samples of all processes in one micro-step, in the order of their positions."""
        epoch = self.epoch_of(micro_step)
        bucket, number = self._batches_of(epoch)[micro_step - self.num_steps_before(epoch)]
        first = number * self.global_batch_size
        return [self._item(bucket, i) for i in range(first, first + self.global_batch_size)]

    def epoch_of(self, micro_step: int) -> int:
        """The epoch that a micro-step belongs to, from 0."""
        # An upper bound: after e epochs at least e * epoch_items samples have been seen.
        limit = (micro_step + 1) * self.global_batch_size // self._epoch_items + 2
        return bisect_right(range(limit), micro_step, key=self.num_steps_before) - 1

    def num_steps_before(self, epoch: int) -> int:
        """Micro-steps of all epochs before this one."""
        return sum(self._num_batches(bucket, epoch) for bucket in self.buckets)

    def _num_batches(self, bucket: Size, num_epochs: int) -> int:
        needed = num_epochs * self._repeats * len(self._members[bucket])
        return -(-needed // self.global_batch_size)

    def _batches_of(self, epoch: int) -> list[tuple[Size, int]]:
        """The (bucket, number of the batch in its stream) of one epoch, shuffled."""
        if self._epoch[0] != epoch:
            batches = [
                (bucket, number)
                for bucket in self.buckets
                for number in range(
                    self._num_batches(bucket, epoch), self._num_batches(bucket, epoch + 1)
                )
            ]
            order = derive_order(len(batches), self._seed, _BATCH_ORDER, epoch)
            self._epoch = (epoch, [batches[i] for i in order])
            self._shuffles.clear()
        return self._epoch[1]

    def _item(self, bucket: Size, number: int) -> int:
        """The sample at one place of a bucket's endless stream."""
        members = self._members[bucket]
        turn, place = divmod(number, len(members))
        if (bucket, turn) not in self._shuffles:
            order = derive_order(len(members), self._seed, _SAMPLE_ORDER, *bucket, turn)
            self._shuffles[bucket, turn] = members[order]
        return int(self._shuffles[bucket, turn][place])


class MicroStepBatchSampler:
    """Feeds a DataLoader one process's batches, from micro-step `start` on, without end.

    A resumed run makes a new one with the micro-step that it has reached; workers and prefetching don't matter.
    """

    def __init__(self, plan: BatchPlan, *, start: int = 0, rank: int = 0) -> None:
        self.plan = plan
        self.start = start
        self.rank = rank

    def __iter__(self) -> Iterator[list[ItemRequest]]:
        micro_step = self.start
        while True:
            yield self.plan.batch(micro_step, rank=self.rank)
            micro_step += 1


def ordered_batches(
    bucket_of: Sequence[Size], *, batch_size: int, world_size: int = 1, rank: int = 0
) -> list[list[ItemRequest]]:
    """Every sample once in a fixed order, for validation; the batches are dealt out to the ranks in turn.

    The last batch of a bucket may be short, and ranks may differ by one batch. micro_step is 0, position is the
    sample's index.
    """
    batches: list[list[ItemRequest]] = []
    for bucket in sorted(set(bucket_of)):
        members = [index for index, other in enumerate(bucket_of) if other == bucket]
        for first in range(0, len(members), batch_size):
            chunk = members[first : first + batch_size]
            batches.append([ItemRequest(index, 0, index) for index in chunk])
    return batches[rank::world_size]
