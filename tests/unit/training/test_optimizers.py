from __future__ import annotations

import pytest
import torch
from torch import nn

from framework.errors import ConfigError
from framework.schema import OptimConfig
from framework.training import optimizers
from framework.training.optimizers import (
    apply_settings_,
    build_optimizer,
    build_schedule,
    check_optimizer,
    parameter_groups,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def rates(optim: OptimConfig, steps: int) -> list[float]:
    """The rate that each optimizer step uses."""
    module = network()
    optimizer = build_optimizer(optim, module.named_parameters())
    schedule = build_schedule(optim, optimizer, steps)
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        module(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        schedule.step()
    return used


def test_a_constant_schedule_runs_at_the_full_rate_from_the_first_step_to_the_last() -> None:
    assert rates(OptimConfig(lr=0.5), 10) == [0.5] * 10


def test_warm_up_rises_from_zero() -> None:
    used = rates(OptimConfig(lr=1.0, warmup_steps=4), 8)
    assert used == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 1, 1])


def test_linear_falls_to_one_step_above_zero() -> None:
    used = rates(OptimConfig(lr=1.0, schedule="linear"), 4)
    assert used == pytest.approx([1, 0.75, 0.5, 0.25])


def test_cosine_begins_at_the_full_rate_and_ends_near_zero() -> None:
    used = rates(OptimConfig(lr=1.0, schedule="cosine"), 100)
    assert used[0] == 1.0
    assert used[50] == pytest.approx(0.5)
    assert 0 < used[-1] < 0.001


def test_norms_and_biases_do_not_decay() -> None:
    groups = parameter_groups(network().named_parameters(), 0.1)
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(2, 0.1), (4, 0.0)]
    assert all(p.ndim > 1 for p in groups[0]["params"])


def test_frozen_parameters_are_in_no_group() -> None:
    module = network()
    module[0].requires_grad_(False)
    groups = parameter_groups(module.named_parameters(), 0.1)
    assert sum(len(group["params"]) for group in groups) == 4


@pytest.mark.parametrize(
    "name", ["adamw", "adam", "nadam", "radam", "adafactor", "sgd", "rmsprop", "adagrad"]
)
def test_every_torch_optimizer_lowers_a_loss(name: str) -> None:
    module = network()
    optim = OptimConfig(name=name, lr=0.01)
    optimizer = build_optimizer(optim, module.named_parameters())
    inputs = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(30):
        loss = (module(inputs) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_betas_reach_the_optimizer() -> None:
    optimizer = build_optimizer(OptimConfig(betas=(0.8, 0.7)), network().named_parameters())
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.7)


def test_betas_of_an_optimizer_without_them_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim.betas: 'sgd' has no betas"):
        check_optimizer(OptimConfig(name="sgd", betas=(0.9, 0.9)))


def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"bitsandbytes.*\n.*octavo\[eightbit\]"):
        check_optimizer(OptimConfig(name="adamw_8bit"))


def test_unchanged_settings_leave_a_restored_state_as_it_is() -> None:
    optim = OptimConfig(lr=3e-4, schedule="cosine", warmup_steps=3)
    module = network()
    optimizer = build_optimizer(optim, module.named_parameters())
    schedule = build_schedule(optim, optimizer, 10)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    before = [dict(group, params=None) for group in optimizer.param_groups]
    apply_settings_(optimizer, schedule, optim)
    assert [dict(group, params=None) for group in optimizer.param_groups] == before


def test_a_new_rate_is_put_over_a_restored_one() -> None:
    old, new = OptimConfig(lr=1.0), OptimConfig(lr=0.1, weight_decay=0.5)
    module = network()
    optimizer = build_optimizer(old, module.named_parameters())
    schedule = build_schedule(old, optimizer, 10)
    apply_settings_(optimizer, schedule, new)
    optimizer.step()
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.1]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.0]
