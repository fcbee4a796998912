"""The optimizers and learning-rate schedules that `optim` names, taken from torch and diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from framework.errors import ConfigError, Fault
from framework.schema import OptimConfig

# name -> (module, the extra of this package that installs it)
_EXTRA_PACKAGES = {
    "adamw_8bit": ("bitsandbytes", "eightbit"),
    "paged_adamw_8bit": ("bitsandbytes", "eightbit"),
    "lion_8bit": ("bitsandbytes", "eightbit"),
    "prodigy": ("prodigyopt", "prodigy"),
}
_TORCH_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("AdamW", {}),
    "adam": ("Adam", {}),
    "nadam": ("NAdam", {"decoupled_weight_decay": True}),
    "radam": ("RAdam", {"decoupled_weight_decay": True}),
    "adafactor": ("Adafactor", {}),
    "sgd": ("SGD", {"momentum": 0.9}),
    "rmsprop": ("RMSprop", {}),
    "adagrad": ("Adagrad", {}),
}
_WITHOUT_BETAS = frozenset({"adafactor", "sgd", "rmsprop", "adagrad"})
_SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine", "linear": "linear"}


def check_optimizer(optim: OptimConfig) -> None:
    """Refuse an optimizer that can't be built, before any weight is read.

    Raises ConfigError where its package isn't installed or where it has no betas.
    """
    if optim.name in _EXTRA_PACKAGES:
        package, extra = _EXTRA_PACKAGES[optim.name]
        if find_spec(package) is None:
            raise ConfigError(
                [
                    Fault(
                        "optim.name",
                        f"{optim.name!r} needs the package {package}, which isn't installed",
                        hint=f"pip install 'octavo[{extra}]', or take optim.name=adamw",
                    )
                ]
            )
    if optim.betas is not None and optim.name in _WITHOUT_BETAS:
        raise ConfigError(
            [Fault("optim.betas", f"{optim.name!r} has no betas", hint="leave optim.betas unset")]
        )


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Split the parameters that train in two groups: matrices decay, norms and biases don't.

    A norm's gain or a bias is a vector whose size carries meaning of its own; pulling it to 0 hurts.
    Empty groups are left out. Order within a group is that of `named_parameters`.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for _, parameter in named_parameters:
        if parameter.requires_grad:
            (matrices if parameter.ndim > 1 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    optim: OptimConfig, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> Optimizer:
    """Build the optimizer that `optim` names; ConfigError as `check_optimizer`.

    Weight decay is decoupled (Loshchilov and Hutter 2017, arXiv:1711.05101) for adamw, nadam, radam,
    adafactor, prodigy and the 8-bit ones, and added to the gradient for adam, sgd, rmsprop, adagrad.
    """
    check_optimizer(optim)
    groups = parameter_groups(named_parameters, optim.weight_decay)
    arguments: dict[str, Any] = {"lr": optim.lr, "weight_decay": optim.weight_decay}
    if optim.betas is not None:
        arguments["betas"] = optim.betas
    factory, fixed = _factory(optim.name)
    return factory(groups, **arguments, **fixed)


def _factory(name: str) -> tuple[Callable[..., Optimizer], dict[str, Any]]:
    """The class behind a name and the arguments that are always given to it."""
    if name in _TORCH_CLASSES:
        class_name, fixed = _TORCH_CLASSES[name]
        return getattr(torch.optim, class_name), fixed
    if name == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy, {"decouple": True}
    import bitsandbytes

    classes = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
        "lion_8bit": bitsandbytes.optim.Lion8bit,
    }
    return classes[name], {}


def build_schedule(optim: OptimConfig, optimizer: Optimizer, max_steps: int) -> LambdaLR:
    """Build the schedule of the rate, to be stepped once per optimizer step.

    Step k (from 0) of the warm-up runs at lr * k / warmup_steps; without warm-up the first step runs at
    the full lr. `cosine` and `linear` then fall so that they would reach 0 at step `max_steps`.
    """
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        _SCHEDULES[optim.schedule],
        optimizer,
        num_warmup_steps=optim.warmup_steps,
        num_training_steps=max_steps,
    )


def apply_settings_(optimizer: Optimizer, schedule: LambdaLR, optim: OptimConfig) -> None:
    """Put the configured rate, betas and weight decay over those that a checkpoint brought back.

    A run that starts from another run's checkpoint may ask for another rate; loading the state alone
    would keep the old one in silence. With unchanged settings this changes no bit.
    """
    schedule.base_lrs = [optim.lr] * len(optimizer.param_groups)
    for group, factor in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
        group["initial_lr"] = optim.lr
        group["lr"] = optim.lr * factor(schedule.last_epoch)
        if group["params"][0].ndim > 1:
            group["weight_decay"] = optim.weight_decay
        if optim.betas is not None:
            group["betas"] = tuple(optim.betas)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
