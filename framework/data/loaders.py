"""DataLoaders that give the same batches with any number of workers and leave torch's global generator alone."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

from framework.data.batches import BatchPlan, ItemRequest, MicroStepBatchSampler, ordered_batches
from framework.data.dataset import TrainingDataset, collate


def build_train_loader(
    dataset: TrainingDataset,
    plan: BatchPlan,
    *,
    start: int = 0,
    rank: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[dict[str, Any]]:
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
) -> DataLoader[dict[str, Any]]:
    """Every sample once, in a fixed order, dealt out to the ranks; see `ordered_batches`."""
    batches: list[list[ItemRequest]] = ordered_batches(
        dataset.bucket_of, batch_size=batch_size, world_size=world_size, rank=rank
    )
    return _build(dataset, batches, num_workers=num_workers, pin_memory=pin_memory)


def _build(
    dataset: TrainingDataset, batches: Any, *, num_workers: int, pin_memory: bool
) -> DataLoader[dict[str, Any]]:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        # Starting an iterator draws a seed for the workers; from torch's own generator that would change the
        # numbers which the training step draws, once more for every resume.
        generator=torch.Generator().manual_seed(0),
    )
