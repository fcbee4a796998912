"""A moving average of the weights that train, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn


class TrainableEma:
    """Exponential moving average of the trained weights, in float32, on their device.

    average = d * average + (1 - d) * weight after each optimizer step, with d = min(decay, (1 + n) / (10 + n))
    at update n. The ramp lets a short run forget its first weights (as in TensorFlow's
    ExponentialMovingAverage with num_updates). Memory: 4 bytes per trained parameter.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self._parameters = dict(parameters)
        self.averages = {n: p.detach().float().clone() for n, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the present weights."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        for name, parameter in self._parameters.items():
            self.averages[name].lerp_(parameter.detach().float(), 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the averages in the weights' place for a while; the weights come back bit by bit.

        Memory while swapped: one more copy of the trained weights.
        """
        kept = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._write(self.averages)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, object]:
        """Plain data for a checkpoint: number of updates and the averages by parameter name."""
        return {"num_updates": self.num_updates, "averages": dict(self.averages)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over a checkpoint's averages; names and shapes have been checked with the weights'."""
        averages = state["averages"]
        updates = state["num_updates"]
        assert isinstance(averages, Mapping)
        assert isinstance(updates, int)
        self.num_updates = updates
        for name, average in self.averages.items():
            average.copy_(averages[name])


class UpdateEma(pl.Callback):
    """Moves the averages after each optimizer step; must stand before all that reads them."""

    def __init__(self) -> None:
        self._last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begin after the steps that a resumed run has behind it."""
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: object) -> None:
        """Update where an optimizer step was made."""
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            if pl_module.ema is not None:
                pl_module.ema.update()
