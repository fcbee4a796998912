"""A whole run: from a checked configuration to a folder with what was trained."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from framework.errors import ConfigError, Fault, RunError, RunStopped
from framework.inference.generate import load_family_extras
from framework.models import get_family
from framework.plan.build import build_run_plan
from framework.runtime.devices import resolve_compute_dtype, resolve_device
from framework.runtime.forecast import traced_run
from framework.schema import RunConfig
from framework.training.checkpoint_io import AtomicCheckpointIO
from framework.training.checkpointing import CheckpointCallback
from framework.training.data_module import DiffusionDataModule
from framework.training.ema import UpdateEma
from framework.training.encoding_log import EncodingLog, cache_folder, plan_within_budget
from framework.training.fitting import resolve_fit
from framework.training.lifecycle import RunLifecycle
from framework.training.metrics import MetricsCallback, StepClock
from framework.training.module import DiffusionTrainingModule
from framework.training.optimizers import check_optimizer
from framework.training.progress import StepProgress, show_log
from framework.training.reproducibility import SeedEachMicroStep, seed_generators
from framework.training.results import RunResult, check_exports
from framework.training.run_folder import check_same_sources, find_start
from framework.training.run_log import check_loggers
from framework.training.sampling import SampleCallback
from framework.training.validation import ValidateCallback

_PRECISIONS: dict[str, Any] = {"bf16": "bf16-mixed", "fp16": "16-mixed", "fp32": "32-true"}
# Processes wait for the first one while it samples; longer than that, something is stuck. A guess.
_PROCESS_TIMEOUT = timedelta(hours=2)
# Warnings about what this package does on purpose, by the beginning of their text.
_EXPECTED_WARNINGS = (
    # frozen components are in eval mode while adapters on them train
    r".*module\(s\) in eval mode at the start of training",
    # a machine that has Slurm may also be used without it
    r"The `srun` command is available on your system but is not used",
    # workers are the user's choice; small data sets are faster without
    r".*does not have many workers which may be a bottleneck",
    # layers of the last block that take no part in the picture have no gradient, so DDP must look for them
    r".*find_unused_parameters=True was specified in DDP constructor",
    # a run that goes on finds its own folder
    r".*Experiment logs directory .* exists and is not empty",
    # norms that train in float32 see activations in the compute dtype
    r"Mismatch dtype between input and weight",
    # Lightning 2.6 asks torch's tree specs in their old way
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # a loss scaler may skip the first step
    r".*Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`",
)


def fit(config: RunConfig, *, config_yaml: str) -> RunResult:
    """Train as `config` says and return where the results are.

    config_yaml: the resolved configuration as text, kept in the run's folder.
    Everything that can be judged without weights is judged first. Raises ConfigError, SourceError, DataError or
    PlanError before training and RunError where it can't be started, resumed or finished.
    """
    device = _check_machine(config)
    with show_log():
        config, config_yaml = resolve_fit(config, config_yaml, device=str(device))
    plan = check_exports(config, build_run_plan(config, device=str(device)))
    family = get_family(config.model.family)
    load_family_extras(family, config.model)
    start = find_start(config)
    check_same_sources(start, {c.name: c.commit for c in plan.components})
    plan, chosen = plan_within_budget(config, plan, family, device=device, start=start)
    plan = traced_run(plan, config, family=family)

    clock = StepClock()
    metrics = MetricsCallback(clock, every_n_steps=config.trainer.log_every_n_steps)
    samples = SampleCallback(config.sample)
    checkpoints = CheckpointCallback(config.checkpoint)
    lifecycle = RunLifecycle(
        config,
        config_yaml=config_yaml,
        plan=plan,
        start=start,
        metrics=metrics,
        writers=(samples, checkpoints),
    )
    callbacks: list[pl.Callback] = [
        lifecycle,
        EncodingLog(lifecycle, plan, family, folder=cache_folder(config), chosen=chosen),
        clock,
        SeedEachMicroStep(config.trainer.seed),
        UpdateEma(),
        ValidateCallback(config.validation, metrics),
        samples,
        metrics,
        StepProgress(metrics),
        checkpoints,
    ]
    with _quiet_libraries(), show_log():
        seed_generators(config.trainer.seed)
        trainer = _build_trainer(config, device, callbacks, root_dir=start.parent)
        module = DiffusionTrainingModule(
            config, plan=plan, family=family, clock=clock, goes_on=start.folder is not None
        )
        data = DiffusionDataModule(config, plan=plan, family=family)
        try:
            with _translated_errors():
                trainer.fit(module, datamodule=data, ckpt_path=start.checkpoint)
            if lifecycle.result is None:
                # The run was killed after its last checkpoint: there was no step left to make.
                lifecycle.finish(trainer, module)
        finally:
            lifecycle.release()
            module.release()
    assert lifecycle.result is not None
    return lifecycle.result


def _check_machine(config: RunConfig) -> torch.device:
    """Refuse what this machine can't do, and return the device to train on."""
    check_optimizer(config.optim)
    check_loggers(config)
    device = resolve_device(config.model.device)
    _check_processes(config, device)
    resolve_compute_dtype(config.model.compute_dtype, device)
    return device


