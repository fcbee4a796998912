"""Every random draw of a micro-step follows from the run's seed, so that a resumed run can't differ.

Noise, noise levels and caption dropout have seeds of their own (`framework.diffusion`, `framework.data`).
What is left, such as adapter dropout, draws from the global generators; they are seeded anew before each
micro-step.
"""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from framework.diffusion.flow_matching import sample_seed


class SeedEachMicroStep(pl.Callback):
    """Seeds the global generators from (seed, micro-step, rank) before each micro-step."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed; ranks differ, or they would drop the same adapter inputs."""
        seed_generators(sample_seed(self._seed, batch_idx, trainer.global_rank, "global"))


def seed_generators(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators, on every device. seed: 63 bits."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


def generator_states() -> dict[str, Any]:
    """States of the global generators as plain data that torch loads with `weights_only`."""
    state: Any = np.random.get_state()
    kind, keys, position, has_gauss, gauss = state
    return {
        "python": list(random.getstate()[1]),
        "python_gauss": random.getstate()[2],
        "numpy": [str(kind), keys.tolist(), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_generator_states_(states: dict[str, Any]) -> None:
    """Set the global generators to what `generator_states` returned."""
    random.setstate((3, tuple(states["python"]), states["python_gauss"]))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
