"""DataLoaders that give the same batches with any number of workers and leave torch's global generator alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from framework.data.batches import BatchPlan, ItemRequest, MicroStepBatchSampler, ordered_batches
from framework.data.collating import collate
from framework.data.dataset import TrainingDataset
from framework.errors import OctavoError


def build_train_loader(
    dataset: TrainingDataset,
    plan: BatchPlan,
    *,
    start: int = 0,
    rank: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> BatchLoader:
    """Batches of one process from micro-step `start` on, without end (so it has no length).

    num_workers: processes that read pictures.   pin_memory: for copies to a GPU.
    """
    sampler = MicroStepBatchSampler(plan, start=start, rank=rank)
    return _build(dataset, sampler, num_workers=num_workers, pin_memory=pin_memory)


def build_validation_loader(
    dataset: TrainingDataset,
    *,
    batch_size: int,
    world_size: int = 1,
    rank: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> BatchLoader:
    """Every sample once, in a fixed order, dealt out to the ranks; see `ordered_batches`."""
    batches: list[list[ItemRequest]] = ordered_batches(
        dataset.bucket_of, batch_size=batch_size, world_size=world_size, rank=rank
    )
    return _build(dataset, batches, num_workers=num_workers, pin_memory=pin_memory)


class BatchLoader(DataLoader[Any]):
    """A DataLoader whose workers hand our own errors over whole, instead of as the text of a traceback."""

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        batches = super().__iter__()
        while (batch := next(batches, None)) is not None:
            if isinstance(batch, OctavoError):
                # Let the workers go now: left to the garbage collector they take 5 s each to end.
                del batches
                self._iterator = None
                raise batch
            yield batch


class _HandsErrorsOver(Dataset[Any]):
    """Gives a sample, or the error that reading it raised."""

    def __init__(self, dataset: TrainingDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, request: ItemRequest) -> dict[str, Any] | OctavoError:
        try:
            return self.dataset[request]
        except OctavoError as error:
            error.__traceback__ = None
            return error


def _collate(items: list[dict[str, Any] | OctavoError]) -> dict[str, Any] | OctavoError:
    samples: list[dict[str, Any]] = []
    for item in items:
        if isinstance(item, OctavoError):
            return item
        samples.append(item)
    return collate(samples)


def _build(
    dataset: TrainingDataset, batches: Any, *, num_workers: int, pin_memory: bool
) -> BatchLoader:
    return BatchLoader(
        _HandsErrorsOver(dataset),
        batch_sampler=batches,
        collate_fn=_collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        # Starting an iterator draws a seed for the workers; from torch's own generator that would change
        # the numbers which the training step draws, once more for every resume.
        generator=torch.Generator().manual_seed(0),
    )
