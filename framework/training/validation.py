"""The held-out loss at fixed noise levels and noise, so that its values can be compared between steps and runs."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from framework.diffusion.flow_matching import sample_seed
from framework.schema import ValidationConfig
from framework.training.metrics import MetricsCallback


class ValidateCallback(pl.Callback):
    """Judges the held-out pictures before training, every so many optimizer steps, and at the end.

    Runs in a callback and not in Lightning's evaluation loop, because it has to be over before the step's
    checkpoint is written: a run killed right after a checkpoint then lacks no value when it goes on.
    """

    def __init__(self, config: ValidationConfig, metrics: MetricsCallback) -> None:
        self._config = config
        self._metrics = metrics
        self._last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Validate a run that hasn't made a step."""
        self._last_step = trainer.global_step
        if trainer.global_step == 0:
            self._validate(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: object) -> None:
        """Validate where a step is due."""
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        if step % self._config.every_n_steps == 0 or step == trainer.max_steps:
            self._validate(trainer, pl_module)

    def _validate(self, trainer: Any, module: Any) -> None:
        loader = trainer.datamodule.validation_loader()
        if loader is None:
            return
        totals: dict[str, torch.Tensor] = {}
        count = 0
        with module.evaluating():
            for batch in loader:
                moved = trainer.strategy.batch_to_device(batch)
                count += len(moved["keys"])
                for name, losses in self._judge(module, moved).items():
                    # On the host, because Apple's GPU has no float64.
                    totals[name] = totals.get(name, 0.0) + losses.cpu().double().sum()
        self._metrics.pending.update(self._means(trainer, module, totals, count))

    def _judge(self, module: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Loss (B,) of each sample by name of the metric."""
        found: dict[str, torch.Tensor] = {}
        if module.trains_flow:
            seed = self._config.seed
            seeds = [sample_seed(seed, 0, 0, f"validation {key}") for key in batch["keys"]]
            for sigma in self._config.sigmas:
                found[sigma_metric(sigma)] = module.validation_losses(
                    batch, sigma=sigma, seeds=seeds
                )
        if module.trains_vae:
            found["val/vae_l1"] = module.reconstruction_errors(batch)
        return found

    def _means(
        self, trainer: pl.Trainer, module: Any, totals: dict[str, torch.Tensor], count: int
    ) -> dict[str, float]:
        """Means over the samples of all processes; a process may have had none."""
        names = [sigma_metric(s) for s in self._config.sigmas] if module.trains_flow else []
        names += ["val/vae_l1"] if module.trains_vae else []
        zero = torch.zeros((), dtype=torch.float64)
        values = [torch.tensor(float(count), dtype=torch.float64)]
        summed = torch.stack(values + [totals.get(name, zero) for name in names])
        if trainer.world_size > 1:
            device = trainer.strategy.root_device
            summed = trainer.strategy.reduce(summed.to(device), reduce_op="sum").cpu()
        means = dict(zip(names, (summed[1:] / summed[0]).tolist(), strict=True))
        flow = [means[name] for name in names if name != "val/vae_l1"]
        return {"val/loss": sum(flow) / len(flow) if flow else means["val/vae_l1"], **means}


def sigma_metric(sigma: float) -> str:
    """Name of the loss at one noise level, e.g. "val/loss_sigma_0.3"."""
    return f"val/loss_sigma_{sigma:g}"
