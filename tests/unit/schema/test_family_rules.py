"""What follows from the family of a model: its components, its objective, frames and control pictures."""

from __future__ import annotations

from typing import Any

import pytest

from framework.schema.validate import validate
from tests.unit.schema.minimal import changed, faults_of, warnings_of

LORA = {"trainable": "lora"}
CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"model.text_encoder_2": {"precision": "fp8"}}, "model.text_encoder_2", "no component"),
    ({"model.family": "flux", "model.dit_2": LORA}, "model.dit_2", "flux has no component"),
    ({"model.family": "wan2_2", "model.dit_2": LORA}, "model.dit_2.trainable", "one run"),
    ({"model.family": "sdxl"}, "objective.name", "was trained with ddpm"),
    ({"objective.name": "ddpm"}, "objective.name", "was trained with flow_matching"),
    ({"objective.sigma_min": 0.5, "objective.sigma_max": 0.5}, "objective.sigma_min", "above 0.5"),
    ({"sample.num_frames": 5}, "sample.num_frames", "makes pictures"),
    ({"model.family": "wan2_1", "sample.num_frames": 7}, "sample.num_frames", "multiple of 4"),
    ({"sample": {"prompts": ["a"], "control_images": ["b.png"]}}, "sample.control_images", "takes no"),
    (
        {"model.family": "qwen_image_edit", "sample.prompts": ["a", "b"]},
        "sample.control_images",
        "0 control pictures for 2 prompts",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "path", "message"), CASES)
def test_what_a_family_lacks_is_refused(changes: dict[str, Any], path: str, message: str) -> None:
    faults = faults_of(changes)
    assert list(faults) == [path]
    assert message in faults[path].message
    assert faults[path].hint


def test_the_nearest_numbers_of_frames_are_named() -> None:
    fault = faults_of({"model.family": "wan2_1", "sample.num_frames": 7})["sample.num_frames"]
    assert fault.nearest == ("5", "9")


@pytest.mark.parametrize(
    "changes",
    [
        {"model.family": "sdxl", "objective.name": "ddpm", "model.text_encoder_2": LORA},
        {"model.family": "wan2_2", "model.dit": {}, "model.dit_2": LORA},
        {"model.family": "wan2_1", "sample.num_frames": 81},
        {"objective.name": "direct_distill", "objective.distill_steps": 8},
        {
            "model.family": "qwen_image_edit",
            "sample": {"prompts": ["a"], "control_images": ["b.png"]},
        },
    ],
)
def test_what_a_family_has_is_accepted(changes: dict[str, Any]) -> None:
    validate(changed(changes), lambda path: path)


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"objective.min_snr_gamma": 5.0}, "objective.min_snr_gamma"),
        ({"objective.distill_steps": 8}, "objective.distill_steps"),
        (
            {"model.family": "sdxl", "objective": {"name": "ddpm", "weighting": "cosmap"}},
            "objective.weighting",
        ),
        (
            {
                "model.family": "wan2_2",
                "model.dit": {"gradient_checkpointing": True},
                "model.dit_2": LORA,
            },
            "model.dit.gradient_checkpointing",
        ),
    ],
)
def test_settings_that_nothing_reads_are_warned_of(changes: dict[str, Any], path: str) -> None:
    assert path in warnings_of(changes)


def test_an_unset_second_component_is_stored_as_the_first_and_never_trains() -> None:
    section = {"precision": "fp8", "offload": "host", "trainable": "lora", "source": "elsewhere"}
    changes = {"model.family": "flux", "model.text_encoder": section}
    config, _ = validate(changed(changes), lambda path: path)
    second = config.model.components["text_encoder_2"]
    assert (second.precision, second.offload) == ("fp8", "host")
    assert (second.trainable, second.source) == ("none", None)
    changes["model.text_encoder_2"] = {"precision": "bf16"}
    config, _ = validate(changed(changes), lambda path: path)
    own = config.model.components["text_encoder_2"]
    assert (own.precision, own.offload) == ("bf16", "none")