@contextmanager
def _translated_errors() -> Iterator[None]:
    """Turn what others raise when a run is ended from outside or outgrows the device into a RunError."""
    try:
        yield
    except SIGTERMException as error:
        hint = "the same command goes on from the last checkpoint"
        raise RunStopped("the run was asked to end (SIGTERM)", hint=hint) from error
    except torch.OutOfMemoryError as error:
        raise RunError(
            "the device's memory is full",
            found=str(error).partition(". ")[0],
            hint="`octavo plan --fit SIZE` chooses settings for a card of that size, model.fit=SIZE takes them. Or set "
            "model.dit.precision=fp8, model.dit.gradient_checkpointing=true, a smaller data.batch_size with "
            "more trainer.accumulate_grad_batches, a smaller data.max_px or sample.size_px",
        ) from error


def _build_trainer(
    config: RunConfig, device: torch.device, callbacks: list[pl.Callback], *, root_dir: Path
) -> pl.Trainer:
    """Lightning's Trainer for one endless epoch of micro-steps; length is `max_steps` alone.

    root_dir: where Lightning would look for checkpoints of its own; nothing is written there.
    """
    settings = config.trainer
    one = settings.devices == 1 and device.index is not None
    devices: Any = [device.index] if one else settings.devices
    return pl.Trainer(
        accelerator=device.type,
        devices=devices,
        num_nodes=settings.num_nodes,
        strategy=_strategy(config, device.type),
        precision=_PRECISIONS[config.model.compute_dtype],
        max_steps=settings.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        gradient_clip_val=settings.gradient_clip_val,
        plugins=_plugins(),
        default_root_dir=root_dir,
        callbacks=callbacks,
        logger=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _plugins() -> list[Any]:
    """How checkpoints are written, and Slurm's environment without Lightning's own way to resume.

    That one saves amid a step to the current folder, and any later run that starts there loads it unasked.
    """
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return plugins


def _strategy(config: RunConfig, kind: str) -> Strategy | str:
    settings = config.trainer
    if settings.strategy == "auto" and settings.devices * settings.num_nodes == 1:
        return "auto"
    return DDPStrategy(
        process_group_backend="gloo" if kind == "cpu" else None,
        find_unused_parameters=True,
        timeout=_PROCESS_TIMEOUT,
    )


def _check_processes(config: RunConfig, device: torch.device) -> None:
    """Refuse more processes than devices."""
    wanted = config.trainer.devices
    if wanted > 1 and ":" in config.model.device:
        message = f"{wanted} processes can't share {config.model.device}"
        hint = "Set model.device=cuda, or trainer.devices=1."
        raise ConfigError([Fault("trainer.devices", message, hint=hint, code="rule")])
    available = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device.type, wanted)
    if wanted > available:
        message = f"{wanted} processes need as many devices; this machine has {available}"
        hint = f"Set trainer.devices={available}."
        raise ConfigError([Fault("trainer.devices", message, hint=hint, code="rule")])


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Hold back Lightning's notes, and warnings about what is done here on purpose; no others."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in _EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
