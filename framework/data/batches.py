"""Which samples stand in which batch: a pure function of the micro-step, so that resume is exact without saved state.

Every bucket is an endless stream: its samples shuffled, then shuffled anew, and so on. The stream is cut
into global batches. Epoch e takes of each bucket as many whole batches as it needs to have gone through its
samples (e + 1) x repeats times since the start, and shuffles the batches of all buckets. So:

- after every epoch each sample has been seen `repeats` times per epoch or more; none is left out;
- where a bucket doesn't divide into batches, its last batch is filled from its next shuffle, and later
  epochs are that much shorter: over a long run every sample is seen equally often.

Samples may have repeats of their own, which needn't be whole (2.5, where sources have weights). Then a bucket's stream
is the occurrences of one epoch shuffled, those of the next, and so on: until the end of epoch e a sample occurs
floor((e + 1) x repeats + phase) times, so 2.5 means 2 and 3 in turn, never far from its share. The phases, in [0, 1),
lie evenly over the samples of a bucket in an order drawn from the seed, so that an epoch isn't all roundings up.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from framework.data.media import Bucket
from framework.data.seeds import derive_order
from framework.errors import DataError

_SAMPLE_ORDER = 1  # what a derived seed is for, so that no two uses share one
_BATCH_ORDER = 2
_PHASE_ORDER = 4  # 3 is in dataset.py


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
    repeats: how often a sample stands in an epoch: a whole number for all, or one number >= 0 for each sample.
    world_size: processes; each takes its own part of the global batch, so the global batch depends only on
    batch_size x world_size.   Raises DataError when there is no sample.
    """

    def __init__(
        self,
        bucket_of: Sequence[Bucket],
        *,
        batch_size: int,
        seed: int,
        repeats: int | Sequence[float] = 1,
        world_size: int = 1,
    ) -> None:
        if not bucket_of:
            raise DataError(
                "no pictures to train on", hint="add pictures, or hold fewer of them out"
            )
        members: dict[Bucket, list[int]] = defaultdict(list)
        for index, bucket in enumerate(bucket_of):
            members[bucket].append(index)
        rates = np.broadcast_to(np.asarray(repeats, dtype=np.float64), len(bucket_of))
        assert (rates >= 0).all(), "repeats below 0"
        assert rates.sum() > 0, "no sample is ever taken"
        self.buckets = sorted(members)
        self.batch_size = batch_size
        self.world_size = world_size
        self.global_batch_size = batch_size * world_size
        self._seed = seed
        self._num_samples = len(bucket_of)
        self._epoch_items = float(rates.sum())
        self._streams = {
            bucket: _build_stream(bucket, np.array(members[bucket]), rates, seed)
            for bucket in self.buckets
        }
        self._steps_before: dict[int, int] = {}
        self._epoch: tuple[int, list[tuple[Bucket, int]]] = (-1, [])  # the last one used

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
        stream = self._streams[bucket]
        return [stream.item(i) for i in range(first, first + self.global_batch_size)]

    def epoch_of(self, micro_step: int) -> int:
        """The epoch that a micro-step belongs to, from 0."""
        # An upper bound: after e epochs at least e * epoch_items - num_samples samples have been seen.
        seen = (micro_step + 1) * self.global_batch_size + self._num_samples
        limit = int(seen / self._epoch_items) + 2
        return bisect_right(range(limit), micro_step, key=self.num_steps_before) - 1

    def num_steps_before(self, epoch: int) -> int:
        """Micro-steps of all epochs before this one."""
        if epoch not in self._steps_before:
            self._steps_before[epoch] = sum(
                self._num_batches(bucket, epoch) for bucket in self.buckets
            )
        return self._steps_before[epoch]

    def _num_batches(self, bucket: Bucket, num_epochs: int) -> int:
        return -(-self._streams[bucket].num_items(num_epochs) // self.global_batch_size)

    def _batches_of(self, epoch: int) -> list[tuple[Bucket, int]]:
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
            for stream in self._streams.values():
                stream.forget()
        return self._epoch[1]


class _EvenStream:
    """A bucket's samples without end where all have the same whole repeats: shuffled, then shuffled anew."""

    def __init__(self, bucket: Bucket, members: np.ndarray, repeats: int, seed: int) -> None:
        self._bucket = bucket
        self._members = members
        self._repeats = repeats
        self._seed = seed
        self._shuffles: dict[int, np.ndarray] = {}

    def num_items(self, num_epochs: int) -> int:
        """How far the stream must have gone at the end of so many epochs."""
        return num_epochs * self._repeats * len(self._members)

    def item(self, number: int) -> int:
        """The sample at one place."""
        turn, place = divmod(number, len(self._members))
        if turn not in self._shuffles:
            order = derive_order(len(self._members), self._seed, _SAMPLE_ORDER, *self._bucket, turn)
            self._shuffles[turn] = self._members[order]
        return int(self._shuffles[turn][place])

    def forget(self) -> None:
        """Let the shuffles go."""
        self._shuffles.clear()


class _UnevenStream:
    """A bucket's samples without end where each has repeats of its own, which needn't be whole."""

    def __init__(self, bucket: Bucket, members: np.ndarray, rates: np.ndarray, seed: int) -> None:
        self._bucket = bucket
        self._members = members
        self._rates = rates
        self._seed = seed
        self._phases = np.empty(len(members))
        order = derive_order(len(members), seed, _PHASE_ORDER, *bucket)
        self._phases[order] = (np.arange(len(members)) + 0.5) / len(members)
        self._num_items: dict[int, int] = {}
        self._epochs: dict[int, np.ndarray] = {}

    def num_items(self, num_epochs: int) -> int:
        """How far the stream must have gone at the end of so many epochs."""
        if num_epochs not in self._num_items:
            self._num_items[num_epochs] = int(self._occurrences(num_epochs).sum())
        return self._num_items[num_epochs]

    def item(self, number: int) -> int:
        """The sample at one place."""
        # An upper bound, as in `BatchPlan.epoch_of`.
        limit = int((number + 1 + len(self._members)) / self._rates.sum()) + 2
        epoch = bisect_right(range(limit), number, key=self.num_items) - 1
        if epoch not in self._epochs:
            copies = self._occurrences(epoch + 1) - self._occurrences(epoch)
            occurrences = self._members.repeat(copies)
            order = derive_order(len(occurrences), self._seed, _SAMPLE_ORDER, *self._bucket, epoch)
            self._epochs[epoch] = occurrences[order]
        return int(self._epochs[epoch][number - self.num_items(epoch)])

    def forget(self) -> None:
        """Let the shuffles go."""
        self._epochs.clear()

    def _occurrences(self, num_epochs: int) -> np.ndarray:
        """How often each sample occurs in the first epochs, (samples,) int64."""
        return np.floor(num_epochs * self._rates + self._phases).astype(np.int64)


def _build_stream(
    bucket: Bucket, members: np.ndarray, rates: np.ndarray, seed: int
) -> _EvenStream | _UnevenStream:
    own = rates[members]
    if (own == own[0]).all() and float(own[0]).is_integer() and own[0] > 0:
        return _EvenStream(bucket, members, int(own[0]), seed)
    return _UnevenStream(bucket, members, own, seed)


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
    bucket_of: Sequence[Bucket], *, batch_size: int, world_size: int = 1, rank: int = 0
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
