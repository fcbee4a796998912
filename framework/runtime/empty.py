"""Modules of which only structure, names and shapes are wanted: their parameters take no memory and no time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

_START_VALUES = ("uniform_", "normal_", "trunc_normal_", "constant_", "ones_", "zeros_", "kaiming_uniform_",
                 "kaiming_normal_", "xavier_uniform_", "xavier_normal_")  # fmt: skip


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Inside, modules are built with parameters on the meta device and buffers as always.

    Start values are left out where they would go to the meta device: drawing nothing takes half the time of building.
    """
    before = {name: getattr(torch.nn.init, name) for name in _START_VALUES}
    for name, function in before.items():
        setattr(torch.nn.init, name, _unless_meta(function))
    try:
        with init_empty_weights(include_buffers=False):
            yield
    finally:
        for name, function in before.items():
            setattr(torch.nn.init, name, function)


def _unless_meta(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(function)
    def start(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        return tensor if tensor.is_meta else function(tensor, *args, **options)

    return start
