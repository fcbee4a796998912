"""Composing: recipes are found, the right file wins, and every value knows what set it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from framework.compose import compose_run, conf_dir, recipe_names, shipped_recipes_dir, sources
from framework.errors import ConfigError


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with ./recipes."""
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_recipe(folder: Path, name: str, text: str) -> Path:
    path = folder / "recipes" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_wins_over_the_root_configuration(user_folder: Path) -> None:
    write_recipe(
        user_folder, "mine", "run: {name: mine, output_dir: elsewhere}\ntrainer: {seed: 7}\n"
    )
    values = compose_run(["recipe=mine"]).values
    assert values["run"]["output_dir"] == "elsewhere"
    assert values["trainer"]["seed"] == 7


def test_an_override_wins_over_a_recipe() -> None:
    assert compose_run(["recipe=pocket_lora", "optim.lr=0.5"]).values["optim"]["lr"] == 0.5


def test_a_private_recipe_inherits_a_shipped_one(user_folder: Path) -> None:
    write_recipe(user_folder, "mine", "defaults: [pocket_lora, _self_]\ntrainer: {max_steps: 3}\n")
    composition = compose_run(["recipe=mine"])
    assert composition.values["trainer"]["max_steps"] == 3
    assert composition.values["model"]["source"] == "assets/pocket"
    assert composition.where("trainer.max_steps") == "recipes/mine.yaml:2:11"
    shipped = Path(__file__).resolve().parents[2] / "recipes" / "pocket_lora.yaml"
    lines = shipped.read_text(encoding="utf-8").splitlines()
    line = lines.index("  source: assets/pocket") + 1
    assert composition.where("model.source").endswith(f"/recipes/pocket_lora.yaml:{line}:3")


def test_the_users_recipe_hides_a_shipped_one_of_the_same_name(user_folder: Path) -> None:
    write_recipe(user_folder, "pocket_lora", "run: {name: hidden}\n")
    assert compose_run(["recipe=pocket_lora"]).values["run"]["name"] == "hidden"


def test_recipes_in_sub_folders_are_found(user_folder: Path) -> None:
    write_recipe(user_folder, "styles/ink", "run: {name: ink}\n")
    assert "styles/ink" in recipe_names()
    assert compose_run(["recipe=styles/ink"]).values["run"]["name"] == "ink"


def test_an_empty_recipe_is_allowed(user_folder: Path) -> None:
    write_recipe(user_folder, "empty", "# nothing\n")
    assert compose_run(["recipe=empty"]).values["run"] == {"output_dir": "outputs"}


def test_no_trace_of_hydra_is_left_in_the_values() -> None:
    assert "hydra" not in compose_run(["recipe=pocket_lora"]).values


def test_composing_twice_gives_the_same() -> None:
    first, second = compose_run(["recipe=pocket_lora"]), compose_run(["recipe=pocket_lora"])
    assert first.values == second.values


def test_values_written_as_yaml_are_a_recipe(user_folder: Path) -> None:
    composition = compose_run(["recipe=pocket_lora", "optim.lr=0.25"])
    write_recipe(user_folder, "again", yaml.safe_dump(composition.values))
    assert compose_run(["recipe=again"]).values == composition.values


def test_unknown_keys_are_let_through_to_the_schema() -> None:
    values = compose_run(["recipe=pocket_lora", "model.dit.precison=fp8", "+new=1"]).values
    assert values["model"]["dit"]["precison"] == "fp8"
    assert values["new"] == 1


def test_a_group_can_be_chosen_on_the_command_line() -> None:
    assert compose_run(["recipe=pocket_lora", "optim=prodigy"]).values["optim"]["name"] == "prodigy"


@pytest.mark.parametrize(
    "path",
    ["~/pics", "bilder/grün", "写真", "/tmp/pics (1)", "/a b/c", "x#y;z", "a=b", "x" * 100_000],
)
def test_a_path_needs_no_quotes_of_hydra(path: str) -> None:
    composition = compose_run(["recipe=pocket_lora", f"data.path={path}"])
    assert composition.values["data"]["path"] == path
    assert composition.where("data.path").startswith("command line: data.path=")


def test_a_recipe_may_have_any_name(user_folder: Path) -> None:
    write_recipe(user_folder, "grün", "run: {name: ink}\n")
    assert compose_run(["recipe=grün"]).values["run"]["name"] == "ink"


