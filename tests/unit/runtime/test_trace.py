"""Counting live bytes: on real tensors, on fake ones, and what optimizers hold while they step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from framework.plan.optimizer_state import optimizer_step_bytes
from framework.runtime.trace import ACTIVATIONS, MeasuredBytes
from framework.training.optimizers import _TORCH_CLASSES

MIB = 2**20


def bytes_tensor(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8)


def test_what_is_alive_counts_and_what_is_freed_does_not() -> None:
    with MeasuredBytes("cpu") as counter:
        first = bytes_tensor(MIB)
        second = bytes_tensor(2 * MIB)
        assert counter.current_bytes == 3 * MIB
        del second
        assert counter.current_bytes == MIB
        assert counter.peak_bytes == 3 * MIB
        counter.restart()
        assert counter.peak_bytes == MIB
        del first
    assert counter.current_bytes == 0


def test_a_storage_counts_once_however_many_tensors_share_it() -> None:
    with MeasuredBytes("cpu") as counter:
        whole = bytes_tensor(MIB)
        part = whole[: MIB // 2].view(2, -1)
        assert counter.current_bytes == MIB
        del whole
        assert counter.current_bytes == MIB
        del part
        assert counter.current_bytes == 0


def test_labels_say_what_bytes_are_for_at_the_peak() -> None:
    before = bytes_tensor(MIB)
    with MeasuredBytes("cpu") as counter:
        counter.label([before], "weights")
        gradient = bytes_tensor(MIB // 2)
        counter.label([gradient], "gradients")
        passing = bytes_tensor(MIB // 4)
        del passing, gradient
    assert counter.peak_by_label == {
        "weights": MIB,
        "gradients": MIB // 2,
        ACTIVATIONS: MIB // 4,
    }
    assert sum(counter.peak_by_label.values()) == counter.peak_bytes
    assert counter.current_bytes == MIB
    assert counter.host_peak_bytes == counter.peak_bytes


def test_tensors_elsewhere_do_not_count() -> None:
    with MeasuredBytes("cpu") as counter:
        elsewhere = torch.empty(MIB, device="meta")
        assert elsewhere.numel() == MIB
        assert counter.peak_bytes == 0


def peak_of_a_step() -> tuple[int, dict[str, int]]:
    layers = [nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)]
    module = nn.Sequential(*layers)
    x = torch.ones(32, 64)
    with MeasuredBytes("cpu") as counter:
        counter.label(module.parameters(), "weights")
        counter.label([x], "input")
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = module(x).float().square().mean()
        loss.backward()
        return counter.peak_bytes, counter.peak_by_label


def test_fake_tensors_take_what_real_ones_take() -> None:
    real = peak_of_a_step()
    with FakeTensorMode():
        assert peak_of_a_step() == real
    assert real[0] > 4 * (2 * 64 * 65 + 32 * 64)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("name", _TORCH_CLASSES)
def test_what_an_optimizer_holds_while_it_steps(name: Any, at_once: bool) -> None:
    shapes = [(100, 50)] * 5 + [(40, 50)]
    parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    class_name, fixed = _TORCH_CLASSES[name]
    build = getattr(torch.optim, class_name)
    optimizer = build(parameters, lr=1e-3, weight_decay=0.01, foreach=at_once, **fixed)
    optimizer.step()
    with MeasuredBytes("cpu") as counter:
        held = [*parameters, *(p.grad for p in parameters)]
        for state in optimizer.state.values():
            held += [value for value in state.values() if isinstance(value, torch.Tensor)]
        counter.label(held, "held")
        counter.restart()
        optimizer.step()
        found = counter.peak_by_label[ACTIVATIONS]
    predicted = optimizer_step_bytes(name, shapes, at_once=at_once)
    # Statistics of rows and columns (adafactor), which are small, and step counters come on top.
    small = 4 * 2 * (100 + 50) * len(shapes) if name == "adafactor" else 0
    assert 0.85 * predicted <= found <= predicted + small + 1024


def test_optimizers_that_work_in_place_hold_nothing() -> None:
    assert optimizer_step_bytes("adamw_8bit", [(100, 100)], at_once=True) == 0
    assert optimizer_step_bytes("prodigy", [(100, 100)], at_once=True) == 4 * 40_000
