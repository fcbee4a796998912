"""Fixtures of the training tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import run_values, write_pictures


@pytest.fixture
def values(tiny_checkpoint: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of four steps: a LoRA on the DiT in bf16, no samples, no validation."""
    return run_values(tiny_checkpoint, write_pictures(tmp_path / "pictures"), tmp_path)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only wait for each other on tensors as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