def test_a_key_can_be_removed() -> None:
    composition = compose_run(["recipe=pocket_lora", "~optim.lr"])
    assert "lr" not in composition.values["optim"]
    assert composition.where("optim.lr") == "default"


def test_interpolations_are_filled_in() -> None:
    overrides = ["recipe=pocket_lora", "trainer.max_steps=123", "sample.seed=${trainer.max_steps}"]
    assert compose_run(overrides).values["sample"]["seed"] == 123


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("optim.lr", "recipes/mine.yaml:3:3"),
        ("model.family", "conf/model/qwen_image.yaml:2:1"),
        ("sample.prompts", "recipes/mine.yaml:5:3"),
        ("sample.prompts[1]", "recipes/mine.yaml:7:7"),
        ("data.batch_size", "command line: data.batch_size=2"),
        ("sample.size_px[0]", "command line: sample.size_px=[64,64]"),
        ("validation.fraction", "command line: validation={fraction: 0.1}"),
        ("trainer.max_steps", "command line: ++trainer.max_steps=5"),
        ("objective.loss", "default"),
        ("data", "conf/data/folder.yaml:2:1"),
        ("checkpoint.keep_last", "recipes/mine.yaml:8:22"),
        ("logger.csv", "recipes/mine.yaml:10:28"),
    ],
)
def test_every_value_knows_what_set_it(user_folder: Path, path: str, where: str) -> None:
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
    write_recipe(user_folder, "mine", text)
    overrides = [
        "data.batch_size=2",
        "sample.size_px=[64,64]",
        "validation={fraction: 0.1}",
        "++trainer.max_steps=5",
    ]
    found = compose_run(["recipe=mine", *overrides]).where(path)
    assert found == where or (where.startswith("conf/") and found.endswith(f"/{where}"))


def test_a_list_of_a_later_file_replaces_where_its_elements_came_from(user_folder: Path) -> None:
    write_recipe(user_folder, "base", "sample: {prompts: [a, b, c]}\n")
    write_recipe(user_folder, "mine", "defaults: [base, _self_]\nsample: {prompts: [d]}\n")
    composition = compose_run(["recipe=mine"])
    assert composition.values["sample"]["prompts"] == ["d"]
    assert composition.where("sample.prompts[0]") == "recipes/mine.yaml:2:20"
    assert composition.where("sample.prompts[2]") == composition.where("sample.prompts")


BROKEN_COMMANDS = [
    ([], ["recipe: must be given", "Use one of:", "pocket_lora"]),
    (["recip=pocket_lora"], ["recipe: must be given", "recip: unknown key", "Nearest: recipe"]),
    (
        ["recipe=pocket_lra"],
        [
            "no recipe called 'pocket_lra'",
            "command line: recipe=pocket_lra",
            "Nearest: pocket_lora",
        ],
    ),
    (["recipe=recipes/pocket_lora.yaml"], ["no recipe called", "Nearest: pocket_lora"]),
    (["pocket_lora"], ["'pocket_lora' isn't of the form key=value", "recipe=pocket_lora"]),
    (["recipes/pocket_lora.yaml"], ["isn't of the form key=value", "recipe=pocket_lora"]),
    (["=3"], ["'=3' isn't of the form key=value"]),
    (["--optim.lr=1"], ["Overrides have no dashes: optim.lr=1"]),
    (["recipe=pocket_lora", "optim.lr=1e-4,1e-5"], ["optim.lr: holds several values", "[1,2]"]),
    (["recipe=pocket_lora", "optim.lr=range(3)"], ["optim.lr: holds several values"]),
    (
        ["recipe=pocket_lora", "sample.prompts=[a,"],
        ["sample.prompts: can't be parsed", "in quotes"],
    ),
    (
        ["recipe=pocket_lora", "sample.prompts=[un château]"],
        ["sample.prompts: can't be parsed", 'sample.prompts=["one","two"]'],
    ),
    (["recipe=pocket_lora", "model..dit=3"], ["Write the key as a dotted path"]),
    (["recipe=pocket_lora", "data.path='é"], ["data.path: can't be parsed"]),
    (["recipe=pocket_lora", "optim.lr=${optim.lr"], ["optim.lr: can't be parsed"]),
    (["recipe=pocket_lora", "sample.prompts[9]=a"], ["sample.prompts.9=a"]),
    (
        ["recipe=pocket_lora", "sample.prompts.9=a"],
        ["sample.prompts[9]: can't be set", "command line: sample.prompts.9=a"],
    ),
    (["recipe=pocket_lora", "model=fluxx"], ["no model called 'fluxx'", "Use one of: qwen_image"]),
    (["recipe=pocket_lora", "optim=adam_w"], ["no optim called 'adam_w'", "Nearest: adamw"]),
    (
        ["recipe=pocket_lora", "trainer=null"],
        ["trainer: must name one of the files", "ddp, single"],
    ),
    (
        ["recipe=pocket_lora", "hydra.run.dir=x"],
        ["hydra.run.dir: Hydra's own settings", "run.output_dir"],
    ),
    (
        ["recipe=pocket_lora", "run.name=${run.nme}"],
        ["run.name: '${run.nme}' can't be filled in", "run.nme"],
    ),
    (["recipe=pocket_lora", "~optim.bta"], ["optim.bta", "command line: ~optim.bta"]),
    (["recipe=pocket_lora", "x@y=1"], ["command line: x@y=1"]),
    (["recipe=pocket_lora", "model.dit.lora=[1]"], ["model.dit.lora: can't be set"]),
]


