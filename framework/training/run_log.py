"""The loggers that `logger` names, writing into the run's folder."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from framework.errors import ConfigError, Fault
from framework.schema import RunConfig
from framework.training.metrics_csv import MetricsCsv
from framework.training.run_folder import read_state

METRICS_FILE = "metrics.csv"
TENSORBOARD_FOLDER = "tensorboard"


def check_loggers(config: RunConfig) -> None:
    """Refuse loggers whose package isn't installed, before any weight is read."""
    if config.logger.wandb is not None and find_spec("wandb") is None:
        raise ConfigError(
            [
                Fault(
                    "logger.wandb",
                    "Weights & Biases needs the package wandb, which isn't installed",
                    hint="pip install 'octavo[wandb]', or set logger.wandb=null",
                )
            ]
        )


def build_loggers(config: RunConfig, run_dir: Path, *, resume_step: int | None) -> list[Logger]:
    """Open the loggers; each writes on the first process only.

    resume_step: what was logged after this step is dropped; None starts anew.
    """
    loggers: list[Logger] = []
    if config.logger.csv:
        loggers.append(MetricsCsv(run_dir / METRICS_FILE, resume_step=resume_step))
    if config.logger.tensorboard:
        purge_step = None if resume_step is None else resume_step + 1
        loggers.append(
            TensorBoardLogger(run_dir, name="", version=TENSORBOARD_FOLDER, purge_step=purge_step)
        )
    wandb = config.logger.wandb
    if wandb is not None:
        from lightning.pytorch.loggers import WandbLogger

        loggers.append(
            WandbLogger(
                project=wandb.project,
                entity=wandb.entity,
                offline=wandb.mode == "offline",
                name=f"{config.run.name}/{run_dir.name}",
                # Not the name: another machine or folder has a run of the same name and number, whose rows would
                # then be continued.
                id=read_state(run_dir).get("id"),
                save_dir=run_dir,
                resume="allow",
            )
        )
    return loggers
