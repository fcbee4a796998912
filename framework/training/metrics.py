"""What is logged of a step: loss, gradient norm, rate, time, memory, and what validation found."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch

from framework.training.memory import peak_memory_bytes


class StepClock(pl.Callback):
    """Measures the seconds of each optimizer step, data loading included, validation and samples not.

    Must stand first among the callbacks.
    """

    def __init__(self) -> None:
        self.step_seconds = 0.0
        self._since = 0.0
        self._running = 0.0
        self._last_step = 0

    def restart(self) -> None:
        """Begin a micro-step; the module calls it after all callbacks have run."""
        self._since = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begin; the module restarts the clock once all callbacks have started."""
        self._last_step = trainer.global_step
        self._running = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: object) -> None:
        """Add the micro-step; at the end of an optimizer step, note its sum."""
        self._running += time.perf_counter() - self._since
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self.step_seconds, self._running = self._running, 0.0


class MetricsCallback(pl.Callback):
    """Averages losses over micro-steps and ranks and writes one row per logged step to every logger.

    Losses are averaged over all optimizer steps since the last row. The running sums are part of the
    checkpoint, so a resumed run writes the same rows. Other callbacks put what they found of the present
    step into `pending`; it is written with the row.
    """

    def __init__(self, clock: StepClock, *, every_n_steps: int) -> None:
        self._clock = clock
        self._every_n_steps = every_n_steps
        self._sums: dict[str, float] = {}
        self._num_steps = 0
        self._seconds = 0.0
        self._last_step = 0
        self.pending: dict[str, float] = {}
        self.wrote_row = False
        self.last_loss = float("nan")
        self.last_step_seconds = 0.0
        self.last_validation: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write what was found before the first step."""
        self._last_step = trainer.global_step
        if self.pending:
            self._write(trainer, {})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: object) -> None:
        """After an optimizer step: take its losses, and write a row where one is due."""
        self.wrote_row = False
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        for name, value in mean_over_ranks(trainer, pl_module.take_step_losses()).items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._num_steps += 1
        self._seconds += self._clock.step_seconds
        self.last_loss = self._sums["train/loss"] / self._num_steps
        self.last_step_seconds = self._clock.step_seconds
        if step % self._every_n_steps == 0 or step == trainer.max_steps or self.pending:
            self._write(trainer, self._row(trainer, pl_module))

    def _row(self, trainer: pl.Trainer, module: Any) -> dict[str, float]:
        row = {name: total / self._num_steps for name, total in self._sums.items()}
        row["train/grad_norm"] = float(module.grad_norm)
        row["lr"] = module.last_lr
        row["step_seconds"] = self._seconds / self._num_steps
        row["peak_memory_bytes"] = float(peak_memory_bytes(module.device))
        self._sums, self._num_steps, self._seconds = {}, 0, 0.0
        return row

    def _write(self, trainer: pl.Trainer, row: dict[str, float]) -> None:
        row = {**row, **self.pending}
        self.last_validation = self.pending.get("val/loss", self.last_validation)
        self.pending = {}
        self.wrote_row = True
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Sums since the last row."""
        return {
            "sums": dict(self._sums),
            "num_steps": self._num_steps,
            "seconds": self._seconds,
            "last_loss": self.last_loss,
            "last_validation": self.last_validation,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a checkpoint's sums."""
        self._sums = dict(state_dict["sums"])
        self._num_steps = state_dict["num_steps"]
        self._seconds = state_dict.get("seconds", 0.0)
        self.last_loss = state_dict["last_loss"]
        self.last_validation = state_dict["last_validation"]


def mean_over_ranks(trainer: pl.Trainer, values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Average scalars over all processes; every process must call it with the same names."""
    if trainer.world_size == 1 or not values:
        return {name: float(value) for name, value in values.items()}
    stacked = torch.stack([value.double() for value in values.values()])
    means = trainer.strategy.reduce(stacked, reduce_op="mean")
    return dict(zip(values, means.tolist(), strict=True))
