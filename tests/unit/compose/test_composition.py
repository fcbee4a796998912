"""Composing: recipes are found, the right file wins, and every value knows what set it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from framework.compose import (
    Composer,
    compose_run,
    conf_dir,
    recipe_folders,
    recipe_names,
    shipped_recipes_dir,
    sources,
)

Write = Callable[[str, str], Path]


def line_of(file: Path, text: str) -> int:
    return file.read_text(encoding="utf-8").splitlines().index(text) + 1


def test_a_recipe_wins_over_the_root_configuration(write_recipe: Write) -> None:
    write_recipe("mine", "run: {name: mine, output_dir: elsewhere}\ntrainer: {seed: 7}\n")
    values = compose_run(["recipe=mine"]).values
    assert values["run"]["output_dir"] == "elsewhere"
    assert values["trainer"]["seed"] == 7


def test_an_override_wins_over_a_recipe() -> None:
    assert compose_run(["recipe=pocket_lora", "optim.lr=0.5"]).values["optim"]["lr"] == 0.5


def test_a_private_recipe_inherits_a_shipped_one(write_recipe: Write) -> None:
    write_recipe("mine", "defaults: [pocket_lora, _self_]\ntrainer: {max_steps: 3}\n")
    composition = compose_run(["recipe=mine"])
    assert composition.values["trainer"]["max_steps"] == 3
    assert composition.values["model"]["source"] == "assets/pocket"
    assert composition.where("trainer.max_steps") == "recipes/mine.yaml:2:11"
    line = line_of(shipped_recipes_dir() / "pocket_lora.yaml", "  source: assets/pocket")
    assert composition.where("model.source").endswith(f"/recipes/pocket_lora.yaml:{line}:3")


def test_the_users_recipe_hides_a_shipped_one_of_the_same_name(write_recipe: Write) -> None:
    write_recipe("pocket_lora", "run: {name: hidden}\n")
    assert compose_run(["recipe=pocket_lora"]).values["run"]["name"] == "hidden"


def test_a_given_folder_is_searched_first(write_recipe: Write, tmp_path: Path) -> None:
    write_recipe("mine", "run: {name: near}\n")
    folder = tmp_path / "team"
    folder.mkdir()
    (folder / "mine.yaml").write_text("run: {name: team}\n")
    (folder / "other.yaml").write_text("defaults: [mine, _self_]\ntrainer: {seed: 3}\n")
    assert compose_run(["recipe=mine"], config_dir=folder).values["run"]["name"] == "team"
    assert compose_run(["recipe=other"], config_dir=folder).values["run"]["name"] == "team"
    assert recipe_folders(folder)[0] == folder
    assert {"mine", "other", "pocket_lora"} <= set(recipe_names(folder))
    assert "other" not in recipe_names()


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_given_folder_that_is_none_is_told(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "recipes.yaml"
    if kind == "file":
        path.write_text("")
    composition = compose_run(["recipe=pocket_lora"], config_dir=path)
    assert [fault.path for fault in composition.faults] == ["--config-dir"]
    assert composition.values["model"]["source"] == "assets/pocket"


def test_recipes_in_sub_folders_are_found(write_recipe: Write) -> None:
    write_recipe("styles/ink", "defaults: [paper, _self_]\nrun: {name: ink}\n")
    write_recipe("styles/paper", "trainer: {seed: 5}\n")
    write_recipe("top", "defaults: [styles/ink, _self_]\n")
    assert "styles/ink" in recipe_names()
    for recipe in ("styles/ink", "top"):
        values = compose_run([f"recipe={recipe}"]).values
        assert values["run"]["name"] == "ink"
        assert values["trainer"]["seed"] == 5


def test_recipes_may_end_in_yml(user_folder: Path) -> None:
    (user_folder / "recipes" / "mine.yml").write_text("run: {name: mine}\n")
    assert "mine" in recipe_names()
    assert compose_run(["recipe=mine"]).where("run.name") == "recipes/mine.yml:1:7"


def test_hidden_folders_hold_no_recipes(write_recipe: Write) -> None:
    write_recipe(".old/mine", "run: {name: mine}\n")
    assert all(not name.startswith(".") for name in recipe_names())


def test_an_empty_recipe_is_allowed(write_recipe: Write) -> None:
    write_recipe("empty", "# nothing\n")
    assert compose_run(["recipe=empty"]).values["run"] == {"output_dir": "outputs"}


def test_no_trace_of_hydra_is_left_in_the_values() -> None:
    composition = compose_run(["recipe=pocket_lora"])
    assert "hydra" not in composition.values
    with Composer() as composer:
        assert not composer.repository.has_group("hydra")
        assert not composer.repository.has_file("hydra/launcher/basic")


def test_composing_twice_gives_the_same() -> None:
    first, second = compose_run(["recipe=pocket_lora"]), compose_run(["recipe=pocket_lora"])
    assert first.values == second.values


def test_values_written_as_yaml_are_a_recipe(write_recipe: Write) -> None:
    composition = compose_run(["recipe=pocket_lora", "optim.lr=0.25"])
    write_recipe("again", yaml.safe_dump(composition.values))
    assert compose_run(["recipe=again"]).values == composition.values


def test_unknown_keys_are_let_through_to_the_schema() -> None:
    composition = compose_run(["recipe=pocket_lora", "model.dit.precison=fp8", "+new=1"])
    assert composition.values["model"]["dit"]["precison"] == "fp8"
    assert composition.values["new"] == 1
    assert composition.faults == ()


def test_a_group_can_be_chosen_on_the_command_line() -> None:
    for line in ("optim=prodigy", "+optim=prodigy", "++optim=prodigy"):
        assert compose_run(["recipe=pocket_lora", line]).values["optim"]["name"] == "prodigy"


def test_a_group_can_be_chosen_by_a_recipe(write_recipe: Write) -> None:
    write_recipe("mine", "defaults: [pocket_lora, override /optim: prodigy, _self_]\n")
    composition = compose_run(["recipe=mine"])
    assert composition.values["optim"]["name"] == "prodigy"
    assert composition.where("optim.name").rsplit(":", 2)[0].endswith("conf/optim/prodigy.yaml")
    overridden = compose_run(["recipe=mine", "optim=adamw_8bit"])
    assert overridden.values["optim"]["name"] == "adamw_8bit"


@pytest.mark.parametrize(
    "path",
    ["~/pics", "bilder/grün", "写真", "/tmp/pics (1)", "/a b/c", "x#y;z", "a=b", "x" * 100_000],
)
def test_a_path_needs_no_quotes_of_hydra(path: str) -> None:
    composition = compose_run(["recipe=pocket_lora", f"data.path={path}"])
    assert composition.values["data"]["path"] == path
    assert composition.where("data.path") == f"command line: data.path={path}"


def test_a_recipe_may_have_any_name(write_recipe: Write) -> None:
    write_recipe("grün", "run: {name: ink}\n")
    write_recipe("my recipe", "run: {name: spaced}\n")
    assert compose_run(["recipe=grün"]).values["run"]["name"] == "ink"
    assert compose_run(["recipe=my recipe"]).values["run"]["name"] == "spaced"


def test_a_key_can_be_removed() -> None:
    composition = compose_run(["recipe=pocket_lora", "~optim.lr"])
    assert "lr" not in composition.values["optim"]
    assert composition.where("optim.lr") == "default"


def test_a_group_can_be_removed() -> None:
    for line in ("~logger", "~logger=local"):
        composition = compose_run(["recipe=pocket_lora", line])
        assert "logger" not in composition.values
        assert composition.faults == ()


def test_an_element_of_a_list_can_be_set() -> None:
    composition = compose_run(["recipe=pocket_lora", "sample.prompts.1=red fox"])
    assert composition.values["sample"]["prompts"][:3] == ["red apple", "red fox", "umbrella"]
    assert composition.where("sample.prompts[1]") == "command line: sample.prompts.1=red fox"
    assert "pocket_lora.yaml" in composition.where("sample.prompts[0]")


def test_interpolations_are_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_TEST_NAME", "ink")
    overrides = [
        "recipe=pocket_lora",
        "trainer.max_steps=123",
        "sample.seed=${trainer.max_steps}",
        "run.name=${oc.env:OCTAVO_TEST_NAME}",
    ]
    composition = compose_run(overrides)
    assert composition.values["sample"]["seed"] == 123
    assert composition.values["run"]["name"] == "ink"
    assert composition.where("sample.seed") == "command line: sample.seed=${trainer.max_steps}"


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("optim.lr", "recipes/mine.yaml:3:3"),
        ("sample.prompts", "recipes/mine.yaml:5:3"),
        ("sample.prompts[1]", "recipes/mine.yaml:7:7"),
        ("data.batch_size", "command line: data.batch_size=2"),
        ("sample.size_px[0]", "command line: sample.size_px=[64,64]"),
        ("validation.fraction", "command line: validation={fraction: 0.1}"),
        ("trainer.max_steps", "command line: ++trainer.max_steps=5"),
        ("objective.loss", "default"),
        ("checkpoint.keep_last", "recipes/mine.yaml:8:22"),
        ("logger.csv", "recipes/mine.yaml:10:28"),
        ("trainer.devices", "default"),
    ],
)
def test_every_value_knows_what_set_it(write_recipe: Write, path: str, where: str) -> None:
    text = """\
