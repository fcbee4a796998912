"""The rules about `fp8.error_budget`."""

from __future__ import annotations

from typing import Any

import pytest

from framework.schema.validate import validate
from tests.unit.schema.minimal import changed, faults_of, warnings_of

FP8 = {"model.dit.precision": "fp8"}


@pytest.mark.parametrize("budget", [0.0, 1.0, -0.1])
def test_a_budget_is_a_part_of_one(budget: float) -> None:
    fault = faults_of(FP8 | {"model.dit.fp8.error_budget": budget})["model.dit.fp8.error_budget"]
    assert fault.code == "out-of-range"


def test_a_budget_for_the_dit_is_fine() -> None:
    changes = FP8 | {"model.dit.fp8.error_budget": 0.01}
    config, _ = validate(changed(changes), lambda _: "")
    assert config.model.dit.fp8.error_budget == 0.01
    assert "model.dit.fp8.error_budget" not in warnings_of(changes)


@pytest.mark.parametrize("component", ["text_encoder", "vae"])
@pytest.mark.parametrize("use", ["train", "generate"])
def test_a_budget_for_an_encoder_is_refused(component: str, use: Any) -> None:
    path = f"model.{component}.fp8.error_budget"
    fault = faults_of({f"model.{component}.precision": "fp8", path: 0.01}, use=use)[path]
    assert "isn't measured" in fault.message
    assert f"{path}=null" in fault.hint


def test_a_budget_without_fp8_is_told_to_be_unused() -> None:
    changes = {"model.dit.fp8.error_budget": 0.01}
    warning = warnings_of(changes)["model.dit.fp8.error_budget"]
    assert warning.code == "unused"
    assert "model.dit.precision=fp8" in warning.hint
