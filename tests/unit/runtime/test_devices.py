"""From names to devices and number formats, or a clear refusal."""

from __future__ import annotations

import pytest
import torch

from framework.errors import PlanError
from framework.runtime.devices import resolve_compute_dtype, resolve_device


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


def test_auto_takes_what_is_there(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("mps")


def test_cuda_devices(two_gpus: None) -> None:
    assert resolve_device("auto") == torch.device("cuda", 1)
    assert resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(PlanError, match=r'(?s)"cuda:7" can\'t be used.*2 CUDA devices'):
        resolve_device("cuda:7")


def test_absent_devices(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(
        PlanError, match=r"(?s)model\.device.*built without CUDA.*model\.device=auto"
    ):
        resolve_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(PlanError, match="no CUDA device or no working driver"):
        resolve_device("cuda:0")
    with pytest.raises(PlanError, match="no Metal device"):
        resolve_device("mps")
    assert resolve_device("cpu") == torch.device("cpu")


def test_compute_dtypes() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert resolve_compute_dtype("bf16", cpu) is torch.bfloat16
    assert resolve_compute_dtype("fp32", cpu) is torch.float32
    assert resolve_compute_dtype("fp16", cuda) is torch.float16
    with pytest.raises(
        PlanError, match=r"(?s)CPU doesn't compute in fp16.*model\.compute_dtype=bf16"
    ):
        resolve_compute_dtype("fp16", cpu)
