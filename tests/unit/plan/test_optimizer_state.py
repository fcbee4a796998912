"""Counted optimizer state equals what torch's optimizers allocate."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from framework.plan.optimizer_state import optimizer_state_bytes
from framework.schema.run import OptimizerName

SHAPES = [(12, 7), (7, 12), (5,), (6, 4, 3, 3), (1,), (64, 128)]
CLASSES = {
    "adamw": (torch.optim.AdamW, {}),
    "adam": (torch.optim.Adam, {}),
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {}),
    "adafactor": (torch.optim.Adafactor, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adagrad": (torch.optim.Adagrad, {}),
}


@pytest.mark.parametrize("name", CLASSES)
def test_torch_optimizers_allocate_what_is_counted(name: str) -> None:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    make, settings = CLASSES[name]
    optimizer = make(parameters, lr=1e-3, **settings)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    allocated = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for key, value in state.items()
        if torch.is_tensor(value) and key not in ("step", "mu_product")
    )
    assert optimizer_state_bytes(name, SHAPES) == allocated


def test_every_optimizer_is_counted() -> None:
    for name in get_args(OptimizerName):
        assert optimizer_state_bytes(name, [(64, 128)]) > 0
        assert optimizer_state_bytes(name, []) == 0


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("adamw_8bit", (64, 128), 2 * (8192 + 4 * 32)),
        ("paged_adamw_8bit", (64, 128), 2 * (8192 + 4 * 32)),
        ("lion_8bit", (64, 128), 8192 + 4 * 32),
        ("adamw_8bit", (16, 16), 8 * 256),
        ("prodigy", (64, 128), 16 * 8192),
    ],
)
def test_optimizers_of_other_packages(name: str, shape: tuple[int, ...], expected: int) -> None:
    assert optimizer_state_bytes(name, [shape]) == expected
