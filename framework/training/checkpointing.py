"""When checkpoints are written, and how a run stops when it is asked to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from framework.errors import RunStopped
from framework.schema import CheckpointConfig
from framework.training.checkpoint_io import checkpoint_name, prune_checkpoints
from framework.training.run_folder import CHECKPOINT_FOLDER

log = logging.getLogger("octavo")


class CheckpointCallback(pl.Callback):
    """Writes a checkpoint every so many optimizer steps and after the last; must stand last.

    Only between optimizer steps, so that no gradient is half accumulated. When the process is asked to end
    (SIGTERM), the step is completed, its checkpoint is written and the run stops.
    on_saved: called on the first process after each checkpoint.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        self._config = config
        self._last_step = 0
        self._asked_to_end = False
        self.run_dir: Path | None = None
        self.on_saved: Callable[[], None] = lambda: None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that goes on has the checkpoint of its step already."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object
    ) -> None:
        """Write where a step is due."""
        if trainer.received_sigterm and trainer.world_size == 1:
            self._asked_to_end = True
            # Lightning would stop after this micro-step, in the midst of a step where gradients are accumulated.
            trainer._signal_connector.received_sigterm = False
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        due = step % self._config.every_n_steps == 0 or step == trainer.max_steps
        if due or self._asked_to_end:
            self._save(trainer, step)
        if self._asked_to_end and step < trainer.max_steps:
            raise RunStopped(
                f"the run was asked to end (SIGTERM) and stopped after step {step}",
                hint="the same command goes on from there",
            )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Say after Ctrl-C, which Lightning turns into a silent exit, how the run can go on."""
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            log.warning("stopped; the same command goes on from the run's last checkpoint")

    def _save(self, trainer: pl.Trainer, step: int) -> None:
        assert self.run_dir is not None
        folder = self.run_dir / CHECKPOINT_FOLDER
        module: Any = trainer.lightning_module
        with module.peaks.phase("save"):
            trainer.save_checkpoint(folder / checkpoint_name(step))
        if trainer.is_global_zero:
            self.on_saved()
            prune_checkpoints(folder, self._config.keep_last)
