"""Judging values: one minimal valid configuration, one thing broken, the report says where, what and what next."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest

from framework.errors import ConfigError, Fault
from framework.schema.validate import validate
from tests.unit.schema.minimal import MINIMAL, changed, faults_of


def test_the_minimal_configuration_is_valid_and_warns_of_nothing() -> None:
    config, warnings = validate(MINIMAL, lambda _: "")
    assert config.model.dit.trainable == "lora"
    assert warnings == []


# path, value -> path of the fault, part of its message, nearest names, part of its hint
BROKEN: list[tuple[str, Any, str, str, tuple[str, ...], str]] = [
    ("model.dit.precison", "fp8", "model.dit.precison", "unknown key", ("model.dit.precision",), ""),
    ("lr", 1e-3, "lr", "unknown key", ("optim.lr",), ""),
    ("trainer.lr", 1e-3, "trainer.lr", "unknown key", ("optim.lr",), ""),
    ("dit.precision", "fp8", "dit.precision", "unknown key", ("model.dit.precision",), ""),
    ("learning_rate", 1e-3, "learning_rate", "unknown key", ("optim.lr",), ""),
    ("epochs", 3, "epochs", "unknown key", ("trainer.max_steps",), ""),
    ("modle.source", "x", "modle.source", "unknown key", ("model.source",), ""),
    ("xyzzy", 1, "xyzzy", "unknown key", (), "octavo schema"),
    ("model.dit._target_", "os.abort", "model.dit._target_", "unknown key", (), "data"),
    ("model.dit.precision", "fp9", "model.dit.precision", "'fp9' is not allowed; it must be one of fp8", ("fp8",), ""),
    ("model.dit.trainable", "lorra", "model.dit.trainable", "one of none, lora, full", ("lora",), ""),
    ("model.family", "flux", "model.family", "no model family 'flux'; allowed: qwen_image", (), "adding_a_family"),
    ("model.device", "gpu", "model.device", "'gpu' is not allowed", (), "cuda:N"),
    ("model.dit.lora.rank", 0, "model.dit.lora.rank", "at least 1", (), ""),
    ("model.dit.lora.dropout", 1, "model.dit.lora.dropout", "less than 1", (), ""),
    ("model.dit.lora.target_modules", [], "model.dit.lora.target_modules", "at least 1 values", (), ""),
    ("model.dit.lora.target_modules", "attn.to_q", "model.dit.lora.target_modules", "a list", (), "[attn.to_q]"),
    ("model.dit.fp8.layers", ["lin"], "model.dit.fp8.layers[0]", "one of linear, conv", ("linear",), ""),
    ("model.dit", None, "model.dit", "null is not allowed; it must be a section", (), ""),
    ("model.revision", 1234, "model.revision", "1234 is not allowed; it must be a text", (), "quote it"),
    ("data.path", "???", "data.path", "must be set: A folder", (), "data.path=..."),
    ("data.path", "", "data.path", "isn't empty", (), ""),
    ("data.batch_size", 0, "data.batch_size", "0 is not allowed; it must be at least 1", (), ""),
    ("data.batch_size", True, "data.batch_size", "must be a number, not true", (), ""),
    ("data.batch_size", "many", "data.batch_size", "a whole number", (), ""),
    ("data.max_px", 10.5, "data.max_px", "a whole number", (), ""),
    ("data.cache", "perhaps", "data.cache", "true or false", (), ""),
    ("data.caption_dropout", 1.5, "data.caption_dropout", "at most 1", (), ""),
    ("objective.shift", "auto", "objective.shift", "scheduler or a number", (), ""),
    ("objective.shift", -1, "objective.shift", "scheduler or greater than 0", (), ""),
    ("optim.name", "adamm", "optim.name", "one of adamw, adam", ("adam", "radam"), ""),
    ("optim.lr", float("inf"), "optim.lr", "a finite number", (), ""),
    ("optim.lr", {"x": 1}, "optim.lr", "a number", (), ""),
    ("optim.betas", [0.9], "optim.betas", "a list of 2 values", (), ""),
    ("optim.betas", [0.9, 1.5], "optim.betas[1]", "less than 1", (), ""),
    ("checkpoint", 5, "checkpoint", "a section", (), "checkpoint.every_n_steps"),
    ("validation.sigmas", [0.5, 2], "validation.sigmas[1]", "at most 1", (), ""),
    ("validation.fraction", 0.9, "validation.fraction", "at most 0.5", (), ""),
    ("sample.size_px", [60, 64], "sample.size_px[0]", "isn't a multiple of 16", ("48", "64"), ""),
    ("sample.prompts", "a cat", "sample.prompts", "a list", (), "[a cat]"),
    ("sample.size_px", 64, "sample.size_px", "a list of 2 values", (), "=[64,64]"),
    ("sample.size_px", [64, 64, 64], "sample.size_px", "a list of 2 values", (), ""),
    ("logger.wandb", {}, "logger.wandb.project", "must be set", (), ""),
    ("run.name", "a/b", "run.name", "'a/b' is not allowed", (), "Name of the run"),
    ("run.name", None, "run.name", "null is not allowed", (), ""),
    ("trainer.seed", -1, "trainer.seed", "at least 0", (), ""),
    ("trainer.gradient_clip_val", 0, "trainer.gradient_clip_val", "greater than 0", (), ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "path", "message", "nearest", "hint"),
    BROKEN,
    ids=lambda value: str(value)[:30],
)
def test_one_broken_key_is_one_fault(
    key: str, value: Any, path: str, message: str, nearest: tuple[str, ...], hint: str
) -> None:
    faults = faults_of({key: value})
    assert list(faults) == [path]
    fault = faults[path]
    assert message in fault.message
    assert fault.where == f"place of {path}"
    assert fault.nearest[: len(nearest)] == nearest
    assert bool(fault.nearest) == bool(nearest)
    assert hint in fault.hint


def test_of_a_missing_section_the_keys_that_it_must_have_are_named() -> None:
    values = {key: value for key, value in MINIMAL.items() if key != "run"}
    with pytest.raises(ConfigError, match="1 fault") as caught:
        validate(values, lambda _: "default")
    assert caught.value.faults[0].path == "run.name"
    assert caught.value.faults[0].where == ""


def test_a_faulty_section_is_one_fault() -> None:
    assert set(faults_of({"model": 5})) == {"model"}


def test_everything_that_is_wrong_is_in_one_report() -> None:
    faults = faults_of(
        {
            "lr": 1,
            "data.batch_size": 0,
            "data.path": "???",
            "model.dit.precision": "fp8",
            "model.dit.trainable": "full",
            "optim.name": "sgd",
            "optim.betas": [0.9, 0.99],
            "sample.size_px": [17, 33],
        }
    )
    assert set(faults) == {
        "lr",
        "data.batch_size",
        "data.path",
        "model.dit.precision",
        "optim.betas",
        "sample.size_px[0]",
        "sample.size_px[1]",
    }


def test_several_faults_in_one_list_are_all_named() -> None:
    assert set(faults_of({"validation.sigmas": [0, 0.5, 2]})) == {
        "validation.sigmas[0]",
        "validation.sigmas[2]",
    }


def test_no_rule_speaks_of_a_value_that_is_faulty_itself() -> None:
    # `trainable` is replaced by its default `none` while the rest is judged; "nothing trains" would be a lie.
    assert set(faults_of({"model.dit.trainable": "lorra"})) == {"model.dit.trainable"}


def test_data_may_be_missing_where_it_is_not_read() -> None:
    config, _ = validate(changed({"data.path": "???"}), lambda _: "", use="plan")
    assert config.model.source == "somewhere"
    validate(changed({"data.path": "???"}), lambda _: "", use="generate")


def test_the_model_may_not_be_missing_anywhere() -> None:
    assert "model.source" in faults_of({"model.source": "???"}, use="generate")


def test_values_that_mean_the_same_are_taken() -> None:
    config, _ = validate(
        changed({"optim.lr": "1e-3", "trainer.max_steps": 5.0, "optim.ema": {"decay": 0.9}}),
        lambda _: "",
    )
    assert (config.optim.lr, config.trainer.max_steps) == (1e-3, 5)


def test_values_are_not_changed() -> None:
    values = changed({"lr": 1, "data.path": "???", "data.batch_size": True})
    before = copy.deepcopy(values)
    with pytest.raises(ConfigError, match="3 faults"):
        validate(values, lambda _: "")
    assert values == before


@pytest.mark.parametrize("value", [None, 1, "x", [], [1], {}, {"a": {"b": []}}, True, "???", -1.5])
@pytest.mark.parametrize(
    "key",
    [
        "model",
        "data",
        "optim",
        "model.dit",
        "model.dit.lora",
        "sample.size_px",
        "optim.betas",
        "run.name",
        "zzz",
    ],
)
def test_whatever_is_written_there_is_a_report_at_most(key: str, value: Any) -> None:
    values = copy.deepcopy(MINIMAL)
    node = values
    *parents, last = key.split(".")
    for name in parents:
        node = node.setdefault(name, {})
    node[last] = value
    faults: Sequence[Fault] = ()
    try:
        validate(values, lambda _: "here")
    except ConfigError as error:
        faults = error.faults
    assert all(fault.path and fault.message for fault in faults)
