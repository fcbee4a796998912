"""Fixtures for every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# No test may reach the network; must stand before any library that reads them is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Tensors in tests are tiny: more threads only wait for each other (measured: 25 s instead of 128 on a busy machine).
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none; torch is asked only if such a test was chosen."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen-Image checkpoint in the published layout with sharded files. Not to be changed: copy it first."""
    from tests.checkpoints import build_checkpoint

    return build_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-qwen-image")
