"""Warnings: what is allowed but surely not meant, and what must not be warned of."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.schema.minimal import warnings_of


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


def test_a_plain_fp8_cast_is_warned_of() -> None:
    changes = {"model.dit.precision": "fp8", "model.dit.fp8.scaling": "none"}
    assert "0.002" in warnings_of(changes)["model.dit.fp8.scaling"].message
    assert warnings_of({"model.dit.fp8.scaling": "none"}) == {}


def test_a_warm_up_longer_than_the_run_is_warned_of() -> None:
    warning = warnings_of({"optim.warmup_steps": 20, "trainer.max_steps": 5})["optim.warmup_steps"]
    assert "don't fit into trainer.max_steps=5" in warning.message
    assert "25% of optim.lr" in warning.hint
    assert warnings_of({"optim.warmup_steps": 5, "trainer.max_steps": 5}) == {}


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


@pytest.mark.parametrize(
    ("changes", "warns"),
    [
        ({"model.dit.trainable": "lora", "optim.lr": 5e-3}, False),
        ({"model.dit.trainable": "full", "optim.lr": 5e-3}, True),
        ({"model.dit.trainable": "full", "optim.lr": 1e-3}, False),
        ({"model.dit.trainable": "full", "optim.lr": 5e-7}, False),
        ({"model.dit.trainable": "lora", "optim.lr": 5e-7}, True),
        ({"model.vae.trainable": "full", "optim.lr": 5e-7}, False),
    ],
)
def test_the_usual_rate_depends_on_what_trains(changes: dict[str, Any], warns: bool) -> None:
    warnings = warnings_of(changes)
    assert ("optim.lr" in warnings) == warns
    if warns:
        assert changes["model.dit.trainable"] in warnings["optim.lr"].message
        assert "optim.lr=" in warnings["optim.lr"].hint


def test_a_rate_to_start_from_is_given() -> None:
    warning = warnings_of({"optim.lr": 1})["optim.lr"]
    assert "1 is 1000 times the highest usual rate" in warning.message
    assert "are 2e-5 to 0.001" in warning.message
    assert "optim.lr=0.0001." in warning.hint


def test_more_repeats_than_steps_are_warned_of() -> None:
    warning = warnings_of({"data.repeats": 11, "trainer.max_steps": 10})["data.repeats"]
    assert "11 times in an epoch, but the run has only 10 steps" in warning.message
    assert warnings_of({"data.repeats": 10, "trainer.max_steps": 10}) == {}


@pytest.mark.parametrize(
    ("rank", "alpha", "warns"), [(16, 16, False), (2, 16, False), (1, 16, True), (64, 4, True)]
)
def test_an_adapter_that_acts_far_too_much_or_little_is_warned_of(
    rank: int, alpha: int, warns: bool
) -> None:
    warnings = warnings_of({"model.dit.lora": {"rank": rank, "alpha": alpha}})
    assert set(warnings) == ({"model.dit.lora.alpha"} if warns else set())
    if warns:
        assert f"model.dit.lora.alpha={rank}" in warnings["model.dit.lora.alpha"].hint


def test_a_side_given_as_a_pixel_budget_is_warned_of() -> None:
    warning = warnings_of({"data.max_px": 1024})["data.max_px"]
    assert "a picture of 32 x 32" in warning.message
    assert "data.max_px=1048576" in warning.hint
    assert warnings_of({"data.max_px": 4096}) == {}


def test_samples_far_larger_than_what_is_trained_are_warned_of() -> None:
    small = {"data.max_px": 64 * 64, "sample.prompts": ["a cat"]}
    warning = warnings_of(small)["sample.size_px"]
    assert "256 times the pixels" in warning.message
    assert "sample.size_px=[64,64]" in warning.hint
    assert warnings_of(small | {"sample.size_px": [128, 128]}) == {}
    assert warnings_of(small | {"sample.prompts": []}) == {}


def test_samples_without_prompts_are_warned_of() -> None:
    assert (
        "sample.prompts is empty"
        in warnings_of({"sample.every_n_steps": 5})["sample.every_n_steps"].message
    )
    assert warnings_of({"sample.every_n_steps": 5, "sample.prompts": ["a"]}) == {}


@pytest.mark.parametrize(("rate", "warns"), [(0.1, False), (0.5, False), (0.9, True)])
def test_dropping_most_captions_is_warned_of(rate: float, warns: bool) -> None:
    assert ("data.caption_dropout" in warnings_of({"data.caption_dropout": rate})) == warns


def test_nothing_is_said_of_training_where_nothing_trains() -> None:
    changes = {"optim.lr": 5, "data.repeats": 5000, "data.max_px": 512}
    assert warnings_of(changes, use="generate") == {}
