"""Adapters that a form of LoRA file can't carry, told before anything is read."""

from __future__ import annotations

from typing import Any

import pytest

from framework.schema.lora_keys import FAMILY_NAMES, FORMAT_NAMES, families_of, why_not
from framework.schema.validate import validate
from tests.unit.schema.minimal import changed, faults_of

DORA = {"model.dit.lora": {"rank": 4, "alpha": 4, "use_dora": True}}


def test_every_form_may_be_asked_for() -> None:
    config, _ = validate(changed({"export": {"formats": list(FORMAT_NAMES)}}), lambda _: "")
    assert config.export.formats == FORMAT_NAMES


@pytest.mark.parametrize(("form", "reason"), [("kohya", "has no DoRA"), ("comfyui", "differently")])
def test_dora_is_refused_where_it_would_be_lost(form: str, reason: str) -> None:
    fault = faults_of(DORA | {"export": {"formats": ["diffusers", form]}})["export.formats[1]"]
    assert reason in fault.message
    assert "octavo export --merge" in fault.hint
    validate(changed(DORA | {"export": {"formats": ["diffusers", "peft"]}}), lambda _: "")


@pytest.mark.parametrize(
    ("component", "form", "reason"),
    [
        ("vae", "comfyui", "no other program reads a LoRA on a VAE"),
        ("text_encoder", "kohya", "train no text encoder of this family"),
    ],
)
def test_components_that_a_form_lacks_are_refused(component: str, form: str, reason: str) -> None:
    changes: dict[str, Any] = {
        f"model.{component}.trainable": "lora",
        "export": {"formats": [form]},
    }
    assert reason in faults_of(changes)["export.formats[0]"].message


def test_dora_over_a_preset_is_refused() -> None:
    lora = {"rank": 4, "alpha": 4, "use_dora": True, "preset": "turbo.safetensors"}
    fault = faults_of({"model.dit.lora": lora})["model.dit.lora.use_dora"]
    assert "without the preset" in fault.message


@pytest.mark.parametrize("family", sorted(FAMILY_NAMES))
def test_each_layer_has_one_name_of_its_own_in_every_form(family: str) -> None:
    """Two rules for one name would lose a layer; `#` stands for numbers."""
    for component, parts in FAMILY_NAMES[family].components.items():
        ours = [rule.ours for rule in parts.rules]
        assert len(ours) == len(set(ours)), component
        places = [
            (rule.native, rule.index)
            for rule in parts.rules
            if not rule.ours.startswith("language_model.")
        ]
        assert len(places) == len(set(places)), component
        for rule in parts.rules:
            assert rule.ours.count("#") == rule.native.count("#")


def test_layers_without_a_name_are_named() -> None:
    names = FAMILY_NAMES["wan2_1"]
    assert why_not(names, "dit", ("patch_embedding",), "diffusers") is None
    assert why_not(names, "dit", ("patch_embedding",), "comfyui") == (
        "comfyui's form has no name for dit.patch_embedding"
    )
    assert why_not(names, "dit", ("proj_out",), "comfyui") is None
    assert "train only blocks" in str(why_not(names, "dit", ("proj_out",), "kohya"))


def test_a_class_says_the_family() -> None:
    assert families_of("FluxTransformer2DModel", "dit") == ("flux",)
    assert families_of("WanTransformer3DModel", "dit_2") == ("wan2_2",)
    assert set(families_of("CLIPTextModel", "text_encoder")) == {"flux", "sdxl"}
    assert set(families_of("Other", "text_encoder_2")) == {"flux", "sdxl"}