@pytest.mark.parametrize(
    ("overrides", "phrases"), BROKEN_COMMANDS, ids=lambda value: "-".join(value)[:50]
)
def test_a_broken_command_line_is_explained(overrides: list[str], phrases: list[str]) -> None:
    with pytest.raises(ConfigError, match="configuration") as caught:
        compose_run(overrides)
    report = str(caught.value)
    assert [phrase for phrase in phrases if phrase not in report] == [], report


def test_every_fault_of_a_command_line_is_in_one_report() -> None:
    with pytest.raises(ConfigError, match="3 faults"):
        compose_run(["recipe=pocket_lora", "optim.lr=1,2", "hydra.job.name=x", "oops"])


BROKEN_RECIPES = [
    ("optim: {lr: 1\nrun: x\n", ["recipes/mine.yaml:2:4", "not valid YAML"]),
    ("optim:\n\tlr: 1\n", ["recipes/mine.yaml:2:1", "not valid YAML"]),
    ("optim: {lr: 1}\noptim: {lr: 2}\n", ["recipes/mine.yaml:2:1", "duplicate key optim"]),
    ("- a\n- b\n", ["recipes/mine.yaml", "must be a mapping"]),
    ("run: {name: '${oops'}\n", ["recipes/mine.yaml", "can't be read"]),
    ("run: {name: '${run.nme}'}\n", ["run.name: '${run.nme}'", "recipes/mine.yaml:1:7"]),
    ("defaults: [pocket_lra]\n", ["'pocket_lra'", "recipes/mine.yaml", "Nearest: pocket_lora"]),
    ("defaults: [{override /modle: x}]\n", ["'modle'", "recipes/mine.yaml"]),
    ("defaults: [{override /model: x}]\n", ["no model called 'x'", "recipes/mine.yaml"]),
    (
        "hydra: {callbacks: {a: {_target_: os.abort}}}\n",
        ["hydra: Hydra's own settings", "recipes/mine.yaml:1:1"],
    ),
]


@pytest.mark.parametrize(("text", "phrases"), BROKEN_RECIPES, ids=lambda value: str(value)[:40])
def test_a_broken_recipe_is_explained(user_folder: Path, text: str, phrases: list[str]) -> None:
    write_recipe(user_folder, "mine", text)
    with pytest.raises(ConfigError, match="1 fault") as caught:
        compose_run(["recipe=mine"])
    report = str(caught.value)
    assert [phrase for phrase in phrases if phrase not in report] == [], report


def test_a_recipe_that_is_not_text_is_named(user_folder: Path) -> None:
    (user_folder / "recipes" / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"recipes/mine\.yaml") as caught:
        compose_run(["recipe=mine"])
    assert "UTF-8" in str(caught.value)


def test_nothing_named_by_target_is_called(user_folder: Path) -> None:
    write_recipe(user_folder, "mine", "model: {dit: {_target_: os.abort, _args_: []}}\n")
    assert compose_run(["recipe=mine"]).values["model"]["dit"]["_target_"] == "os.abort"


def test_the_package_leaves_another_hydra_program_alone(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    (tmp_path / "config.yaml").write_text("a: 1\n")
    compose_run(["recipe=pocket_lora"])
    with initialize_config_dir(config_dir=str(tmp_path), version_base="1.3"):
        compose_run(["recipe=pocket_lora"])
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
