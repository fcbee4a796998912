"""Judging values: one minimal valid configuration, one thing broken, the report says where, what and what next."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest

from framework.errors import ConfigError, Fault
from framework.schema.validate import judge_values, validate
from tests.unit.schema.minimal import MINIMAL, assert_whole, changed, faults_of


def test_the_minimal_configuration_is_valid_and_warns_of_nothing() -> None:
    config, warnings = validate(MINIMAL, lambda _: "")
    assert config.model.dit.trainable == "lora"
    assert warnings == []


# path, value -> path of the fault, part of its message, nearest names, part of its hint
BROKEN: list[tuple[str, Any, str, str, tuple[str, ...], str]] = [
    ("model.dit.precison", "fp8", "model.dit.precison", "unknown key", ("model.dit.precision",), ""),
    ("model.precision", "fp8", "model.precision", "unknown key; model has", ("model.dit.precision",), ""),
    ("model.txt_encoder.precision", "fp8", "model.txt_encoder.precision", "unknown key; model has text_encoder",
     ("model.text_encoder.precision",), "Write model.text_encoder.precision=fp8."),
    ("trianer.max_steps", 9, "trianer.max_steps", "a configuration has trainer, model", ("trainer.max_steps",), "=9"),
    ("modle", {"family": "qwen_image", "source": "x"}, "modle", "unknown key", ("model",), "Write model instead"),
    ("adapter", {"rank": 4, "alpha": 4}, "adapter", "unknown key", ("model.dit.lora",), "model.dit.lora"),
    ("train", {"steps": 9, "lr": 1, "x": 1}, "train", "unknown key",
     ("trainer",), "steps is trainer.max_steps, lr is optim.lr"),
    ("optim.x", 1, "optim.x", "optim has name, lr, betas", (), "octavo schema"),
    ("model.dit.lora.target_modles", ["a b", "c"], "model.dit.lora.target_modles", "unknown key",
     ("model.dit.lora.target_modules",), "'model.dit.lora.target_modules=[\"a b\",\"c\"]'"),
    ("run.nmae", "a, b", "run.nmae", "unknown key", ("run.name",), "'run.name=\"a, b\"'"),
    ("lr", 1e-3, "lr", "unknown key; a configuration has model, data", ("optim.lr",), "Write optim.lr=0.001."),
    ("trainer.lr", 1e-3, "trainer.lr", "unknown key", ("optim.lr",), ""),
    ("dit.precision", "fp8", "dit.precision", "unknown key", ("model.dit.precision",), ""),
    ("learning_rate", 1e-3, "learning_rate", "unknown key", ("optim.lr",), ""),
    ("epochs", 3, "epochs", "unknown key", ("trainer.max_steps",), ""),
    ("modle.source", "x", "modle.source", "unknown key", ("model.source",), ""),
    ("xyzzy", 1, "xyzzy", "unknown key", (), "octavo schema"),
    ("model.dit._target_", "os.abort", "model.dit._target_", "unknown key", (), "data"),
    ("model.dit.precision", "bfloat16", "model.dit.precision", "'bfloat16' is not allowed", ("bf16",), ""),
    ("model.dit.precision", "FP8", "model.dit.precision", "'FP8' is not allowed", ("fp8",), "=fp8."),
    ("model.dit.precision", "q8_0", "model.dit.precision", "'q8_0' is not allowed", (), "Choose one of them"),
    ("model.dit.precision", None, "model.dit.precision", "null is not allowed", ("bf16",), ""),
    ("model.dit.precision", {"dtype": "fp8"}, "model.dit.precision", "a section with dtype is not allowed",
     (), "Remove the keys below"),
    ("model.dit.trainable", True, "model.dit.trainable", "true is not allowed", ("full",), "quotes"),
    ("model.dit.trainable", None, "model.dit.trainable", "null is not allowed", ("none",), "=none."),
    ("model.dit.precision", "fp9", "model.dit.precision", "'fp9' is not allowed; it must be one of fp8", ("fp8",), ""),
    ("model.dit.trainable", "lorra", "model.dit.trainable", "one of none, lora, full", ("lora",), ""),
    ("model.family", "cogview", "model.family", "no model family 'cogview'; allowed", (), "adding_a_family"),
    ("model.device", "gpu", "model.device", "auto, cpu, mps, cuda or cuda:N", ("cuda",), "model.device=cuda"),
    ("model.device", "CPU", "model.device", "'CPU' is not allowed", ("cpu",), ""),
    ("model.device", "tpu", "model.device", "'tpu' is not allowed", (), "octavo explain model.device"),
    ("model.dit.lora.rank", 0, "model.dit.lora.rank", "at least 1", (), ""),
    ("model.dit.lora.dropout", 1, "model.dit.lora.dropout", "less than 1", (), ""),
    ("model.dit.lora.target_modules", [], "model.dit.lora.target_modules", "a list of 1 or more texts",
     (), "leave the key out"),
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
    ("objective.shift", -1, "objective.shift", "scheduler or a number greater than 0", (), ""),
    ("optim.name", "adam_w", "optim.name", "'adam_w' is not allowed", ("adamw",), "optim.name=adamw."),
    ("optim.name", "AdamW8bit", "optim.name", "'AdamW8bit' is not allowed", ("adamw_8bit",), "optim.name=adamw_8bit."),
    ("optim.name", 1, "optim.name", "1 is not allowed; it must be one of adamw", (), ""),
    ("optim.lr", "fast", "optim.lr", "'fast' is not a number; it must be greater than 0 and less than 10",
     (), "optim.lr=0.0001"),
    ("optim.lr", "0,0001", "optim.lr", "'0,0001' is not a number", (), "optim.lr=0.0001."),
    ("optim.lr", [1e-4, 1e-5], "optim.lr", "[0.0001, 1e-5] is not a number", (), "Give one value"),
    ("optim.lr", 0, "optim.lr", "0 is not allowed; it must be greater than 0 and less than 10", (), "optim.lr=0.0001"),
    ("trainer.max_steps", "10k", "trainer.max_steps", "'10k' is not a whole number; it must be at least 1",
     (), "=10000."),
    ("trainer.max_steps", "1e3", "trainer.max_steps", "'1e3' is not a whole number", (), "=1000."),
    ("data.caption_dropout", "10%", "data.caption_dropout", "'10%' is not a number", (), "=0.1."),
    ("data.cache", [True], "data.cache", "[true] is not allowed", (), "Give one value"),
    ("optim.betas", [0.9, True], "optim.betas[1]", "must be a number, not true", (), ""),
    ("trainer.gradient_clip_val", "off", "trainer.gradient_clip_val", "it must be greater than 0, or null",
     (), ""),
    ("sample.prompts", [{"text": "a"}], "sample.prompts[0]", "a section with text is not allowed",
     (), "the whole list"),
    ("sample.size_px", "512x768", "sample.size_px", "a list of 2 values", (), "sample.size_px=[512,768]"),
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
    ("run.name", "a/b", "run.name", "'a/b' is not allowed; it must be letters, digits", ("a-b",), "run.name=a-b"),
    ("run.name", "---", "run.name", "'---' is not allowed", (), "octavo explain run.name"),
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
        changed(
            {
                "optim.lr": "1e-3",
                "trainer.max_steps": 5.0,
                "optim.ema": {"decay": "0.9 "},
                "data.cache": "no",
                "data.batch_size": " 4",
            }
        ),
        lambda _: "",
    )
    assert (config.optim.lr, config.trainer.max_steps) == (1e-3, 5)
    assert (config.data.cache, config.data.batch_size) == (False, 4)


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
    for fault in faults:
        assert_whole(fault)


def test_judging_raises_nothing_and_gives_all_that_validate_does() -> None:
    values = changed({"lr": 1, "data.batch_size": 0, "model.dit.fp8.scaling": "none"})
    config, faults, warnings = judge_values(values, lambda path: f"place of {path}")
    assert config is None
    assert {fault.path for fault in faults} == {"lr", "data.batch_size"}
    assert warnings == []
    config, faults, warnings = judge_values(changed({"optim.lr": 5}), lambda _: "here")
    assert config is not None
    assert faults == []
    assert [fault.path for fault in warnings] == ["optim.lr"]


def test_no_warning_speaks_of_a_value_that_is_faulty_itself() -> None:
    changes = {"trainer.max_steps": "many", "optim.warmup_steps": 5000}
    _, faults, warnings = judge_values(changed(changes), lambda _: "here")
    assert [fault.path for fault in faults] == ["trainer.max_steps"]
    assert warnings == []


@pytest.mark.parametrize("key", [5, True, None, 1.5])
@pytest.mark.parametrize("section", ["", "model", "optim.ema"])
def test_a_key_that_is_no_text_is_an_unknown_key(section: str, key: Any) -> None:
    values = changed({f"{section}.x" if section else "x": 1})
    node = values
    for name in section.split(".") if section else ():
        node = node[name]
    node[key] = node.pop("x")
    _, faults, _ = judge_values(values, lambda _: "here")
    assert [fault.code for fault in faults] == ["unknown-key"]
    for fault in faults:
        assert_whole(fault)