# @package _global_
optim:
  lr: 1e-3
sample:
  prompts:
    - one
    - two
checkpoint: &saving {keep_last: 1}
logger:
  <<: &quiet {wandb: null, csv: false}
"""
    write_recipe("mine", text)
    overrides = [
        "data.batch_size=2",
        "sample.size_px=[64,64]",
        "validation={fraction: 0.1}",
        "++trainer.max_steps=5",
        "~trainer.devices",
    ]
    found = compose_run(["recipe=mine", *overrides]).where(path)
    assert found == where


def test_a_value_of_a_group_knows_its_file() -> None:
    composition = compose_run(["recipe=pocket_lora"])
    file = conf_dir() / "model" / "qwen_image.yaml"
    found = composition.where("model.family")
    assert found.endswith(f"conf/model/qwen_image.yaml:{line_of(file, 'family: qwen_image')}:1")


def test_a_package_puts_keys_in_their_place(write_recipe: Write) -> None:
    write_recipe("mine", "# a comment\n# @package model.dit\nprecision: fp8\n")
    composition = compose_run(["recipe=mine"])
    assert composition.values["model"]["dit"] == {"precision": "fp8"}
    assert composition.where("model.dit.precision") == "recipes/mine.yaml:3:1"


def test_a_list_of_a_later_file_replaces_where_its_elements_came_from(write_recipe: Write) -> None:
    write_recipe("base", "sample: {prompts: [a, b, c]}\n")
    write_recipe("mine", "defaults: [base, _self_]\nsample: {prompts: [d]}\n")
    composition = compose_run(["recipe=mine"])
    assert composition.values["sample"]["prompts"] == ["d"]
    assert composition.where("sample.prompts[0]") == "recipes/mine.yaml:2:20"
    assert composition.where("sample.prompts[2]") == composition.where("sample.prompts")


def test_words_that_yaml_takes_for_switches_stay_keys(write_recipe: Write) -> None:
    write_recipe("mine", "on: 1\n3: x\n")
    composition = compose_run(["recipe=mine"])
    assert composition.values["on"] == 1
    assert composition.values["3"] == "x"
    assert composition.where("on") == "recipes/mine.yaml:1:1"


def test_keys_that_a_parent_takes_back_are_warned_of(write_recipe: Write) -> None:
    write_recipe("base", "trainer: {seed: 1}\nrun: {name: base}\n")
    write_recipe("mine", "defaults: [_self_, base]\ntrainer: {seed: 2, max_steps: 3}\n")
    composition = compose_run(["recipe=mine"])
    assert composition.values["trainer"]["seed"] == 1
    assert [(w.path, w.where, w.code) for w in composition.warnings] == [
        ("trainer.seed", "recipes/mine.yaml:2:11", "unused")
    ]
    assert "recipes/base.yaml:1:11" in composition.warnings[0].message
    write_recipe("mine", "defaults: [base, _self_]\ntrainer: {seed: 2, max_steps: 3}\n")
    assert compose_run(["recipe=mine"]).warnings == ()


def test_nothing_named_by_target_is_called(write_recipe: Write) -> None:
    write_recipe("mine", "model: {dit: {_target_: os.abort, _args_: []}}\n")
    assert compose_run(["recipe=mine"]).values["model"]["dit"]["_target_"] == "os.abort"


def test_the_package_leaves_another_hydra_program_alone(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir, version

    (tmp_path / "config.yaml").write_text("a: 1\n")
    compose_run(["recipe=pocket_lora"])
    with initialize_config_dir(config_dir=str(tmp_path), version_base="1.2"):
        before = version.getbase()
        compose_run(["recipe=pocket_lora"])
        assert version.getbase() == before
        assert compose("config").a == 1


def test_an_installed_package_carries_its_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "framework"
    (package / "_conf").mkdir(parents=True)
    (package / "_recipes").mkdir()
    monkeypatch.setattr(sources, "_PACKAGE", package)
    assert conf_dir() == package / "_conf"
    assert shipped_recipes_dir() == package / "_recipes"
