"""Rules across keys: what is refused, what is warned of, and what isn't."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from framework.schema.validate import validate
from tests.unit.schema.minimal import changed, faults_of, warnings_of


def test_fp8_with_full_says_why_and_both_ways_out() -> None:
    fault = faults_of({"model.dit.precision": "fp8", "model.dit.trainable": "full"})[
        "model.dit.precision"
    ]
    assert "rounded away" in fault.message
    assert "model.dit.trainable=lora" in fault.hint
    assert "model.dit.precision=bf16" in fault.hint


@pytest.mark.parametrize("component", ["text_encoder", "vae"])
def test_fp8_with_full_is_refused_for_every_component(component: str) -> None:
    changes = {f"model.{component}.precision": "fp8", f"model.{component}.trainable": "full"}
    assert f"model.{component}.precision" in faults_of(changes)


@pytest.mark.parametrize(
    "way_out", [{"model.dit.trainable": "lora"}, {"model.dit.precision": "bf16"}]
)
def test_both_ways_out_work(way_out: dict[str, Any]) -> None:
    validate(
        changed({"model.dit.precision": "fp8", "model.dit.trainable": "full"} | way_out),
        lambda _: "",
    )


def test_fp8_with_full_is_no_fault_where_nothing_trains() -> None:
    changes = {"model.dit.precision": "fp8", "model.dit.trainable": "full"}
    validate(changed(changes), lambda _: "", use="generate")


def test_something_must_train() -> None:
    fault = faults_of({"model.dit.trainable": "none"})["model"]
    assert "nothing trains" in fault.message
    assert "model.dit.trainable=lora" in fault.hint


@pytest.mark.parametrize("trainable", ["none", "full"])
def test_unused_lora_settings_are_named_in_a_warning(trainable: str) -> None:
    changes = {
        "model.text_encoder.trainable": "lora",
        "model.dit.trainable": trainable,
        "model.dit.lora": {"rank": 4, "use_dora": True},
    }
    warnings = warnings_of(changes)
    assert set(warnings) == {"model.dit.lora"}
    assert "rank, use_dora" in warnings["model.dit.lora"].message
    assert f"model.dit.trainable={trainable}" in warnings["model.dit.lora"].message


def test_lora_settings_that_are_used_or_null_need_no_warning() -> None:
    assert warnings_of({"model.dit.lora": {"rank": 4}}) == {}
    assert warnings_of({"model.dit.trainable": "full", "model.dit.lora": None}) == {}


def test_fp16_on_the_cpu_is_refused() -> None:
    fault = faults_of({"model.compute_dtype": "fp16", "model.device": "cpu"})["model.compute_dtype"]
    assert "fp16 can't be computed on the CPU" in fault.message
    validate(changed({"model.compute_dtype": "fp16", "model.device": "cuda"}), lambda _: "")


def test_a_plain_fp8_cast_is_warned_of() -> None:
    changes = {"model.dit.precision": "fp8", "model.dit.fp8.scaling": "none"}
    assert "0.002" in warnings_of(changes)["model.dit.fp8.scaling"].message
    assert warnings_of({"model.dit.fp8.scaling": "none"}) == {}


@pytest.mark.parametrize(
    ("device", "devices", "nodes", "path"),
    [
        ("mps", 2, 1, "trainer.devices"),
        ("mps", 1, 2, "trainer.num_nodes"),
        ("cuda:1", 2, 1, "trainer.devices"),
    ],
)
def test_processes_can_not_share_one_device(
    device: str, devices: int, nodes: int, path: str
) -> None:
    changes = {"model.device": device, "trainer.devices": devices, "trainer.num_nodes": nodes}
    assert f"model.device={device}" in faults_of(changes)[path].message


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_several_processes_are_fine_elsewhere(device: str) -> None:
    validate(changed({"model.device": device, "trainer.devices": 2}), lambda _: "")


def test_a_warm_up_longer_than_the_run_is_warned_of() -> None:
    warning = warnings_of({"optim.warmup_steps": 20, "trainer.max_steps": 5})["optim.warmup_steps"]
    assert "don't fit into trainer.max_steps=5" in warning.message
    assert "25% of optim.lr" in warning.hint
    assert warnings_of({"optim.warmup_steps": 5, "trainer.max_steps": 5}) == {}


@pytest.mark.parametrize("name", ["sgd", "rmsprop", "adagrad", "adafactor"])
def test_betas_need_an_optimizer_that_has_them(name: str) -> None:
    fault = faults_of({"optim.name": name, "optim.betas": [0.9, 0.99]})["optim.betas"]
    assert f"the optimizer {name} has no betas" in fault.message
    validate(changed({"optim.name": name}), lambda _: "")


@pytest.mark.parametrize(
    ("changes", "path", "package"),
    [
        ({"optim.name": "adamw_8bit"}, "optim.name", "bitsandbytes"),
        ({"optim.name": "prodigy", "optim.lr": 1}, "optim.name", "prodigyopt"),
        ({"logger.wandb": {"project": "x"}}, "logger.wandb", "wandb"),
    ],
)
def test_a_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], path: str, package: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fault = faults_of(changes)[path]
    assert f"the package {package}, which isn't installed" in fault.message
    assert "pip install octavo[" in fault.hint
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    validate(changed(changes), lambda _: "")


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("objective.huber_delta", 0.5, "objective.loss=mse"),
        ("objective.vae_kl_weight", 0.5, "model.vae.trainable=none"),
    ],
)
def test_settings_that_nothing_reads_are_warned_of(path: str, value: Any, reason: str) -> None:
    assert reason in warnings_of({path: value})[path].message


def test_settings_of_the_logit_normal_distribution_need_it() -> None:
    changes = {"objective.timestep_sampling": "uniform", "objective.logit_mean": 0.5}
    assert set(warnings_of(changes)) == {"objective.logit_mean"}


def test_checkpointing_a_dit_without_gradients_is_warned_of() -> None:
    changes = {"model.dit": {"gradient_checkpointing": True}, "model.vae.trainable": "full"}
    assert "no gradient" in warnings_of(changes)["model.dit.gradient_checkpointing"].message


@pytest.mark.parametrize(
    ("name", "lr", "warns"),
    [
        ("adamw", 1.0, True),
        ("adamw", 1e-9, True),
        ("adamw", 1e-3, False),
        ("sgd", 0.5, False),
        ("sgd", 5, True),
    ],
)
def test_an_unusual_rate_is_warned_of(name: str, lr: float, warns: bool) -> None:
    assert ("optim.lr" in warnings_of({"optim.name": name, "optim.lr": lr})) == warns
