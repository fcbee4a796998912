"""`vram=NAME` lays one of the documented set-ups over the recipe, and means what its file says."""

from __future__ import annotations

from typing import Any

import pytest

from framework.compose import compose_run
from framework.schema.run import RunConfig
from framework.schema.validate import validate
from tests.unit.compose.conftest import Write

GIVEN = ["recipe=pocket_lora", "data.path=pictures"]
# Set-up -> precision, offload and granularity of the transformer, and the limit in GiB.
SETUPS: dict[str, tuple[str, str, str, float | None]] = {
    "none": ("bf16", "none", "layer", None),
    "component_offload": ("bf16", "host", "model", None),
    "fp8": ("fp8", "host", "model", None),
    "dynamic": ("fp8", "host", "layer", 15.5),
    "disk": ("fp8", "disk", "layer", 10.0),
}


def config_of(*overrides: str) -> RunConfig:
    composition = compose_run(overrides)
    assert composition.faults == ()
    config, warnings = validate(composition.values, composition.where)
    assert warnings == []
    return config


@pytest.mark.parametrize("name", SETUPS)
def test_a_set_up_says_how_every_component_rests(name: str) -> None:
    model = config_of(*GIVEN, f"vram={name}").model
    precision, offload, granularity, limit = SETUPS[name]
    assert model.vram_limit == limit
    for part, config in model.components.items():
        assert config.offload == offload
        assert config.granularity == granularity
        assert config.precision == ("bf16" if part == "vae" else precision)


@pytest.mark.parametrize("name", SETUPS)
def test_a_set_up_changes_nothing_but_storage(name: str) -> None:
    storage = {"precision", "offload", "granularity"}

    def rest(config: RunConfig) -> Any:
        values = config.model_dump()
        values["model"].pop("vram_limit")
        for part in config.model.components:
            for key in storage:
                values["model"][part].pop(key)
        return values

    assert rest(config_of(*GIVEN, f"vram={name}")) == rest(config_of(*GIVEN))


def test_a_run_without_a_set_up_keeps_what_its_recipe_says(write_recipe: Write) -> None:
    write_recipe("mine", "defaults: [pocket_lora, _self_]\nmodel: {dit: {precision: fp8}}\n")
    composition = compose_run(["recipe=mine"])
    assert composition.values["model"]["dit"]["precision"] == "fp8"
    assert "vram" not in composition.values


def test_a_set_up_on_the_command_line_wins_over_the_recipe_but_not_over_a_key(
    write_recipe: Write,
) -> None:
    write_recipe("mine", "defaults: [pocket_lora, _self_]\nmodel: {dit: {precision: fp8}}\n")
    composition = compose_run(
        ["recipe=mine", "vram=component_offload", "model.vae.granularity=block"]
    )
    assert composition.values["model"]["dit"]["precision"] == "bf16"
    assert composition.where("model.dit.precision").endswith("component_offload.yaml:5:7")
    assert composition.values["model"]["vae"]["granularity"] == "block"


def test_a_recipe_that_chooses_a_set_up_may_change_keys_of_it(write_recipe: Write) -> None:
    text = "defaults: [pocket_lora, override /vram: dynamic, _self_]\nmodel: {vram_limit: 23}\n"
    write_recipe("mine", text)
    write_recipe("above", "defaults: [mine, _self_]\nmodel: {vae: {offload: none}}\n")
    composition = compose_run(["recipe=above"])
    assert composition.faults == composition.warnings == ()
    model = composition.values["model"]
    assert model["vram_limit"] == 23
    assert model["vae"] == {"precision": "bf16", "offload": "none", "granularity": "layer"}
    assert model["text_encoder"]["precision"] == "fp8"
    assert composition.where("model.vram_limit") == "recipes/mine.yaml:2:9"


def test_the_command_line_changes_the_set_up_that_a_recipe_chose(write_recipe: Write) -> None:
    text = "defaults: [pocket_lora, override /vram: dynamic, _self_]\nmodel: {vram_limit: 23}\n"
    write_recipe("mine", text)
    model = compose_run(["recipe=mine", "vram=disk"]).values["model"]
    assert model["vram_limit"] == 10.0
    assert model["dit"]["offload"] == "disk"


def test_a_set_up_that_does_not_exist_is_named_with_the_nearest() -> None:
    (fault,) = compose_run(["recipe=pocket_lora", "vram=dynamc"]).faults
    assert fault.nearest == ("dynamic",)
    assert "component_offload, disk, dynamic, fp8, none" in fault.hint
