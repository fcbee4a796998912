"""Rules across keys: what is refused, and what isn't."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest

from framework.schema.validate import validate
from tests.unit.schema.minimal import changed, faults_of


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


def test_fp16_on_the_cpu_is_refused() -> None:
    fault = faults_of({"model.compute_dtype": "fp16", "model.device": "cpu"})["model.compute_dtype"]
    assert "fp16 can't be computed on the CPU" in fault.message
    validate(changed({"model.compute_dtype": "fp16", "model.device": "cuda"}), lambda _: "")


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


def test_a_pattern_that_keeps_everything_contradicts_fp8() -> None:
    changes = {"model.dit.precision": "fp8", "model.dit.fp8.keep_high_precision": ["img_in", "*"]}
    fault = faults_of(changes)["model.dit.fp8.keep_high_precision"]
    assert "would store nothing in FP8" in fault.message
    assert "model.dit.precision=bf16" in fault.hint
    validate(changed(changes | {"model.dit.precision": "bf16"}), lambda _: "")


BATCH = {
    "data.batch_size": 4,
    "trainer.accumulate_grad_batches": 2,
    "trainer.devices": 2,
    "trainer.num_nodes": 1,
}


def test_a_stated_batch_that_the_settings_make_is_fine() -> None:
    config, _ = validate(changed(BATCH | {"trainer.global_batch_size": 16}), lambda _: "")
    assert config.trainer.global_batch_size == 16


@pytest.mark.parametrize(
    ("wanted", "ways"),
    [
        (64, ["trainer.accumulate_grad_batches=8", "data.batch_size=16", "trainer.devices=8"]),
        (24, ["trainer.accumulate_grad_batches=3", "data.batch_size=6", "trainer.devices=3"]),
        (8, ["trainer.accumulate_grad_batches=1", "data.batch_size=2", "trainer.devices=1"]),
        (4, ["data.batch_size=1"]),
        (17, []),
    ],
)
def test_a_stated_batch_that_they_do_not_make_gives_the_product_and_the_ways_out(
    wanted: int, ways: list[str]
) -> None:
    fault = faults_of(BATCH | {"trainer.global_batch_size": wanted})["trainer.global_batch_size"]
    assert f"{wanted} pictures per optimizer step" in fault.message
    assert "make 16 (data.batch_size 4 x trainer.accumulate_grad_batches 2" in fault.message
    assert re.findall(r"([a-z_.]+=\d+)", fault.hint) == [*ways, "trainer.global_batch_size=16"]
    for way in ways:
        key, _, value = way.partition("=")
        changes = BATCH | {"trainer.global_batch_size": wanted, key: int(value)}
        validate(changed(changes), lambda _: "")


def test_a_size_that_does_not_fit_comes_with_one_that_does() -> None:
    fault = faults_of({"sample.size_px": [1000, 1023]})["sample.size_px[0]"]
    assert fault.nearest == ("992", "1008")
    assert "sample.size_px=[992,1024]" in fault.hint
    validate(changed({"sample.size_px": [992, 1024]}), lambda _: "")
