"""When checkpoints are written, and how a run stops when it is asked to."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl

from framework.errors import RunError
from framework.schema import CheckpointConfig
from framework.training.checkpoint_io import checkpoint_name, prune_checkpoints
from framework.training.run_folder import CHECKPOINT_FOLDER


class CheckpointCallback(pl.Callback):
    """Writes a checkpoint every so many optimizer steps and after the last; must stand last.

    Only between optimizer steps, so that no gradient is half accumulated. When the process is asked to end
    (SIGTERM), the checkpoint of the step is written and the run stops.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        self._config = config
        self._last_step = 0
        self.run_dir: Path | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that goes on has the checkpoint of its step already."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object
    ) -> None:
        """Write where a step is due."""
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        asked_to_end = trainer.received_sigterm and trainer.world_size == 1
        if step % self._config.every_n_steps == 0 or step == trainer.max_steps or asked_to_end:
            self._save(trainer, step)
        if asked_to_end and step < trainer.max_steps:
            raise RunError(
                f"the run was asked to end (SIGTERM) and stopped after step {step}",
                hint="the same command goes on from there",
            )

    def _save(self, trainer: pl.Trainer, step: int) -> None:
        assert self.run_dir is not None
        folder = self.run_dir / CHECKPOINT_FOLDER
        trainer.save_checkpoint(folder / checkpoint_name(step))
        if trainer.is_global_zero:
            prune_checkpoints(folder, self._config.keep_last)
